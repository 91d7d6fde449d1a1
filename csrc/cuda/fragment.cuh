// Matrix products of tiles in shared memory, by one warp, into fp32 accumulators in registers.
//
//   multiply<T, kTerms>(sum, a, b, row, column, depth):  sum[m][n] += A[row + 16 m.., :depth] B[:depth, column + 8 n..]
//
// The accumulator of a 16 x 8 tile is four numbers a lane, at (accumulator_row(e), accumulator_column(e)), whatever
// computes it. Operands are described by where they lie (Tile, ScaledTile); what multiplies is decided here:
//
// - both operands of the 16-bit type T: tensor cores, exact products (m16n8k16; m16n8k8 for fp16 on sm_75).
// - bf16 against fp32 (the state, decayed scores): the fp32 operand is split into kTerms bf16 numbers, 8 bits each.
//   kTerms 2 (16 bits) is for what ends in a bf16 output, kTerms 3 (24 bits) for what ends in the fp32 state, which is
//   returned and must be as good as fp32 arithmetic on the rounded inputs.
// - everything else (fp32; fp16 against fp32, whose range fp16 terms would not hold) is fp32 arithmetic:
//     - three-term TF32 where tensor cores are fast at it: with a = a0 + a1, both TF32, a b = a0 b0 + a0 b1 + a1 b0 up
//       to 2^-23. fp16 is exact in TF32, so there it is two terms.
//     - FFMA elsewhere. Data-sheet rates, dense, of TF32 and of FFMA: A100 156 and 19.5 TFLOP/s, H100 494 and 67, but
//       RTX 3090 35.6 and 35.6, RTX 4090 82.6 and 82.6, RTX 5090 105 and 105: three TF32 products take three times as
//       long there as one FFMA. sm_75 has no TF32.
//
// Tensor cores add with truncation, which over a long depth would cost several fp32 roundings in one direction. So
// every depth step starts from zero, smallest terms first, and is added to the accumulator by an ordinary fp32 add.
// FFMA does the same every 16, which shortens its chains of roundings.
#pragma once
#include "launch.cuh"

namespace anima {
namespace cuda {

#if defined(__CUDA_ARCH__)
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 0;  // nvcc's host pass
#endif
constexpr bool kTf32IsFast = kArch == 800 || kArch == 900 || kArch == 1000;

struct Tf32;

template <class T>
struct Is16Bit {
  static constexpr bool value = sizeof(T) == 2;
};

__device__ __forceinline__ int lane_index() { return int(threadIdx.x & 31u); }
__device__ __forceinline__ int accumulator_row(int element) { return lane_index() / 4 + 8 * (element >> 1); }
__device__ __forceinline__ int accumulator_column(int element) { return 2 * (lane_index() % 4) + (element & 1); }

__device__ __forceinline__ uint32_t bits_of(__half x) { return __half_as_ushort(x); }
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// --- Operands. "outer" is the row of A or the column of B; k is the dimension that is summed.

// (outer, k) is at data[outer * stride + k], or at data[k * stride + outer] if not kAlongK.
// kAlongK: data and rows are aligned to four elements.
template <class T, bool kAlongK>
struct Tile {
  const T* data;
  int stride;
  static constexpr bool kExact = Is16Bit<T>::value;

  __device__ __forceinline__ const T& at(int outer, int k) const {
    return kAlongK ? data[outer * stride + k] : data[k * stride + outer];
  }
  __device__ __forceinline__ float value(int outer, int k) const { return to_float(at(outer, k)); }
  // (outer, k) and (outer, k + 1), k even
  __device__ __forceinline__ uint32_t pair(int outer, int k) const {
    if (kAlongK) return *reinterpret_cast<const uint32_t*>(&at(outer, k));
    return bits_of(at(outer, k)) | bits_of(at(outer, k + 1)) << 16;
  }
  // (outer, k .. k + 3), k a multiple of 4
  __device__ __forceinline__ void four(int outer, int k, float (&values)[4]) const {
    if constexpr (kAlongK && !kExact) {
      const float4 v = *reinterpret_cast<const float4*>(&at(outer, k));
      values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = value(outer, k + i);
    }
  }
};

// (outer, k) is data[k * stride + outer] * scale[k]
template <class T>
struct ScaledTile {
  const T* data;
  const float* scale;
  int stride;
  static constexpr bool kExact = false;

  __device__ __forceinline__ float value(int outer, int k) const {
    return to_float(data[k * stride + outer]) * scale[k];
  }
  __device__ __forceinline__ uint32_t pair(int, int) const { return 0; }  // only of exact operands
  __device__ __forceinline__ void four(int outer, int k, float (&values)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = value(outer, k + i);
  }
};

// --- mma.sync: registers, with the lane's group g = lane / 4 and t = lane % 4. `kPacked` numbers a register.
//   A register r: row g + 8 (r & 1), k from kPacked (t + 4 (r >> 1));  B register r: k from kPacked (t + 4 r), column g

template <class Scalar>
struct Shape {  // __half, __nv_bfloat16
  static constexpr int kPacked = 2, kDepth = kArch == 750 ? 8 : 16, kA = kDepth / 4, kB = kDepth / 8;
};
template <>
struct Shape<Tf32> {
  static constexpr int kPacked = 1, kDepth = 8, kA = 4, kB = 2;
};

#if defined(__CUDACC__)
__device__ __forceinline__ float round_to_tf32(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  return x;
#endif
}

#define ANIMA_MMA_4_2(shape_and_types)                                                                                \
  asm("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                       \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class Scalar>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[Shape<Scalar>::kA],
                                    const uint32_t (&b)[Shape<Scalar>::kB]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same<Scalar, Tf32>::value) {
    ANIMA_MMA_4_2("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same<Scalar, __half>::value) {
    ANIMA_MMA_4_2("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    ANIMA_MMA_4_2("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
#elif defined(__CUDA_ARCH__)
  static_assert(std::is_same<Scalar, __half>::value, "sm_75 multiplies fp16 only");
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#endif
}
#undef ANIMA_MMA_4_2
#else
inline float round_to_tf32(float x) {  // to nearest, ties away from zero
  return std::isfinite(x) ? __uint_as_float((__float_as_uint(x) + 0x1000u) & ~0x1fffu) : x;
}

template <class Scalar>
float unpack(uint32_t packed, int index) {
  if constexpr (std::is_same<Scalar, Tf32>::value) {
    return __uint_as_float(packed & ~0x1fffu);
  } else if constexpr (std::is_same<Scalar, __half>::value) {
    return __half2float(__ushort_as_half(uint16_t(packed >> 16 * index)));
  } else {
    return __bfloat162float(__ushort_as_bfloat16(uint16_t(packed >> 16 * index)));
  }
}

// The sum is exact up to double precision, then truncated to fp32.
template <class Scalar>
SIMT_UNCHECKED void mma(float (&d)[4], const uint32_t (&a)[Shape<Scalar>::kA],
                        const uint32_t (&b)[Shape<Scalar>::kB]) {
  using S = Shape<Scalar>;
  struct Registers {
    uint32_t a[S::kA], b[S::kB];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const simt::Warp<Registers> warp = simt::warp_exchange(mine);
  for (int e = 0; e < 4; ++e) {
    const int row = accumulator_row(e), column = accumulator_column(e);
    double sum = d[e];
    for (int k = 0; k < S::kDepth; ++k) {
      const int part = k / S::kPacked, index = k % S::kPacked;
      const uint32_t from_a = warp.lane[row % 8 * 4 + part % 4].a[row / 8 + 2 * (part / 4)];
      const uint32_t from_b = warp.lane[column * 4 + part % 4].b[part / 4];
      sum += double(unpack<Scalar>(from_a, index)) * double(unpack<Scalar>(from_b, index));
    }
    const float nearest = float(sum);
    d[e] = std::abs(double(nearest)) > std::abs(sum) && std::isfinite(sum) ? std::nextafter(nearest, 0.0f) : nearest;
  }
}
#endif

// One register of an operand at (outer, k), once for each of its terms.
template <class Scalar, int kTerms, class Operand>
__device__ __forceinline__ void load_register(const Operand& operand, int outer, int k, uint32_t (&terms)[kTerms]) {
  if constexpr (std::is_same<Scalar, Tf32>::value) {
    float rest = operand.value(outer, k);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      const float term = Operand::kExact ? rest : round_to_tf32(rest);
      terms[i] = __float_as_uint(term);
      rest -= term;
    }
  } else if constexpr (Operand::kExact) {
    terms[0] = operand.pair(outer, k);
  } else {
    float rest[2] = {operand.value(outer, k), operand.value(outer, k + 1)};
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      const Scalar low = from_float<Scalar>(rest[0]), high = from_float<Scalar>(rest[1]);
      terms[i] = bits_of(low) | bits_of(high) << 16;
      rest[0] -= to_float(low);
      rest[1] -= to_float(high);
    }
  }
}

template <class Scalar, int kTermsA, int kTermsB, int kM, int kN, class A, class B>
__device__ __forceinline__ void multiply_on_tensor_cores(float (&sum)[kM][kN][4], const A& a, const B& b, int row,
                                                         int column, int depth) {
  using S = Shape<Scalar>;
  constexpr int kTerms = kTermsA > kTermsB ? kTermsA : kTermsB;
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
  for (int k = 0; k < depth; k += S::kDepth) {
    uint32_t of_a[kM][kTermsA][S::kA], of_b[kN][kTermsB][S::kB];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < S::kA; ++r) {
        uint32_t terms[kTermsA];
        load_register<Scalar>(a, row + 16 * m + g + 8 * (r & 1), k + S::kPacked * (t + 4 * (r >> 1)), terms);
#pragma unroll
        for (int i = 0; i < kTermsA; ++i) of_a[m][i][r] = terms[i];
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int r = 0; r < S::kB; ++r) {
        uint32_t terms[kTermsB];
        load_register<Scalar>(b, column + 8 * n + g, k + S::kPacked * (t + 4 * r), terms);
#pragma unroll
        for (int i = 0; i < kTermsB; ++i) of_b[n][i][r] = terms[i];
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        float step[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int order = kTerms - 1; order >= 0; --order) {
#pragma unroll
          for (int i = 0; i < kTermsA; ++i) {
            if (order - i >= 0 && order - i < kTermsB) mma<Scalar>(step, of_a[m][i], of_b[n][order - i]);
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][n][e] += step[e];
      }
    }
  }
}

template <int kM, int kN, class A, class B>
__device__ __forceinline__ void multiply_in_fp32(float (&sum)[kM][kN][4], const A& a, const B& b, int row, int column,
                                                 int depth) {
#pragma unroll 1
  for (int first = 0; first < depth; first += 16) {
    float step[kM][kN][4] = {};
#pragma unroll 1
    for (int k = first; k < first + 16; k += 4) {
      float of_a[kM][2][4], of_b[kN][2][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) a.four(row + 16 * m + accumulator_row(2 * i), k, of_a[m][i]);
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) b.four(column + 8 * n + accumulator_column(i), k, of_b[n][i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) step[m][n][e] = fmaf(of_a[m][e >> 1][i], of_b[n][e & 1][i], step[m][n][e]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][n][e] += step[m][n][e];
      }
    }
  }
}

// `depth` is a multiple of 16. T is the kernel's input type; the operands are of it or fp32.
template <class T, int kTerms, int kM, int kN, class A, class B>
__device__ __forceinline__ void multiply(float (&sum)[kM][kN][4], const A& a, const B& b, int row, int column,
                                         int depth) {
  constexpr bool kBf16 = std::is_same<T, __nv_bfloat16>::value;
  constexpr bool kOn16Bit = Is16Bit<T>::value && (kBf16 ? kArch >= 800 : A::kExact && B::kExact);
  if constexpr (kOn16Bit) {
    multiply_on_tensor_cores<T, A::kExact ? 1 : kTerms, B::kExact ? 1 : kTerms>(sum, a, b, row, column, depth);
  } else if constexpr (kTf32IsFast) {
    multiply_on_tensor_cores<Tf32, A::kExact ? 1 : 2, B::kExact ? 1 : 2>(sum, a, b, row, column, depth);
  } else {
    multiply_in_fp32(sum, a, b, row, column, depth);
  }
}

}  // namespace cuda
}  // namespace anima
