// Vectors of fp32 and fp64 lanes for kernels that are compiled once per instruction set.
// The including file names the set: PEFTKERN_ISA and PEFTKERN_VECTOR_BYTES, 64 with AVX-512, 32 with AVX2 + F16C,
// else 16. Vec<C>::type is a GCC vector [W]; load/store convert fp32 <-> bf16/fp16 with one rounding to nearest even.
#pragma once

#include "dtype.h"

#if PEFTKERN_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace peftkern {
namespace PEFTKERN_ISA {

// Vector registers that a micro-kernel may fill with sums: half of them.
constexpr int kAccumulators = PEFTKERN_VECTOR_BYTES == 64 ? 16 : 8;

template <class C>
struct VecTypes;
// Spelled out per type: GCC lowers a vector_size that depends on a template parameter to 16-byte pieces.
template <>
struct VecTypes<float> {
  typedef float type __attribute__((vector_size(PEFTKERN_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(PEFTKERN_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VecTypes<double> {
  typedef double type __attribute__((vector_size(PEFTKERN_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(PEFTKERN_VECTOR_BYTES), aligned(8), may_alias));
};

template <class C>
struct Vec {
  static constexpr int W = PEFTKERN_VECTOR_BYTES / sizeof(C);
  using type = typename VecTypes<C>::type;
  using unaligned = typename VecTypes<C>::unaligned;

  static type load(const C* p) { return *reinterpret_cast<const unaligned*>(p); }
  static void store(C* p, type v) { *reinterpret_cast<unaligned*>(p) = v; }
  static type splat(C c) { return c - type{}; }

  static C sum(type v) {
    C lanes[W];
    store(lanes, v);
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
  }
};

using VF = Vec<float>;
typedef uint32_t VU __attribute__((vector_size(PEFTKERN_VECTOR_BYTES)));
typedef uint16_t VH __attribute__((vector_size(PEFTKERN_VECTOR_BYTES / 2)));
typedef uint16_t VHu __attribute__((vector_size(PEFTKERN_VECTOR_BYTES / 2), aligned(2), may_alias));

inline VF::type load(const float* p) { return VF::load(p); }
inline void store(float* p, VF::type v) { VF::store(p, v); }

// Spelled out where one instruction does it: GCC 12 splits __builtin_convertvector in halves.
inline VU widen_lanes(VH h) {
#if PEFTKERN_VECTOR_BYTES == 64
  return (VU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#elif PEFTKERN_VECTOR_BYTES == 32
  return (VU)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, VU);
#endif
}

// Lanes of at most 16 bits.
inline VH narrow_lanes(VU u) {
#if PEFTKERN_VECTOR_BYTES == 64
  return (VH)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)u);
#elif PEFTKERN_VECTOR_BYTES == 32
  return (VH)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)u), _mm256_extracti128_si256((__m256i)u, 1));
#else
  return __builtin_convertvector(u, VH);
#endif
}

inline VF::type load(const bf16* p) {
  VH half = *reinterpret_cast<const VHu*>(p);
  return (VF::type)(widen_lanes(half) << 16);
}

inline void store(bf16* p, VF::type v) {
  VU u = (VU)v;
  VU rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  VU is_nan = (VU)((u & 0x7fffffffu) > 0x7f800000u);
  rounded = (rounded & ~is_nan) | (0x7fc0u & is_nan);
  *reinterpret_cast<VHu*>(p) = narrow_lanes(rounded);
}

inline VF::type load(const fp16* p) {
#if PEFTKERN_VECTOR_BYTES == 64
  return (VF::type)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif PEFTKERN_VECTOR_BYTES == 32
  return (VF::type)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float lanes[VF::W];
  for (int i = 0; i < VF::W; i++) lanes[i] = to_float(p[i]);
  return VF::load(lanes);
#endif
}

inline void store(fp16* p, VF::type v) {
#if PEFTKERN_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif PEFTKERN_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  float lanes[VF::W];
  VF::store(lanes, v);
  for (int i = 0; i < VF::W; i++) p[i] = to_fp16(lanes[i]);
#endif
}

inline float load1(const float* p) { return *p; }
inline float load1(const bf16* p) { return to_float(*p); }
inline float load1(const fp16* p) { return to_float(*p); }
inline void store1(float* p, float v) { *p = v; }
inline void store1(bf16* p, float v) { *p = to_bf16(v); }
inline void store1(fp16* p, float v) { *p = to_fp16(v); }

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
