// Number formats and rounding: everything goes through double with a sticky last bit, then is rounded once.
#pragma once
#include "lanes.h"

namespace vm {
constexpr u32 NAN32 = 0x7fffffffu;  // the NaN that arithmetic instructions return
constexpr u16 NAN16 = 0x7fffu;

inline float canonical(float x) { return x != x ? bits<float>(NAN32) : x; }
inline double canonical(double x) { return x != x ? bits<double>(u64(0x7fffffffffffffffull)) : x; }
inline float flush(float x) { return (bits<u32>(x) & 0x7f800000u) ? x : bits<float>(bits<u32>(x) & 0x80000000u); }
inline float saturate(float x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }

// A binary floating-point format narrower than double.
struct Format {
  int mantissa, emin, emax;
  bool infinity;
};
constexpr Format F32{23, -126, 127, true}, F16{10, -14, 15, true}, BF16{7, -126, 127, true}, TF32{10, -126, 127, true};

// x rounded to the format, as a double. Overflow gives infinity or, towards zero, the largest finite number.
inline double round_to(double x, Format f, u32 flags) {
  if (x == 0 || std::isnan(x) || std::isinf(x)) return x;
  int e;
  std::frexp(x, &e);
  e -= 1;
  const int quantum = (e < f.emin ? f.emin : e) - f.mantissa;
  const double scaled = std::ldexp(std::fabs(x), -quantum), lower = std::floor(scaled), rest = scaled - lower;
  const bool negative = x < 0;
  double kept = lower;
  if (flags & RZ) {
  } else if (flags & RM)
    kept += negative && rest > 0;
  else if (flags & RP)
    kept += !negative && rest > 0;
  else if (flags & RNA)
    kept += rest >= 0.5;
  else
    kept += rest > 0.5 || (rest == 0.5 && std::fmod(lower, 2.0) == 1.0);
  double r = std::ldexp(kept, quantum);
  const double largest = std::ldexp(2.0 - std::ldexp(1.0, -f.mantissa), f.emax);
  if (r > largest) {
    const bool toward_zero = (flags & RZ) || ((flags & RM) && !negative) || ((flags & RP) && negative);
    r = toward_zero || (flags & SATFINITE) ? largest : INFINITY;
  }
  return negative ? -r : r;
}

// a + b and a * b + c with the inexact part folded into the last bit (round to odd), so that one later rounding is
// right.
inline double to_odd(double s, double rest) {
  if (rest != 0 && std::isfinite(s) && !(bits<u64>(s) & 1)) {
    const bool away = (rest > 0) == (s > 0);
    if (s == 0) return rest;
    return bits<double>(bits<u64>(s) + (away ? 1 : -1));
  }
  return s;
}
inline double add_odd(double a, double b) {
  const double s = a + b, t = s - a;
  return to_odd(s, std::isfinite(s) ? (a - (s - t)) + (b - t) : 0);
}
inline double fma_odd(double a, double b, double c) {
  return add_odd(a * b, c);
}  // a * b exact: factors of 24 bits at most

inline float half_value(u16 h) { return float(bits<_Float16>(h)); }
inline float bf16_value(u16 h) { return bits<float>(u32(h) << 16); }
inline u16 half_bits(double x, u32 flags = 0) {
  if (x != x) return NAN16;
  if (flags & RELU) x = x > 0 ? x : 0;
  if (!(flags & (RZ | RM | RP | SATFINITE))) return bits<u16>(_Float16(x));
  return bits<u16>(_Float16(round_to(x, F16, flags)));
}
inline u16 bf16_of_float(float x) {
  const u32 u = bits<u32>(x);
  return x != x ? NAN16 : u16((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline float float_odd(double x) {  // x in fp32, rounded to odd: room for one more rounding
  const float f = float(x);
  return double(f) == x || (bits<u32>(f) & 1)
             ? f
             : bits<float>(bits<u32>(f) + ((std::fabs(double(f)) < std::fabs(x)) ? 1 : -1));
}
inline u16 bf16_bits(double x, u32 flags = 0) {
  if (x != x) return NAN16;
  if (flags & RELU) x = x > 0 ? x : 0;
  if (!(flags & (RZ | RM | RP | SATFINITE))) return bf16_of_float(float_odd(x));
  return u16(bits<u32>(float(round_to(x, BF16, flags))) >> 16);
}
inline float tf32_value(u32 r) { return bits<float>(r & 0xffffe000u); }

// fp8: e4m3 has no infinity (largest 448, NaN 0x7f), e5m2 has (largest 57344). Conversions saturate to the largest
// number.
template <bool E4>
inline u8 fp8_bits(double x, u32 flags) {
  constexpr Format f = E4 ? Format{3, -6, 8, false} : Format{2, -14, 15, true};
  constexpr double largest = E4 ? 448.0 : 57344.0;
  if (x != x) return 0x7f;
  if (flags & RELU) x = x > 0 ? x : 0;
  const u8 sign = std::signbit(x) ? 0x80 : 0;
  double r = std::fabs(round_to(x, f, flags));
  if (r > largest) r = largest;
  if (r == 0) return sign;
  int e;
  std::frexp(r, &e);
  e -= 1;
  if (e < f.emin) return sign | u8(std::ldexp(r, f.mantissa - f.emin));
  return sign | u8(((e - f.emin + 1) << f.mantissa) | (u32(std::ldexp(r, f.mantissa - e)) & ((1u << f.mantissa) - 1)));
}
template <bool E4>
inline float fp8_value(u8 b) {
  constexpr int m = E4 ? 3 : 2, bias = E4 ? 7 : 15;
  const int e = (b & 0x7f) >> m, f = b & ((1 << m) - 1);
  float r;
  if (E4 && (b & 0x7f) == 0x7f) return bits<float>(NAN32);
  if (!E4 && e == 31)
    r = f ? bits<float>(NAN32) : INFINITY;
  else
    r = e ? std::ldexp(float((1 << m) + f), e - bias - m) : std::ldexp(float(f), 1 - bias - m);
  return b & 0x80 ? -r : r;
}
}  // namespace vm
