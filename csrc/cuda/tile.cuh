// What the chunked scans share: blocks of 256 threads that walk chunks of 64 tokens, tiles on their way from global to
// shared memory, and the decays inside a chunk.
#pragma once
#include <cstring>

#include "../common/scan_math.h"
#include "../common/scans.h"
#include "fragment.cuh"

namespace anima {
namespace cuda {

// Kernels say __launch_bounds__(threads, 1): without the 1 ptxas would spill a few registers to fit another block.
constexpr int kThreads = 256;
constexpr int kChunk = 64;
constexpr int kBlock = 64;  // of the state dimension that is contracted (N, K): tiles are [kChunk, kBlock]

// Rows of shared tiles are padded so that the lanes of a fragment meet different banks: by 4 words where fragments
// run along the row, by 8 where they run across.
template <class T>
struct Pad {
  static constexpr int kAlong = 16 / int(sizeof(T)), kAcross = 8;
};
template <class T>
constexpr int kTileStride = kBlock + Pad<T>::kAlong;
constexpr int kScoreStride = kChunk + Pad<float>::kAlong;

__device__ __forceinline__ float load_scalar(const Tensor& tensor, int64_t offset) {
  switch (tensor.dtype) {
    case DType::kFloat32: return static_cast<const float*>(tensor.data)[offset];
    case DType::kFloat16: return to_float(static_cast<const __half*>(tensor.data)[offset]);
    default: return to_float(static_cast<const __nv_bfloat16*>(tensor.data)[offset]);
  }
}

// A thread's share of a [kChunk, kColumns] tile, in registers: loading the next tile while the present one is used
// hides the latency of global memory.
template <class T, int kColumns>
struct Fetch {
  static constexpr int kVector = 16 / int(sizeof(T)), kPerRow = kColumns / kVector;
  static constexpr int kVectors = kChunk * kPerRow, kShare = (kVectors + kThreads - 1) / kThreads;
  uint4 share[kShare];

  static_assert(kThreads % kPerRow == 0, "a thread has one column");
  __device__ __forceinline__ static bool has(int i) {
    return kVectors % kThreads == 0 || int(threadIdx.x) + i * kThreads < kVectors;
  }
  __device__ __forceinline__ static int row(int i) { return int(threadIdx.x / kPerRow) + i * (kThreads / kPerRow); }
  __device__ __forceinline__ static int column() { return int(threadIdx.x % kPerRow) * kVector; }

  // `rows` and `columns` are what exists; the rest is 0 and is not read. `vectors`: everything is 16-byte aligned.
  __device__ __forceinline__ void load(const T* source, int64_t stride, int rows, int columns, bool vectors) {
    const T* from = source + row(0) * stride + column();
#pragma unroll
    for (int i = 0; i < kShare; ++i, from += kThreads / kPerRow * stride) {
      share[i] = make_uint4(0, 0, 0, 0);
      if (!has(i) || row(i) >= rows) continue;
      if (vectors && column() + kVector <= columns) {
        share[i] = *reinterpret_cast<const uint4*>(from);
      } else {
        T values[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) values[j] = column() + j < columns ? from[j] : from_float<T>(0.0f);
        memcpy(&share[i], values, sizeof values);
      }
    }
  }

  __device__ __forceinline__ void store(T* tile, int stride) const {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if (has(i)) *reinterpret_cast<uint4*>(tile + row(i) * stride + column()) = share[i];
    }
  }

  __device__ __forceinline__ float value(int i, int j) const {
    T values[kVector];
    memcpy(values, &share[i], sizeof values);
    return to_float(values[j]);
  }
};

// The decays of a chunk, from l_t, the log decay of each token (0 past the chunk's end). cum_t = l_0 + ... + l_t is
// kept as a sum of two floats: differences of single floats would lose 1e-5 when slow and fast decays mix.
struct Decays {
  float cum[kChunk], rest[kChunk];
  float from_start[kChunk];  // exp(cum_t)
  float to_end[kChunk];      // exp(cum_last - cum_t), times what the kernel multiplies in

  // exp(l_{j+1} + ... + l_i), j <= i
  __device__ __forceinline__ float between(int i, int j) const {
    return expf((cum[i] - cum[j]) + (rest[i] - rest[j]));
  }

  // By one warp, whose lane has tokens 2 lane and 2 lane + 1. Below -1e4 the decay is 0 in any precision.
  __device__ __forceinline__ void set(double first, double second) {
    if (first < -1e4) first = -1e4;
    if (second < -1e4) second = -1e4;
    const int lane = lane_index();
    double sum = first + second;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double before = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += before;
    }
    const double last = __shfl_sync(~0u, sum, 31), before = __shfl_up_sync(~0u, sum, 1);
    const double both[2] = {(lane == 0 ? 0.0 : before) + first, sum};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      cum[2 * lane + i] = float(both[i]);
      rest[2 * lane + i] = float(both[i] - double(float(both[i])));
      from_start[2 * lane + i] = expf(float(both[i]));
      to_end[2 * lane + i] = expf(float(last - both[i]));
    }
  }
};

// Whether rows of this tensor can be read in vectors of 16 bytes. A dimension of size 1 has a stride that is not used.
inline bool in_vectors(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  const int64_t size = tensor.dtype == DType::kFloat32 ? 4 : 2;
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
  int i = 0;
  for (const int64_t n : sizes) aligned &= n <= 1 || tensor.stride[i] * size % 16 == 0, ++i;
  return aligned;
}

}  // namespace cuda
}  // namespace anima
