// One token of Mamba2's recurrence, for decoding; the call is described in ../common/scans.h.
//
// A warp owns one row p of one head's state and its lanes the columns n, so that the state moves in whole lines. It is
// read and written once: that is the floor, 2 N P elements a head and row (mamba2-2.7b, 80 heads of 64 x 128 in fp32:
// 5.2 MB a layer and row, 5.2 us on an RTX 4090, 1.6 us on an H100 by data-sheet bandwidth; not measured).
#include "scans.h"
#include "tile.cuh"

namespace anima {
namespace cuda {
namespace {

constexpr int kRowsOfBlock = 8;

template <class State, class T>
__global__ void __launch_bounds__(32 * kRowsOfBlock, 1) ssd_state_update_kernel(const SsdStateUpdate call) {
  const int slices = int((call.head_dim + kRowsOfBlock - 1) / kRowsOfBlock);
  const int64_t p = int64_t(blockIdx.x) % slices * kRowsOfBlock + threadIdx.x / 32;
  const int64_t row = blockIdx.x / slices;  // of [batch, heads]
  const int64_t h = row % call.heads, b = row / call.heads;
  const int64_t g = h / (call.heads / call.groups);
  if (p >= call.head_dim) return;

  T* const out = static_cast<T*>(call.out.data) + row * call.head_dim + p;
  const int64_t slot = call.state_indices == nullptr ? b : call.state_indices[b];
  if (slot < 0 || slot >= call.slots) {
    if (lane_index() == 0) *out = from_float<T>(0.0f);
    return;
  }
  const auto at = [&](const Tensor& tensor) {  // of [batch, heads, head_dim]
    return b * tensor.stride[0] + h * tensor.stride[1] + p * tensor.stride[2];
  };
  const auto at_head = [&](const Tensor& tensor) { return h * tensor.stride[0] + p * tensor.stride[1]; };

  float dt = load_scalar(call.dt, at(call.dt));
  if (call.dt_bias.data != nullptr) dt += load_scalar(call.dt_bias, at_head(call.dt_bias));
  if (call.dt_softplus) dt = softplus(dt);
  const float x = to_float(static_cast<const T*>(call.x.data)[at(call.x)]);

  State* const state = static_cast<State*>(call.state.data) + slot * call.state.stride[0] + h * call.state.stride[1] +
                       p * call.state.stride[2];
  const T* const B = static_cast<const T*>(call.B.data) + b * call.B.stride[0] + g * call.B.stride[1];
  const T* const C = static_cast<const T*>(call.C.data) + b * call.C.stride[0] + g * call.C.stride[1];
  const float* const A = static_cast<const float*>(call.A.data) + at_head(call.A);
  float sum = 0.0f;
#pragma unroll 4
  for (int n = lane_index(); n < int(call.state_dim); n += 32) {
    State& s = state[n * call.state.stride[3]];
    const float updated = expf(dt * A[n * call.A.stride[2]]) * to_float(s) + dt * x * to_float(B[n * call.B.stride[2]]);
    s = from_float<State>(updated);
    sum = fmaf(updated, to_float(C[n * call.C.stride[2]]), sum);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane_index() != 0) return;
  if (call.D.data != nullptr) sum += load_scalar(call.D, at_head(call.D)) * x;
  if (call.z.data != nullptr) sum *= silu(to_float(static_cast<const T*>(call.z.data)[at(call.z)]));
  *out = from_float<T>(sum);
}

template <class State, class T>
const char* launch_types(const SsdStateUpdate& call, void* stream) {
  const int64_t blocks = call.batch * call.heads * ((call.head_dim + kRowsOfBlock - 1) / kRowsOfBlock);
  if (blocks > 0x7fffffff) return "ssd_state_update: batch * heads is too large for one launch";
  return ANIMA_LAUNCH((ssd_state_update_kernel<State, T>), dim3(unsigned(blocks)), dim3(32 * kRowsOfBlock), 0, stream,
                      call);
}

template <class State>
const char* launch_state(const SsdStateUpdate& call, void* stream) {
  switch (call.x.dtype) {
    case DType::kFloat32: return launch_types<State, float>(call, stream);
    case DType::kFloat16: return launch_types<State, __half>(call, stream);
    default: return launch_types<State, __nv_bfloat16>(call, stream);
  }
}

}  // namespace

int64_t ssd_state_update_workspace(const SsdStateUpdate&) { return 0; }

const char* ssd_state_update(const SsdStateUpdate& call, void*, void* stream) {
  if (call.batch == 0) return nullptr;
  switch (call.state.dtype) {
    case DType::kFloat32: return launch_state<float>(call, stream);
    case DType::kFloat16: return launch_state<__half>(call, stream);
    default: return launch_state<__nv_bfloat16>(call, stream);
  }
}

}  // namespace cuda
}  // namespace anima
