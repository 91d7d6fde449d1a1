// fp16 and bf16 to and from fp32, by bits: for tails, and for machines without conversion instructions.
#pragma once
#include <cstdint>
#include <cstring>

namespace anima {

static inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint32_t bits_from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float float_from_bf16(uint16_t x) { return float_from_bits(uint32_t(x) << 16); }

// Round to nearest, ties to even; NaN stays NaN (rounding could carry it into infinity).
static inline uint16_t bf16_from_float(float x) {
  const uint32_t bits = bits_from_float(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float float_from_f16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16;
  const uint32_t magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return float_from_bits(sign | ((magnitude + 0x1c000u) << 13));
  const float subnormal = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  return float_from_bits(sign | bits_from_float(subnormal));
}

static inline uint16_t f16_from_float(float x) {
  const uint32_t bits = bits_from_float(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the bits and rounds to even
    const float aligned = float_from_bits(magnitude) + 0.5f;
    return uint16_t(sign | (bits_from_float(aligned) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace anima
