// A correct kernel for each kind of thing simt.h provides; test_harness.py compares the results with torch's.
#include "cuda/launch.cuh"

// Row sums and running sums of [rows, 32 * warps]: shuffles, static and dynamic shared memory, templates.
template <int kWarps>
__global__ void sums_kernel(const float* in, float* total, float* running) {
  __shared__ float ends[kWarps];
  ANIMA_SHARED(float, row);
  const int i = threadIdx.x, lane = i % 32, warp = i / 32, width = blockDim.x;
  row[i] = in[blockIdx.x * width + i];
  float sum = row[i];
  for (int step = 1; step < 32; step *= 2) {
    const float before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == 31) ends[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += ends[w];
  running[blockIdx.x * width + i] = sum;

  float x = row[i];
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  __syncthreads();  // ends is still being read
  if (lane == 0) ends[warp] = x;
  __syncthreads();
  if (i < 32) {
    float y = i < kWarps ? ends[i] : 0.0f;
    for (int step = 16; step; step /= 2) y += __shfl_down_sync(~0u, y, step);
    if (i == 0) total[blockIdx.x] = y;
  }
}
extern "C" const char* sums(const float* in, float* total, float* running, int rows) {
  return ANIMA_LAUNCH((sums_kernel<4>), rows, 128, 128 * sizeof(float), nullptr, in, total, running);
}

template <class Half, Half (*narrow)(float), float (*widen)(Half)>
__global__ void convert_kernel(const float* in, Half* narrowed, float* back, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    narrowed[i] = narrow(in[i]);
    back[i] = widen(narrowed[i]);
  }
}
extern "C" const char* to_half(const float* in, __half* narrowed, float* back, int n) {
  return ANIMA_LAUNCH((convert_kernel<__half, __float2half_rn, __half2float>), 3, 64, 0, nullptr, in, narrowed, back,
                      n);
}
extern "C" const char* to_bfloat16(const float* in, __nv_bfloat16* narrowed, float* back, int n) {
  return ANIMA_LAUNCH((convert_kernel<__nv_bfloat16, __float2bfloat16_rn, __bfloat162float>), 3, 64, 0, nullptr, in,
                      narrowed, back, n);
}

// out = 2 in, in vectors, with a tail of single elements; the grid is two-dimensional and the block three-.
__global__ void vectors_kernel(const float* in, float* out, int n) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * blockIdx.y, step = blockDim.x * blockDim.y * blockDim.z;
  const int i = 4 * (block * step + thread);
  if (i + 4 <= n) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(in + i));
    *reinterpret_cast<float4*>(out + i) = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
  } else {
    for (int j = i; j < n; ++j) out[j] = 2 * in[j];
  }
}
extern "C" const char* vectors(const float* in, float* out, int n) {
  return ANIMA_LAUNCH(vectors_kernel, dim3(2, 2), dim3(4, 3, 2), 0, nullptr, in, out, n);
}

// Which lanes of each warp hold a positive number; a last warp that is not full takes part with the lanes it has.
__global__ void votes_kernel(const float* in, unsigned* ballots, int* any_all) {
  const int i = threadIdx.x;
  const bool positive = in[i] > 0.0f;
  const unsigned ballot = __ballot_sync(~0u, positive);
  const int any = __any_sync(~0u, positive), all = __all_sync(~0u, positive);
  if (i % 32 == 0) {
    ballots[i / 32] = ballot;
    any_all[i / 32] = 2 * all + any;
  }
}
extern "C" const char* votes(const float* in, unsigned* ballots, int* any_all) {
  return ANIMA_LAUNCH(votes_kernel, 1, 70, 0, nullptr, in, ballots, any_all);
}

// Two lanes of one half-warp exchange under a mask, and an exchange of registers of the whole warp.
__global__ void exchange_kernel(const float* in, float* pairs, float* sums) {
  const int i = threadIdx.x;
  if (i < 16) pairs[i] = __shfl_xor_sync(0xffffu, in[i], 1);
  else pairs[i] = __shfl_sync(0xffff0000u, in[i], 3, 8);
  struct Registers {
    float a[2];
  } mine = {{in[i], 2.0f * in[i]}};
  const auto all = simt::warp_exchange(mine);
  float sum = 0.0f;
  for (int lane = 0; lane < 32; ++lane) sum += all.lane[lane].a[lane % 2];
  sums[i] = sum;
}
extern "C" const char* exchange(const float* in, float* pairs, float* sums) {
  return ANIMA_LAUNCH(exchange_kernel, 1, 32, 0, nullptr, in, pairs, sums);
}
