// The gated delta rule token by token, for a few tokens: decoding. The call is described in ../common/scans.h.
//
// A warp owns 32 / kParts columns of one value head's state, in registers: of each column a lane, part, has the rows
// part, part + kParts, ... With four parts, eight neighbouring floats of [K, V] are one 32-byte sector; K above 128
// takes eight parts, or registers would not suffice. A token costs two sums over the parts, by shuffles, and nothing
// but q, k, v, g, beta and o moves: S is read and written once a call, 8 K V bytes a head and sequence, which is the
// floor at small L (Qwen3.5-4B, 32 heads of 128 x 128: 4.2 MB a layer and sequence, 4.2 us on an RTX 4090, 1.3 us on
// an H100 by data-sheet bandwidth; not measured).
#include "scans.h"
#include "tile.cuh"

namespace anima {
namespace cuda {
namespace {

constexpr int kStepThreads = 128;

// Of the lanes with this lane's column; lane = column + 32 / kParts * part.
template <int kParts>
__device__ __forceinline__ float sum_over_parts(float x) {
#pragma unroll
  for (int step = 32 / kParts; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

template <class T, int kParts, int kRows>  // K <= kParts * kRows
__global__ void __launch_bounds__(kStepThreads, 1) gated_delta_step_kernel(const GatedDeltaRule call) {
  constexpr int kColumns = 32 / kParts, kColumnsOfBlock = kStepThreads / kParts;
  const int slices = int((call.value_dim + kColumnsOfBlock - 1) / kColumnsOfBlock);
  const int64_t row = blockIdx.x / slices;  // of [sequences, value_heads]
  const int64_t h = row % call.value_heads, sequence = row / call.value_heads;
  const int64_t hk = h / (call.value_heads / call.key_heads);
  const int part = lane_index() / kColumns;
  const int64_t column = int64_t(blockIdx.x) % slices * kColumnsOfBlock + int(threadIdx.x) / 32 * kColumns +
                         lane_index() % kColumns;
  const bool exists = column < call.value_dim;
  const int64_t b = call.cu_seqlens == nullptr ? sequence : 0;
  const int64_t first = call.cu_seqlens == nullptr ? 0 : call.cu_seqlens[sequence];
  const int64_t end = call.cu_seqlens == nullptr ? call.length : call.cu_seqlens[sequence + 1];

  const T* const q = static_cast<const T*>(call.q.data) + b * call.q.stride[0] + hk * call.q.stride[2];
  const T* const k = static_cast<const T*>(call.k.data) + b * call.k.stride[0] + hk * call.k.stride[2];
  const T* const v = static_cast<const T*>(call.v.data) + b * call.v.stride[0] + h * call.v.stride[2];
  T* const o = static_cast<T*>(call.o.data) + (b * call.length * call.value_heads + h) * call.value_dim;

  const auto has = [&](int r) { return part + r * kParts < call.key_dim; };
  const int64_t corner = row * call.key_dim * call.value_dim + part * call.value_dim + column;
  float state[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool given = call.initial_state.data != nullptr && exists && has(r);
    state[r] = given ? static_cast<const float*>(call.initial_state.data)[corner + r * kParts * call.value_dim] : 0.0f;
  }

  for (int64_t t = first; t < end; ++t) {
    const float decay = expf(load_scalar(call.g, b * call.g.stride[0] + t * call.g.stride[1] + h * call.g.stride[2]));
    const float beta =
        load_scalar(call.beta, b * call.beta.stride[0] + t * call.beta.stride[1] + h * call.beta.stride[2]);
    float key[kRows], known = 0.0f, squares = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      key[r] = has(r) ? to_float(k[t * call.k.stride[1] + part + r * kParts]) : 0.0f;
      state[r] *= decay;
      known = fmaf(state[r], key[r], known);
      squares = fmaf(key[r], key[r], squares);
    }
    const float scale_k = call.l2norm ? 1.0f / sqrtf(sum_over_parts<kParts>(squares) + 1e-6f) : 1.0f;
    const float value = exists ? to_float(v[t * call.v.stride[1] + column]) : 0.0f;
    const float delta = beta * (value - scale_k * sum_over_parts<kParts>(known)) * scale_k;

    float out = 0.0f;
    squares = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float query = has(r) ? to_float(q[t * call.q.stride[1] + part + r * kParts]) : 0.0f;
      state[r] = fmaf(key[r], delta, state[r]);
      out = fmaf(state[r], query, out);
      squares = fmaf(query, query, squares);
    }
    const float scale_q = call.l2norm ? 1.0f / sqrtf(sum_over_parts<kParts>(squares) + 1e-6f) : 1.0f;
    out = sum_over_parts<kParts>(out) * scale_q * call.scale;
    if (exists && part == 0) o[t * call.value_heads * call.value_dim + column] = from_float<T>(out);
  }

  if (call.final_state.data == nullptr || !exists) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (has(r)) static_cast<float*>(call.final_state.data)[corner + r * kParts * call.value_dim] = state[r];
  }
}

template <class T, int kParts, int kRows>
const char* launch_rows(const GatedDeltaRule& call, void* stream) {
  constexpr int kColumnsOfBlock = kStepThreads / kParts;
  const int64_t blocks = call.sequences * call.value_heads * ((call.value_dim + kColumnsOfBlock - 1) / kColumnsOfBlock);
  if (blocks > 0x7fffffff) return "gated_delta_step: sequences * heads is too large for one launch";
  return ANIMA_LAUNCH((gated_delta_step_kernel<T, kParts, kRows>), dim3(unsigned(blocks)), dim3(kStepThreads), 0,
                      stream, call);
}

template <class T>
const char* launch_type(const GatedDeltaRule& call, void* stream) {
  if (call.key_dim <= 64) return launch_rows<T, 4, 16>(call, stream);
  if (call.key_dim <= 128) return launch_rows<T, 4, 32>(call, stream);
  return launch_rows<T, 8, 32>(call, stream);
}

}  // namespace

int64_t gated_delta_step_workspace(const GatedDeltaRule&) { return 0; }

const char* gated_delta_step(const GatedDeltaRule& call, void*, void* stream) {
  if (call.sequences == 0) return nullptr;
  switch (call.q.dtype) {
    case DType::kFloat32: return launch_type<float>(call, stream);
    case DType::kFloat16: return launch_type<__half>(call, stream);
    default: return launch_type<__nv_bfloat16>(call, stream);
  }
}

}  // namespace cuda
}  // namespace anima
