// mma.sync. Products are exact; one instruction's sum is formed exactly (in fp64) and cut to fp32 towards zero, as
// tensor cores do; fp16 accumulators are rounded to nearest. Integer sums wrap, or saturate with .satfinite.
#include <algorithm>

#include "memory.h"
#include "number.h"

namespace vm {
namespace {
enum Element : u32 { E_BF16, E_F16, E_TF32, E_S8, E_U8, E_E4M3, E_E5M2 };
constexpr u32 element_bytes(u32 e) { return e == E_TF32 ? 4 : e <= E_F16 ? 2 : 1; }
float decode(u32 word, u32 i, u32 e) {
  switch (e) {
    case E_BF16:
      return bf16_value(u16(word >> (16 * i)));
    case E_F16:
      return half_value(u16(word >> (16 * i)));
    case E_TF32:
      return tf32_value(word);
    case E_S8:
      return float(i8(word >> (8 * i)));
    case E_U8:
      return float(u8(word >> (8 * i)));
    case E_E4M3:
      return fp8_value<true>(u8(word >> (8 * i)));
    default:
      return fp8_value<false>(u8(word >> (8 * i)));
  }
}
float toward_zero(double x) {
  const float f = float(x);
  if (x != x) return bits<float>(NAN32);
  if (std::isinf(f) && std::isfinite(x)) return std::copysign(std::numeric_limits<float>::max(), f);
  return std::fabs(double(f)) > std::fabs(x) ? bits<float>(bits<u32>(f) - 1) : f;
}

// m16n8kK. a: D registers, A, B, C in order; shape = K | A type << 8 | B type << 12 | (C fp16) << 16 | (D fp16) << 17.
// Lane l holds rows l/4 and l/4 + 8 of A and C, columns from l%4 times the elements of a register.
Flow mma16x8(Warp& w, const Op& op, u32 mask) {
  if (Flow f = whole_warp(w, op, mask, "mma"); f != Flow::next) return f;
  const u32 K = op.shape & 255, ta = (op.shape >> 8) & 15, tb = (op.shape >> 12) & 15;
  const bool c16 = op.shape >> 16 & 1, d16 = op.shape >> 17 & 1, integer = ta == E_S8 || ta == E_U8;
  const u32 per = 4 / element_bytes(ta), na = K / per / 2, nb = na / 2, nc = c16 ? 2 : 4, nd = d16 ? 2 : 4;
  const u32 *d = op.a, *a = d + nd, *b = a + na, *c = b + nb;
  (void)nc;
  static thread_local double A[16][32], B[32][8], D[16][8];
  for (u32 i = 0; i < na; i++) {
    const u32* r = w.reg<u32>(a[i]);
    for (u32 l = 0; l < 32; l++)
      for (u32 e = 0; e < per; e++) A[l / 4 + 8 * (i & 1)][(i >> 1) * 4 * per + l % 4 * per + e] = decode(r[l], e, ta);
  }
  for (u32 i = 0; i < nb; i++) {
    const u32* r = w.reg<u32>(b[i]);
    for (u32 l = 0; l < 32; l++)
      for (u32 e = 0; e < per; e++) B[i * 4 * per + l % 4 * per + e][l / 4] = decode(r[l], e, tb);
  }
  for (u32 l = 0; l < 32; l++)
    for (u32 k = 0; k < 4; k++) {
      double& x = D[l / 4 + (k >> 1) * 8][l % 4 * 2 + (k & 1)];
      if (c16)
        x = half_value(u16(w.reg<u32>(c[k >> 1])[l] >> (16 * (k & 1))));
      else if (integer)
        x = double(w.reg<i32>(c[k])[l]);
      else
        x = w.reg<float>(c[k])[l];
    }
  for (u32 i = 0; i < 16; i++) {
    double s[8] = {};
    for (u32 k = 0; k < K; k++)
      for (u32 j = 0; j < 8; j++) s[j] += A[i][k] * B[k][j];
    for (u32 j = 0; j < 8; j++) D[i][j] += s[j];
  }
  u32 r[4][32] = {};
  for (u32 l = 0; l < 32; l++)
    for (u32 k = 0; k < 4; k++) {
      const double x = D[l / 4 + (k >> 1) * 8][l % 4 * 2 + (k & 1)];
      if (d16)
        r[k >> 1][l] |= u32(half_bits(x)) << (16 * (k & 1));
      else
        r[k][l] = integer ? u32(i64(op.flags & SATFINITE ? std::clamp(x, -2147483648.0, 2147483647.0) : x))
                          : bits<u32>(toward_zero(x));
    }
  for (u32 k = 0; k < nd; k++) put(w, d[k], r[k], FULL);
  return Flow::next;
}

// m8n8k4 in fp64: one element of A and of B, two of C per lane.
Flow mma8x8_f64(Warp& w, const Op& op, u32 mask) {
  if (Flow f = whole_warp(w, op, mask, "mma"); f != Flow::next) return f;
  const double *a = w.reg<double>(op.a[2]), *b = w.reg<double>(op.a[3]);
  double r[2][32];
  for (u32 k = 0; k < 2; k++)
    for (u32 l = 0; l < 32; l++) {
      r[k][l] = w.reg<double>(op.a[4 + k])[l];
      for (u32 t = 0; t < 4; t++) r[k][l] = std::fma(a[l / 4 * 4 + t], b[(l % 4 * 2 + k) * 4 + t], r[k][l]);
    }
  put(w, op.a[0], r[0], FULL);
  put(w, op.a[1], r[1], FULL);
  return Flow::next;
}

const bool defined = (define("mma.m16n8", &mma16x8), define("mma.m8n8k4.f64", &mma8x8_f64), true);
}  // namespace
}  // namespace vm
