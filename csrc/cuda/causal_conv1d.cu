// Depthwise causal convolution and its update for decoding; the calls are described in ../common/scans.h.
//
// Both are bound by memory: x is read and out written once (the width's other reads of x hit L1). At C 8192, T 1024 in
// fp32 that is 67 MB: 67 us on an RTX 4090, 20 us on an H100 by data-sheet bandwidth; not measured. A block has a tile
// of 32 x 32 outputs whose fast dimension is the one that is contiguous in x, tokens or channels, so either layout is
// read in whole lines.
#include "scans.h"
#include "tile.cuh"

namespace anima {
namespace cuda {
namespace {

constexpr int kSide = 32, kRowsAtOnce = 8;

template <class T>
__device__ __forceinline__ T& element(const Tensor& tensor, int64_t b, int64_t c, int64_t t) {
  return static_cast<T*>(tensor.data)[b * tensor.stride[0] + c * tensor.stride[1] + t * tensor.stride[2]];
}

template <class T>
__global__ void __launch_bounds__(kSide * kRowsAtOnce, 1)
    causal_conv1d_kernel(const CausalConv1d call, const bool along_c) {
  // Also the last W - 1 inputs, as tokens past the end, so that one launch writes all.
  const int history = int(call.width) - 1;
  const int64_t tokens = call.length + (call.final_states.data == nullptr ? 0 : history);
  const int64_t fast_size = along_c ? call.channels : tokens, slow_size = along_c ? tokens : call.channels;
  const int64_t fast_tiles = (fast_size + kSide - 1) / kSide, slow_tiles = (slow_size + kSide - 1) / kSide;
  const int64_t tile = blockIdx.x;
  const int64_t b = tile / (fast_tiles * slow_tiles);
  const int64_t fast = tile % fast_tiles * kSide + int(threadIdx.x) % kSide;
  const int64_t slow_tile = tile / fast_tiles % slow_tiles;
  const int32_t* const seq_idx = call.seq_idx == nullptr ? nullptr : call.seq_idx + b * call.length;

  for (int i = int(threadIdx.x) / kSide; i < kSide; i += kRowsAtOnce) {
    const int64_t slow = slow_tile * kSide + i;
    if (fast >= fast_size || slow >= slow_size) continue;
    const int64_t c = along_c ? fast : slow, t = along_c ? slow : fast;
    const auto input = [&](int64_t source) {  // x, or the tokens before it
      if (source >= 0) return element<const T>(call.x, b, c, source);
      if (call.initial_states.data == nullptr) return from_float<T>(0.0f);
      return element<const T>(call.initial_states, b, c, source + history);
    };
    if (t >= call.length) {
      element<T>(call.final_states, b, c, t - call.length) = input(t - history);
      continue;
    }
    float sum = call.bias.data == nullptr ? 0.0f : load_scalar(call.bias, c * call.bias.stride[0]);
    const int sequence = seq_idx == nullptr ? 0 : seq_idx[t];
    for (int j = 0; j <= history; ++j) {
      const int64_t source = t - history + j;
      if (seq_idx != nullptr && source >= 0 && seq_idx[source] != sequence) continue;
      const float weight = load_scalar(call.weight, c * call.weight.stride[0] + j * call.weight.stride[1]);
      sum = fmaf(weight, to_float(input(source)), sum);
    }
    if (call.silu) sum = silu(sum);
    element<T>(call.out, b, c, t) = from_float<T>(sequence < 0 ? 0.0f : sum);
  }
}

// A thread has all of one channel of one row, so it can update the state in place once its outputs are written.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) causal_conv1d_update_kernel(const CausalConv1dUpdate call) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= call.batch * call.channels) return;
  const int64_t c = index % call.channels, b = index / call.channels;
  const int64_t slot = call.state_indices == nullptr ? b : call.state_indices[b];
  const bool known = slot >= 0 && slot < call.slots;
  const int history = int(call.width) - 1;
  const int64_t size = call.state_length;
  const int64_t start = call.cache_seqlens == nullptr ? 0 : call.cache_seqlens[b];
  const auto position = [&](int64_t t) { return ((start + t) % size + size) % size; };  // in the ring

  for (int64_t t = 0; t < call.length; ++t) {
    float sum = call.bias.data == nullptr ? 0.0f : load_scalar(call.bias, c * call.bias.stride[0]);
    for (int j = 0; known && j <= history; ++j) {
      const int64_t source = t - history + j;
      const T value = source >= 0                    ? element<const T>(call.x, b, c, source)
                      : call.cache_seqlens == nullptr ? element<const T>(call.conv_state, slot, c, size + source)
                                                      : element<const T>(call.conv_state, slot, c, position(source));
      sum = fmaf(load_scalar(call.weight, c * call.weight.stride[0] + j * call.weight.stride[1]), to_float(value), sum);
    }
    if (call.silu) sum = silu(sum);
    element<T>(call.out, b, c, t) = from_float<T>(known ? sum : 0.0f);
  }
  if (!known) return;
  if (call.cache_seqlens != nullptr) {
    for (int64_t t = 0; t < call.length; ++t) {
      element<T>(call.conv_state, slot, c, position(t)) = element<const T>(call.x, b, c, t);
    }
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    const int64_t from = i + call.length;
    element<T>(call.conv_state, slot, c, i) =
        from < size ? element<const T>(call.conv_state, slot, c, from) : element<const T>(call.x, b, c, from - size);
  }
}

template <class T>
const char* launch_conv(const CausalConv1d& call, void* stream) {
  const bool along_c = call.x.stride[1] < call.x.stride[2];
  const int64_t tokens = call.length + (call.final_states.data == nullptr ? 0 : call.width - 1);
  const int64_t blocks = call.batch * ((call.channels + kSide - 1) / kSide) * ((tokens + kSide - 1) / kSide);
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "causal_conv1d: batch * channels * length is too large for one launch";
  return ANIMA_LAUNCH((causal_conv1d_kernel<T>), dim3(unsigned(blocks)), dim3(kSide * kRowsAtOnce), 0, stream, call,
                      along_c);
}

template <class T>
const char* launch_update(const CausalConv1dUpdate& call, void* stream) {
  const int64_t blocks = (call.batch * call.channels + kThreads - 1) / kThreads;
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "causal_conv1d_update: batch * channels is too large for one launch";
  return ANIMA_LAUNCH((causal_conv1d_update_kernel<T>), dim3(unsigned(blocks)), dim3(kThreads), 0, stream, call);
}

}  // namespace

int64_t causal_conv1d_workspace(const CausalConv1d&) { return 0; }
int64_t causal_conv1d_update_workspace(const CausalConv1dUpdate&) { return 0; }

const char* causal_conv1d(const CausalConv1d& call, void*, void* stream) {
  switch (call.x.dtype) {
    case DType::kFloat32: return launch_conv<float>(call, stream);
    case DType::kFloat16: return launch_conv<__half>(call, stream);
    default: return launch_conv<__nv_bfloat16>(call, stream);
  }
}

const char* causal_conv1d_update(const CausalConv1dUpdate& call, void*, void* stream) {
  switch (call.x.dtype) {
    case DType::kFloat32: return launch_update<float>(call, stream);
    case DType::kFloat16: return launch_update<__half>(call, stream);
    default: return launch_update<__nv_bfloat16>(call, stream);
  }
}

}  // namespace cuda
}  // namespace anima
