#include "scans.h"

#include "chunk_layout.h"

namespace anima {

int64_t ssd_chunk_scan_workspace(const SsdChunkScan& call, int threads) {
  return layout_of(call, threads).total * threads * int64_t(sizeof(float));
}
int64_t gated_delta_rule_workspace(const GatedDeltaRule& call, int threads) {
  return layout_of(call, threads).total * threads * int64_t(sizeof(float));
}
int64_t gated_delta_step_workspace(const GatedDeltaRule& call, int threads) {
  return step_floats(call) * threads * int64_t(sizeof(float));
}

#if defined(ANIMA_X86)
#define ANIMA_RUN(op, ...)                                       \
  if (isa == Isa::kAvx512) return avx512::op(__VA_ARGS__);       \
  if (isa == Isa::kAvx2) return avx2::op(__VA_ARGS__);           \
  portable::op(__VA_ARGS__)
#else
#define ANIMA_RUN(op, ...) \
  (void)isa;               \
  portable::op(__VA_ARGS__)
#endif

void ssd_chunk_scan(const SsdChunkScan& call, void* workspace, int threads, Isa isa) {
  ANIMA_RUN(ssd_chunk_scan, call, static_cast<float*>(workspace), threads);
}
void ssd_state_update(const SsdStateUpdate& call, int threads, Isa isa) {
  ANIMA_RUN(ssd_state_update, call, threads);
}
void gated_delta_rule(const GatedDeltaRule& call, void* workspace, int threads, Isa isa) {
  ANIMA_RUN(gated_delta_rule, call, static_cast<float*>(workspace), threads);
}
void gated_delta_step(const GatedDeltaRule& call, void* workspace, int threads, Isa isa) {
  ANIMA_RUN(gated_delta_step, call, static_cast<float*>(workspace), threads);
}
void causal_conv1d(const CausalConv1d& call, int threads, Isa isa) {
  ANIMA_RUN(causal_conv1d, call, threads);
}
void causal_conv1d_update(const CausalConv1dUpdate& call, int threads, Isa isa) {
  ANIMA_RUN(causal_conv1d_update, call, threads);
}

}  // namespace anima
