// Kernels with one bug each behind a switch: test_harness.py wants them accepted without it and named with it.
// Without its bug each of them writes out[i] = in[n - 1 - i], n being 64 threads, in one block unless it says more.
#include "cuda/launch.cuh"

#define ENTRY(name, grid, shared_floats)                                                                      \
  extern "C" const char* name(const float* in, float* out, int bug) {                                         \
    return ANIMA_LAUNCH(name##_kernel, grid, 64, (shared_floats) * sizeof(float), nullptr, in, out, bug != 0); \
  }

__global__ void missing_barrier_kernel(const float* in, float* out, bool bug) {
  ANIMA_SHARED(float, tile);
  const int i = threadIdx.x;
  tile[i] = in[i];
  __syncthreads();
  out[i] = tile[63 - i];
  if (!bug) __syncthreads();
  tile[i] = 0.0f;  // what others may still have to read
}
ENTRY(missing_barrier, 1, 64)

__global__ void read_before_barrier_kernel(const float* in, float* out, bool bug) {
  __shared__ float tile[64];
  const int i = threadIdx.x;
  tile[i] = in[i];
  if (!bug) __syncthreads();
  out[i] = tile[63 - i];
}
ENTRY(read_before_barrier, 1, 0)

__global__ void missing_syncwarp_kernel(const float* in, float* out, bool bug) {
  ANIMA_SHARED(float, tile);
  const int i = threadIdx.x;
  tile[i] = in[63 - (i ^ 31)];
  if (bug) __shfl_sync(~0u, 0, 0);  // waits for the lanes, but orders no memory
  else __syncwarp();
  out[i] = tile[i ^ 31];
}
ENTRY(missing_syncwarp, 1, 64)

__global__ void divergent_barrier_kernel(const float* in, float* out, bool bug) {
  const int i = threadIdx.x;
  if (!bug || i < 32) __syncthreads();
  out[i] = in[63 - i];
}
ENTRY(divergent_barrier, 1, 0)

__global__ void two_barriers_kernel(const float* in, float* out, bool bug) {
  ANIMA_SHARED(float, tile);
  const int i = threadIdx.x;
  tile[i] = in[i];
  if (bug && i % 2) __syncthreads();
  else __syncthreads();
  out[i] = tile[63 - i];
}
ENTRY(two_barriers, 1, 64)

__global__ void early_return_kernel(const float* in, float* out, bool bug) {
  ANIMA_SHARED(float, tile);
  const int i = threadIdx.x;
  if (bug && i == 63) return;
  tile[i] = in[i];
  __syncthreads();
  out[i] = tile[63 - i];
}
ENTRY(early_return, 1, 64)

__global__ void divergent_shuffle_kernel(const float* in, float* out, bool bug) {
  const int i = threadIdx.x;
  float x = in[63 - (i ^ 31)];
  if (!bug || i % 32 < 31) x = __shfl_xor_sync(~0u, x, 31);
  out[i] = x;
}
ENTRY(divergent_shuffle, 1, 0)

__global__ void global_off_by_one_kernel(const float* in, float* out, bool bug) {
  const int i = threadIdx.x;
  out[i + bug] = in[63 - i];
}
ENTRY(global_off_by_one, 1, 0)

__global__ void global_before_start_kernel(const float* in, float* out, bool bug) {
  const int i = threadIdx.x;
  out[i] = in[63 - i - bug];
}
ENTRY(global_before_start, 1, 0)

__global__ void shared_off_by_one_kernel(const float* in, float* out, bool bug) {
  ANIMA_SHARED(float, tile);
  const int i = threadIdx.x;
  tile[i + bug] = in[63 - i];
  out[i] = tile[i + bug];
}
ENTRY(shared_off_by_one, 1, 64)

__global__ void static_off_by_one_kernel(const float* in, float* out, bool bug) {
  __shared__ float tile[2][64];
  const int i = threadIdx.x;
  tile[1][i + bug] = in[63 - i];
  out[i] = tile[1][i + bug];
}
ENTRY(static_off_by_one, 1, 0)

__global__ void register_off_by_one_kernel(const float* in, float* out, bool bug) {
  float own[4];
  const int i = threadIdx.x;
  for (int j = 0; j < 4 + bug; ++j) own[j] = in[63 - i];
  out[i] = own[i % 4];
}
ENTRY(register_off_by_one, 1, 0)

__global__ void uninitialised_shared_kernel(const float* in, float* out, bool bug) {
  ANIMA_SHARED(float, tile);
  const int i = threadIdx.x;
  if (!bug || i != 5) tile[i] = in[i];
  __syncthreads();
  out[i] = tile[63 - i];
}
ENTRY(uninitialised_shared, 1, 64)

__global__ void write_to_input_kernel(const float* in, float* out, bool bug) {
  const int i = threadIdx.x;
  if (bug) const_cast<float*>(in)[i] = 0.0f;
  out[i] = in[63 - i];
}
ENTRY(write_to_input, 1, 0)

__global__ void misaligned_vector_kernel(const float* in, float* out, bool bug) {
  const int i = threadIdx.x;
  if (i >= 15) {
    if (i == 15)
      for (int j = 60; j < 64; ++j) out[j] = in[63 - j];
    return;
  }
  const float4 v = *reinterpret_cast<const float4*>(in + 60 - 4 * i - bug);
  *reinterpret_cast<float4*>(out + 4 * i) = make_float4(v.w, v.z, v.y, v.x);
}
ENTRY(misaligned_vector, 1, 0)

// Blocks 0 and 1 have a half each.
__global__ void two_blocks_kernel(const float* in, float* out, bool bug) {
  const int i = threadIdx.x, first = bug ? 0 : 32 * blockIdx.x;
  if (i < 32) out[first + i] = in[63 - first - i];
}
ENTRY(two_blocks, 2, 0)

// One block reads what another writes.
__global__ void blocks_exchange_kernel(const float* in, float* out, bool bug) {
  const int i = threadIdx.x;
  if (blockIdx.x == 0) out[i] = in[63 - i];
  else if (bug && out[63 - i] == 0.0f) out[i] = 1.0f;
}
ENTRY(blocks_exchange, 2, 0)

__global__ void index_overflow_kernel(const float* in, float* out, bool bug) {
  const int i = threadIdx.x, huge = bug ? 2147483647 : 0;
  out[i] = in[63 - i] + (i + huge == -5 ? 1.0f : 0.0f);
}
ENTRY(index_overflow, 1, 0)

__global__ void too_much_shared_kernel(const float* in, float* out, bool) {
  ANIMA_SHARED(float, tile);
  tile[0] = 0.0f;
  out[threadIdx.x] = in[63 - threadIdx.x] + tile[0];
}
extern "C" const char* invalid_launch(const float* in, float* out, int bug) {
  if (!bug) return ANIMA_LAUNCH(global_off_by_one_kernel, 1, 64, 0, nullptr, in, out, false);
  return ANIMA_LAUNCH(too_much_shared_kernel, 1, 64, 200 << 10, nullptr, in, out, false);
}
