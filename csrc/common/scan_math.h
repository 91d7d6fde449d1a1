// Scalar functions that the recurrent ops share on every device.
#pragma once
#include <math.h>

#if defined(__CUDACC__)
#define ANIMA_HD __host__ __device__ __forceinline__
#else
#define ANIMA_HD static inline
#endif

namespace anima {

// log(1 + e^x); x itself above 20, where they agree to fp32 (mamba-ssm and torch use the same threshold).
ANIMA_HD float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// x / (1 + e^-x)
ANIMA_HD float silu(float x) { return x / (1.0f + expf(-x)); }

// min(max(x, low), high); NaN stays.
ANIMA_HD float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

}  // namespace anima
