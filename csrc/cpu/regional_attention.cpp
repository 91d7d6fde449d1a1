#include "regional_attention.h"

#include "regional_attention_layout.h"

namespace anima {

int64_t regional_attention_workspace(const RegionalAttention& call, int threads) {
  return Workspace(call).total * threads * int64_t(sizeof(float));
}

void regional_attention(const RegionalAttention& call, void* workspace, int threads, Isa isa) {
  float* floats = static_cast<float*>(workspace);
#if defined(ANIMA_X86)
  if (isa == Isa::kAvx512) return avx512::run(call, floats, threads);
  if (isa == Isa::kAvx2) return avx2::run(call, floats, threads);
#endif
  (void)isa;
  portable::run(call, floats, threads);
}

}  // namespace anima
