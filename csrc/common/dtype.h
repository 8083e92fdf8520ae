// Storage types of activations and weights: codes shared with Python, and scalar conversions to and from fp32.
// Portable: integer arithmetic only; the SIMD versions in simd.h give bit-identical results.
// bf16 = upper half of fp32 (8 exponent bits, 8 significant bits); fp16 = IEEE binary16; both round to nearest even.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace peftkern {

enum Dtype : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

inline size_t dtype_size(Dtype dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(bf16 h) { return float_from_bits(uint32_t(h.bits) << 16); }

inline float to_float(fp16 h) {
  // Shift the fp16 fields into fp32 position; the multiplication by 2^112 fixes the exponent bias, subnormals included.
  uint32_t magnitude = uint32_t(h.bits & 0x7fff) << 13;
  float value = float_from_bits(magnitude) * float_from_bits(0x77800000u);
  uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits_of(value);
  return float_from_bits(bits | uint32_t(h.bits & 0x8000) << 16);
}

inline bf16 to_bf16(float value) {
  uint32_t u = bits_of(value);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}

inline fp16 to_fp16(float value) {
  uint32_t u = bits_of(value), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00)};
  // 65520 and above round to infinity.
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};
  // Below 2^-14: adding 0.5 lets the fp32 adder round to the subnormal grid of 2^-24.
  if (magnitude < 0x38800000u) {
    uint32_t grid = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    return {uint16_t(sign | grid)};
  }
  return {uint16_t(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13)};
}

}  // namespace peftkern
