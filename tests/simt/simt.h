// Executes CUDA kernels on the CPU, for tests: what csrc/cuda/launch.cuh includes when the compiler is not nvcc.
//
// The very sources of csrc/cuda are compiled by g++ against this header. Blocks run one after the other, each thread
// of a block as a fiber (simt.cpp). A launch stops at the first of these errors and returns it as its message:
//   - a barrier or a warp collective that not all threads reach, or that they reach at different places
//   - an access outside the registered buffers, the launch's shared memory or the thread's own variables; a write to a
//     read-only buffer; an index past a declared array; a misaligned vector; overflow of a signed integer
//   - a read of shared memory that nothing has written
//   - a race: two threads touch one place, one of them writes, and no __syncthreads (or, inside a warp, __syncwarp) is
//     between them; shuffles and mma do not order memory, so they do not count. Likewise two blocks of one launch
// The compiler's own instrumentation finds the accesses (-fsanitize=thread and undefined; simt.cpp defines the hooks),
// so kernels contain nothing of this. Modelled on sm_80 and later by default; -DSIMT_ARCH=750 for Turing.
//
// There is what the kernels use; add what they come to need. Not modelled: atomics and fences, asynchronous copies,
// constant memory (a constexpr array does), __syncwarp of a part of the warp, and time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/half.h"

#ifndef SIMT_ARCH
#define SIMT_ARCH 800
#endif
#define __CUDA_ARCH__ SIMT_ARCH

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

// For the emulation of an instruction: its own accesses are not the kernel's.
#define SIMT_UNCHECKED __attribute__((no_sanitize("thread", "undefined"), noinline))

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

// --- The machine (simt.cpp)

namespace simt {

// Constant for the thread that asks, so the compiler may ask once.
uint3 thread_index() __attribute__((const));
uint3 block_index() __attribute__((const));
dim3 block_dim() __attribute__((const));
dim3 grid_dim() __attribute__((const));
void* dynamic_shared() __attribute__((const));

// Waits for all lanes of `mask`; then each lane can read what the others brought, until its next collective.
void collective(unsigned mask, const void* mine, size_t bytes, const char* kind, const char* file, int line);
void read_lane(int lane, void* value, size_t bytes);
bool lane_exists(int lane);
void barrier(const char* kind, const char* file, int line);
const char* launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*thread)(const void*),
                   const void* call);

constexpr size_t kMaxExchange = 256;  // bytes a lane can bring to a collective

// Every lane's `mine`. The primitive for instructions in which a warp works together, such as mma:
// exchange the fragments, then compute this lane's part of the result from the lanes that hold its operands.
template <class T>
struct Warp {
  T lane[32];
};
template <class T>
SIMT_UNCHECKED Warp<T> warp_exchange(const T& mine, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= kMaxExchange && std::is_trivially_copyable<T>::value, "registers only");
  Warp<T> all;
  collective(~0u, &mine, sizeof(T), "warp exchange", file, line);
  for (int lane = 0; lane < 32; ++lane) read_lane(lane, &all.lane[lane], sizeof(T));
  return all;
}

template <class T>
SIMT_UNCHECKED T shuffle(unsigned mask, T mine, int source, const char* kind, const char* file, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "what __shfl_sync takes");
  collective(mask, &mine, sizeof(T), kind, file, line);
  T result;
  read_lane(source, &result, sizeof(T));
  return result;
}

SIMT_UNCHECKED inline unsigned ballot(unsigned mask, bool mine, const char* kind, const char* file, int line) {
  collective(mask, &mine, sizeof mine, kind, file, line);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    bool theirs = false;
    if ((mask >> lane & 1u) && lane_exists(lane)) read_lane(lane, &theirs, sizeof theirs);
    result |= unsigned(theirs) << lane;
  }
  return result;
}

inline int lane_index() {
  const uint3 t = thread_index();
  const dim3 d = block_dim();
  return int((t.x + d.x * (t.y + d.y * t.z)) & 31u);
}

// A launch's arguments, converted and copied as nvcc does; the copies a thread makes are its own.
template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;

  template <size_t... I>
  SIMT_UNCHECKED void run(std::index_sequence<I...>) const {
    kernel(std::get<I>(arguments)...);
  }
  SIMT_UNCHECKED static void thread(const void* self) {
    static_cast<const Call*>(self)->run(std::index_sequence_for<Parameters...>{});
  }
};

template <class... Parameters, class... Arguments>
const char* launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                   Arguments... arguments) {
  const Call<Parameters...> call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  return launch(name, grid, block, shared_bytes, &Call<Parameters...>::thread, &call);
}

}  // namespace simt

#define ANIMA_SHARED(type, name) type* name = static_cast<type*>(simt::dynamic_shared())
#define ANIMA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  simt::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

// --- Built-in variables and functions

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_dim())
#define gridDim (simt::grid_dim())

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { simt::barrier("__syncthreads", file, line); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) { simt::collective(mask, nullptr, 0, "__syncwarp", file, line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  const int lane = simt::lane_index();
  return simt::shuffle(mask, value, (lane & ~(width - 1)) + (source & (width - 1)), "__shfl_sync", file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_SITE) {
  const int lane = simt::lane_index(), source = lane ^ bits;
  // A source in a later segment gives the own value; an earlier one may be read.
  return simt::shuffle(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source, "__shfl_xor_sync", file,
                       line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int lane = simt::lane_index(), source = lane - int(delta);
  return simt::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, "__shfl_up_sync", file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int lane = simt::lane_index(), source = lane + int(delta);
  return simt::shuffle(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source, "__shfl_down_sync", file,
                       line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::ballot(mask, predicate != 0, "__ballot_sync", file, line);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::ballot(mask, predicate != 0, "__any_sync", file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::ballot(mask, predicate == 0, "__all_sync", file, line) == 0;
}

template <class T>
__forceinline__ T __ldg(const T* address) {
  return *address;
}

inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return anima::bits_from_float(x); }
inline float __uint_as_float(unsigned x) { return anima::float_from_bits(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// --- Vector types

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// --- Half types: storage and conversions; arithmetic is in fp32

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) : bits(anima::f16_from_float(x)) {}
  operator float() const { return anima::float_from_f16(bits); }
};
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) : bits(anima::bf16_from_float(x)) {}
  operator float() const { return anima::float_from_bf16(bits); }
};

inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return float(x); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 x;
  x.bits = bits;
  return x;
}
