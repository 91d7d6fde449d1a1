// How kernels here are launched and get dynamic shared memory; the only place that knows a launch's syntax.
//
//   ANIMA_SHARED(float, tile);                      in a kernel: float* tile, as many bytes as the launch asks for
//   if (const char* error = ANIMA_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)) return error;
//   ANIMA_LAUNCH((kernel<64, float>), ...)          commas of a template need the parentheses
//
// g++ compiles the same files for the tests, against tests/simt/simt.h, which executes kernels on the CPU.
#pragma once

#if !defined(__CUDACC__)
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>

// One array of bytes under every name: templates would otherwise declare it with conflicting types.
#define ANIMA_SHARED(type, name)                                   \
  extern __shared__ __align__(16) unsigned char anima_shared_memory[]; \
  type* name = reinterpret_cast<type*>(anima_shared_memory)

#define ANIMA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::anima::cuda::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace anima {
namespace cuda {

template <class T>
struct Exactly {  // keeps an argument out of template deduction: it is converted to the parameter's type
  using type = T;
};

// Null, or why it was not launched. Errors of running kernels are the next call's: launches are asynchronous.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   typename Exactly<Parameters>::type... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)  // what is allowed without asking
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace anima
#endif
