// Regional attention on the CPU: what a call is, and its entry points. The algorithm is in
// regional_attention_kernel.h, compiled once per instruction set.
#pragma once
#include <cstdint>

#include "../common/tensor.h"
#include "isa.h"

namespace anima {

struct Strided {
  const void* data;
  int64_t batch, head, row;  // strides in elements; the last dimension has stride 1
};

struct RegionalAttention {
  Strided q, k, v, out;        // [B, H, Nq, D], [B, Hk, Nk, D] twice, [B, H, Nq, D]; out is written
  float* lse;                  // [B, H, Nq] or null
  int64_t batch, heads, kv_heads, queries, head_dim;
  DType dtype;
  const float* bias;           // [P, S, Nq] or null: nothing is biased. blend: weights
  const int32_t* order;        // [P, Nq] or null: identity
  const int64_t* segments;     // [P, S, 3]: start, end, pads
  const int64_t* plan_index;   // [B]
  int64_t plans, segments_per_plan;
  float scale;
  bool blend;
};

// Bytes of workspace (64-byte aligned) for one call on so many threads.
int64_t regional_attention_workspace(const RegionalAttention& call, int threads);

// Writes call.out, and call.lse if given. `isa` must be at most best_isa().
void regional_attention(const RegionalAttention& call, void* workspace, int threads, Isa isa);

namespace portable {
void run(const RegionalAttention& call, float* workspace, int threads);
}
#if defined(ANIMA_X86)
namespace avx2 {
void run(const RegionalAttention& call, float* workspace, int threads);
}
namespace avx512 {
void run(const RegionalAttention& call, float* workspace, int threads);
}
#endif

}  // namespace anima
