// The recurrent ops on the CPU: entry points. The calls are described in ../common/scans.h, the algorithms in the
// *_kernel.h files, which scans_*.cpp compile once per instruction set.
//
// `isa` must be at most best_isa(). Workspaces are 64-byte aligned.
#pragma once
#include "../common/scans.h"
#include "isa.h"

namespace anima {

// Bytes of workspace for one call on so many threads.
int64_t ssd_chunk_scan_workspace(const SsdChunkScan& call, int threads);
int64_t gated_delta_rule_workspace(const GatedDeltaRule& call, int threads);
int64_t gated_delta_step_workspace(const GatedDeltaRule& call, int threads);

void ssd_chunk_scan(const SsdChunkScan& call, void* workspace, int threads, Isa isa);
void ssd_state_update(const SsdStateUpdate& call, int threads, Isa isa);
void gated_delta_rule(const GatedDeltaRule& call, void* workspace, int threads, Isa isa);
void gated_delta_step(const GatedDeltaRule& call, void* workspace, int threads, Isa isa);
void causal_conv1d(const CausalConv1d& call, int threads, Isa isa);
void causal_conv1d_update(const CausalConv1dUpdate& call, int threads, Isa isa);

// The same for one instruction set.
#define ANIMA_DECLARE_SCANS                                                         \
  void ssd_chunk_scan(const SsdChunkScan& call, float* workspace, int threads);     \
  void ssd_state_update(const SsdStateUpdate& call, int threads);                   \
  void gated_delta_rule(const GatedDeltaRule& call, float* workspace, int threads); \
  void gated_delta_step(const GatedDeltaRule& call, float* workspace, int threads); \
  void causal_conv1d(const CausalConv1d& call, int threads);                        \
  void causal_conv1d_update(const CausalConv1dUpdate& call, int threads);
namespace portable {
ANIMA_DECLARE_SCANS
}
#if defined(ANIMA_X86)
namespace avx2 {
ANIMA_DECLARE_SCANS
}
namespace avx512 {
ANIMA_DECLARE_SCANS
}
#endif
#undef ANIMA_DECLARE_SCANS

}  // namespace anima
