// One vector type of fp32 lanes for the instruction set this file is compiled for.
//
// Included by kernel files that are compiled once per instruction set (…_avx512.cpp, …_avx2.cpp,
// …_portable.cpp), each in a namespace of its own, ANIMA_ISA: two versions of one inline function must never
// meet in the linker, or an old machine would run the new machine's. For that reason nothing here, and nothing
// in those kernel files, uses a function template of the standard library.
#pragma once
#include <cstdint>

#include "../common/half.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(_MSC_VER)
#define ANIMA_INLINE __forceinline
#define ANIMA_UNROLL
#else
#define ANIMA_INLINE inline __attribute__((always_inline))
#define ANIMA_UNROLL _Pragma("GCC unroll 16")
#endif

namespace anima {
namespace ANIMA_ISA {

// stream(p, a) stores past the caches, for results that nobody reads soon: without it, memory is read before it is
// overwritten. p is aligned to the vector. end_streams() comes before other threads may read them.

#if defined(__AVX512F__)

constexpr int kWidth = 16;
constexpr int kColumns = 4;  // vectors side by side in a register tile: 6 x 4 sums in 32 registers

struct Vec {
  __m512 x;
};
static ANIMA_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static ANIMA_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }
static ANIMA_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.x); }
static ANIMA_INLINE void end_streams() { _mm_sfence(); }
static ANIMA_INLINE Vec set1(float a) { return {_mm512_set1_ps(a)}; }
static ANIMA_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
static ANIMA_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
static ANIMA_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
static ANIMA_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
static ANIMA_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
// The larger; `a` where either is NaN, so max(running, next) ignores NaN: it reaches the result through exp.
static ANIMA_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(b.x, a.x)}; }
static ANIMA_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x · 2^n for whole n in [-126, 0].
static ANIMA_INLINE Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.x, n.x)}; }
// a where x >= limit or x is NaN, else 0.
static ANIMA_INLINE Vec zero_below(Vec a, Vec x, Vec limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.x, limit.x, _CMP_NLT_UQ), a.x)};
}
static ANIMA_INLINE Vec load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
static ANIMA_INLINE Vec load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static ANIMA_INLINE void store_f16(uint16_t* p, Vec a) {
  const __m256i half = _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
static ANIMA_INLINE void store_bf16(uint16_t* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i out = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  out = _mm512_mask_or_epi32(out, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16)));
}

// Rows become columns: 16 vectors of 16.
static ANIMA_INLINE void transpose(Vec* r) {
  __m512 t[16];
  ANIMA_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].x, r[i + 1].x);
    t[i + 1] = _mm512_unpackhi_ps(r[i].x, r[i + 1].x);
  }
  __m512 u[16];
  ANIMA_UNROLL
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  ANIMA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 low = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), low2 = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd), high2 = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    r[i].x = _mm512_shuffle_f32x4(low, low2, 0x88);
    r[i + 4].x = _mm512_shuffle_f32x4(high, high2, 0x88);
    r[i + 8].x = _mm512_shuffle_f32x4(low, low2, 0xdd);
    r[i + 12].x = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
}

#elif defined(__AVX2__)

constexpr int kWidth = 8;
constexpr int kColumns = 2;  // 6 x 2 sums, 2 columns and a broadcast in 16 registers

struct Vec {
  __m256 x;
};
static ANIMA_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
static ANIMA_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.x); }
static ANIMA_INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.x); }
static ANIMA_INLINE void end_streams() { _mm_sfence(); }
static ANIMA_INLINE Vec set1(float a) { return {_mm256_set1_ps(a)}; }
static ANIMA_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
static ANIMA_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
static ANIMA_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
static ANIMA_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.x, b.x)}; }
static ANIMA_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
static ANIMA_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(b.x, a.x)}; }
static ANIMA_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static ANIMA_INLINE Vec scale_by_power(Vec a, Vec n) {
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.x), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.x, _mm256_castsi256_ps(power))};
}
static ANIMA_INLINE Vec zero_below(Vec a, Vec x, Vec limit) {
  return {_mm256_and_ps(a.x, _mm256_cmp_ps(x.x, limit.x, _CMP_NLT_UQ))};
}
static ANIMA_INLINE Vec load_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
static ANIMA_INLINE Vec load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static ANIMA_INLINE void store_f16(uint16_t* p, Vec a) {
  const __m128i half = _mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
static ANIMA_INLINE void store_bf16(uint16_t* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q));
  const __m256i out = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0x88);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

static ANIMA_INLINE void transpose(Vec* r) {
  __m256 t[8], u[8];
  ANIMA_UNROLL
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].x, r[i + 1].x);
    t[i + 1] = _mm256_unpackhi_ps(r[i].x, r[i + 1].x);
  }
  ANIMA_UNROLL
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  ANIMA_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i].x = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4].x = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

#else  // portable: four lanes; GCC and clang make them one SSE or NEON register

constexpr int kWidth = 4;
constexpr int kColumns = 2;

#if defined(__GNUC__)
typedef float Lanes __attribute__((vector_size(16)));
#else
struct Lanes {
  float v[4];
  float operator[](int i) const { return v[i]; }
  float& operator[](int i) { return v[i]; }
};
static ANIMA_INLINE Lanes operator+(Lanes a, Lanes b) { return {{a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]}}; }
static ANIMA_INLINE Lanes operator-(Lanes a, Lanes b) { return {{a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]}}; }
static ANIMA_INLINE Lanes operator*(Lanes a, Lanes b) { return {{a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]}}; }
static ANIMA_INLINE Lanes operator/(Lanes a, Lanes b) { return {{a[0] / b[0], a[1] / b[1], a[2] / b[2], a[3] / b[3]}}; }
#endif

struct Vec {
  Lanes x;
};
static ANIMA_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.x, p, sizeof a.x);
  return a;
}
static ANIMA_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.x, sizeof a.x); }
static ANIMA_INLINE void stream(float* p, Vec a) { store(p, a); }
static ANIMA_INLINE void end_streams() {}
static ANIMA_INLINE Vec set1(float a) {
  const float lanes[4] = {a, a, a, a};
  return load(lanes);
}
static ANIMA_INLINE Vec operator+(Vec a, Vec b) { return {a.x + b.x}; }
static ANIMA_INLINE Vec operator-(Vec a, Vec b) { return {a.x - b.x}; }
static ANIMA_INLINE Vec operator*(Vec a, Vec b) { return {a.x * b.x}; }
static ANIMA_INLINE Vec operator/(Vec a, Vec b) { return {a.x / b.x}; }
static ANIMA_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.x * b.x + c.x}; }
static ANIMA_INLINE Vec max(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.x[i] = b.x[i] > a.x[i] ? b.x[i] : a.x[i];
  return a;
}
// Adding and taking away 1.5·2^23 leaves the nearest whole number, for |a| < 2^22.
static ANIMA_INLINE Vec round(Vec a) {
  const Vec shift = set1(12582912.0f);
  return (a + shift) - shift;
}
static ANIMA_INLINE Vec scale_by_power(Vec a, Vec n) {
  for (int i = 0; i < 4; ++i) {
    const float power = n.x[i] >= -126.0f && n.x[i] <= 127.0f ? n.x[i] : 0.0f;  // NaN: a is NaN already
    a.x[i] = a.x[i] * float_from_bits(uint32_t(int32_t(power) + 127) << 23);
  }
  return a;
}
static ANIMA_INLINE Vec zero_below(Vec a, Vec x, Vec limit) {
  for (int i = 0; i < 4; ++i) a.x[i] = x.x[i] < limit.x[i] ? 0.0f : a.x[i];
  return a;
}
static ANIMA_INLINE Vec load_bf16(const uint16_t* p) {
  Vec a;
  for (int i = 0; i < 4; ++i) a.x[i] = float_from_bf16(p[i]);
  return a;
}
static ANIMA_INLINE Vec load_f16(const uint16_t* p) {
  Vec a;
  for (int i = 0; i < 4; ++i) a.x[i] = float_from_f16(p[i]);
  return a;
}
static ANIMA_INLINE void store_bf16(uint16_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i] = bf16_from_float(a.x[i]);
}
static ANIMA_INLINE void store_f16(uint16_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i] = f16_from_float(a.x[i]);
}
static ANIMA_INLINE void transpose(Vec* r) {
  for (int i = 0; i < 4; ++i)
    for (int j = i + 1; j < 4; ++j) {
      const float kept = r[i].x[j];
      r[i].x[j] = r[j].x[i];
      r[j].x[i] = kept;
    }
}

#endif

// e^x for x <= 0 to 2 ulp; 0 below -87.33, where e^x leaves the normal numbers (subnormals are slow); NaN stays.
// x = n ln 2 + r, |r| <= ln 2 / 2; ln 2 in two parts; a polynomial of degree 6 in r (Cody and Waite's scheme).
static ANIMA_INLINE Vec exp_nonpositive(Vec x) {
  const Vec limit = set1(-87.33f);
  const Vec n = round(x * set1(1.44269504088896341f));
  const Vec r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
  Vec p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return zero_below(scale_by_power(p, n), x, limit);
}

// The smaller; x where either is NaN.
static ANIMA_INLINE Vec min(Vec x, Vec limit) {
  const Vec zero = set1(0.0f);
  return zero - max(zero - x, zero - limit);
}

// e^x for any x to 2 ulp; 0 below -86.6, inf above 88.73; NaN stays.
static ANIMA_INLINE Vec exponential(Vec x) {
  const Vec limit = set1(-86.6f);
  const Vec clamped = min(x, set1(89.0f));
  const Vec n = round(clamped * set1(1.44269504088896341f));
  const Vec r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), clamped));
  Vec p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return zero_below(scale_by_power(p, n - set1(1.0f)) * set1(2.0f), x, limit);  // n reaches 128
}

// log(1 + e^x) = max(x, 0) + log1p(u), u = e^-|x|;  log1p(u) = 2 atanh(s), s = u / (2 + u) <= 1/3, as a series in s^2.
static ANIMA_INLINE Vec softplus(Vec x) {
  const Vec u = exp_nonpositive(min(x, set1(0.0f) - x));
  const Vec s = u / (u + set1(2.0f)), s2 = s * s;
  Vec p = set1(1.0f / 15);
  p = fma(p, s2, set1(1.0f / 13));
  p = fma(p, s2, set1(1.0f / 11));
  p = fma(p, s2, set1(1.0f / 9));
  p = fma(p, s2, set1(1.0f / 7));
  p = fma(p, s2, set1(1.0f / 5));
  p = fma(p, s2, set1(1.0f / 3));
  p = fma(p, s2, set1(1.0f));
  return fma(s + s, p, max(x, set1(0.0f)));
}

// x / (1 + e^-x)
static ANIMA_INLINE Vec silu(Vec x) { return x / (exponential(set1(0.0f) - x) + set1(1.0f)); }

static ANIMA_INLINE float sum_lanes(Vec a) {
  float lanes[kWidth];
  store(lanes, a);
  for (int half = kWidth / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

static ANIMA_INLINE Vec lane_numbers() {
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = float(i);
  return load(lanes);
}

// Inputs and outputs of each type; T is float, or uint16_t tagged by kBf16.
struct Float {
  typedef float Type;
  static ANIMA_INLINE Vec load(const float* p) { return ANIMA_ISA::load(p); }
  static ANIMA_INLINE void store(float* p, Vec a) { ANIMA_ISA::store(p, a); }
  static ANIMA_INLINE void stream(float* p, Vec a) { ANIMA_ISA::stream(p, a); }
  static ANIMA_INLINE float widen(float x) { return x; }
  static ANIMA_INLINE float narrow(float x) { return x; }
};
struct Half {
  typedef uint16_t Type;
  static ANIMA_INLINE Vec load(const uint16_t* p) { return load_f16(p); }
  static ANIMA_INLINE void store(uint16_t* p, Vec a) { store_f16(p, a); }
  static ANIMA_INLINE void stream(uint16_t* p, Vec a) { store_f16(p, a); }  // half a cache line: not worth it
  static ANIMA_INLINE float widen(uint16_t x) { return float_from_f16(x); }
  static ANIMA_INLINE uint16_t narrow(float x) { return f16_from_float(x); }
};
struct BFloat16 {
  typedef uint16_t Type;
  static ANIMA_INLINE Vec load(const uint16_t* p) { return load_bf16(p); }
  static ANIMA_INLINE void store(uint16_t* p, Vec a) { store_bf16(p, a); }
  static ANIMA_INLINE void stream(uint16_t* p, Vec a) { store_bf16(p, a); }  // half a cache line: not worth it
  static ANIMA_INLINE float widen(uint16_t x) { return float_from_bf16(x); }
  static ANIMA_INLINE uint16_t narrow(float x) { return bf16_from_float(x); }
};

// The first `count` (< kWidth) values; the rest are 0.
template <class Io>
static ANIMA_INLINE Vec load_part(const typename Io::Type* p, int count) {
  float lanes[kWidth] = {};
  for (int i = 0; i < count; ++i) lanes[i] = Io::widen(p[i]);
  return load(lanes);
}
template <class Io>
static ANIMA_INLINE void store_part(typename Io::Type* p, Vec a, int count) {
  float lanes[kWidth];
  store(lanes, a);
  for (int i = 0; i < count; ++i) p[i] = Io::narrow(lanes[i]);
}

}  // namespace ANIMA_ISA
}  // namespace anima
