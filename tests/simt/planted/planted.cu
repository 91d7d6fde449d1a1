// Kernels with one bug each, behind a switch: the harness must accept them without it and name it with it.
#include "cuda/launch.cuh"

// out[i] = in[n - 1 - i] through shared memory
__global__ void missing_barrier_kernel(const float* in, float* out, bool bug) {
  __shared__ float tile[64];
  const int i = threadIdx.x;
  tile[i] = in[i];
  if (!bug) __syncthreads();
  out[i] = tile[63 - i];
}
extern "C" const char* missing_barrier(const float* in, float* out, int bug) {
  return ANIMA_LAUNCH(missing_barrier_kernel, 1, 64, 0, nullptr, in, out, bug);
}

// The same within warps.
__global__ void missing_syncwarp_kernel(const float* in, float* out, bool bug) {
  ANIMA_SHARED(float, tile);
  const int i = threadIdx.x;
  tile[i] = in[i];
  if (bug) __shfl_sync(~0u, 0, 0);  // waits for the lanes, but orders no memory
  else __syncwarp();
  out[i] = tile[i ^ 31];
}
extern "C" const char* missing_syncwarp(const float* in, float* out, int bug) {
  return ANIMA_LAUNCH(missing_syncwarp_kernel, 1, 64, 64 * sizeof(float), nullptr, in, out, bug);
}
