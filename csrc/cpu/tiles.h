// Register-blocked micro-kernels on tiles of activations: 32-column panels, fp32 or fp64 arithmetic.
// Compiled once per instruction set (simd.h); block sizes follow the number of vector registers.
// With X [rows,32], S [rows,r], one panel B [r,32] of packed reflectors: dot P += X B^T, expand X - S B, outer D -= S^T
// X.
#pragma once

#include "../common/simd.h"
#include "householder.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int kPanel = 32;   // columns per panel of packed reflectors
constexpr int kChunk = 128;  // columns converted at a time: 32 rows of them stay in L1
constexpr int kBlock = 32;   // rows per block: a block of activations stays in L2

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int min_int(int64_t a, int64_t b) { return int(a < b ? a : b); }

template <class T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr Dtype value = kFloat32;
};
template <>
struct dtype_of<double> {
  static constexpr Dtype value = kFloat64;
};

inline char* address(const Rows& x, int64_t row, int64_t col) {
  return static_cast<char*>(x.data) + (row * x.stride + col) * int64_t(dtype_size(x.dtype));
}

template <class E>
inline void widen(float* dst, const E* src, int n) {
  int i = 0;
  for (; i + VF::W <= n; i += VF::W) VF::store(dst + i, load(src + i));
  for (; i < n; i++) dst[i] = load1(src + i);
}
inline void widen(float* dst, const double* src, int n) {
  for (int i = 0; i < n; i++) dst[i] = float(src[i]);
}
template <class E>
inline void widen(double* dst, const E* src, int n) {
  for (int i = 0; i < n; i++) dst[i] = load1(src + i);
}
inline void widen(double* dst, const double* src, int n) { memcpy(dst, src, n * sizeof(double)); }

template <class E>
inline void narrow(E* dst, const float* src, int n) {
  int i = 0;
  for (; i + VF::W <= n; i += VF::W) store(dst + i, VF::load(src + i));
  for (; i < n; i++) store1(dst + i, src[i]);
}

template <class C, class E>
void read_rows(C* dst, const Rows& x, int64_t row0, int rows, int64_t col0, int cols) {
  int padded = int(round_up(cols, kPanel));
  for (int i = 0; i < rows; i++, dst += kChunk) {
    widen(dst, reinterpret_cast<const E*>(address(x, row0 + i, col0)), cols);
    for (int c = cols; c < padded; c++) dst[c] = 0;
  }
}

template <class C>
struct Tile {
  const C* data;
  int64_t ld;
};

// Columns [col0, col0 + cols) of a row block as C, zero-padded to whole panels; reads in place where nothing needs
// converting.
template <class C>
Tile<C> fetch(const Rows& x, int64_t row0, int rows, int64_t col0, int cols, C* scratch) {
  if (x.dtype == dtype_of<C>::value && cols % kPanel == 0)
    return {reinterpret_cast<const C*>(address(x, row0, col0)), x.stride};
  switch (x.dtype) {
    case kFloat64:
      read_rows<C, double>(scratch, x, row0, rows, col0, cols);
      break;
    case kFloat32:
      read_rows<C, float>(scratch, x, row0, rows, col0, cols);
      break;
    case kBFloat16:
      read_rows<C, bf16>(scratch, x, row0, rows, col0, cols);
      break;
    case kFloat16:
      read_rows<C, fp16>(scratch, x, row0, rows, col0, cols);
      break;
  }
  return {scratch, kChunk};
}

// One rounding from the arithmetic type to the storage type.
inline void write_row(char* dst, Dtype dtype, const float* src, int cols) {
  if (dtype == kFloat32) memcpy(dst, src, cols * sizeof(float));
  if (dtype == kBFloat16) narrow(reinterpret_cast<bf16*>(dst), src, cols);
  if (dtype == kFloat16) narrow(reinterpret_cast<fp16*>(dst), src, cols);
}
inline void write_row(char* dst, Dtype, const double* src, int cols) { memcpy(dst, src, cols * sizeof(double)); }

// lanes[i][j][W] += X[i] * B[j] over `panels` panels; lanes stay vectors until reduce_lanes.
template <class C, int MR, int NR>
inline void dot_kernel(const C* x, int64_t ld, const C* B, int64_t panel_stride, int panels, C* lanes,
                       int64_t lane_ld) {
  using V = Vec<C>;
  typename V::type acc[MR][NR];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) acc[i][j] = V::load(lanes + i * lane_ld + j * V::W);
  for (int p = 0; p < panels; p++)
    for (int c = 0; c < kPanel; c += V::W) {
      typename V::type xv[MR];
      for (int i = 0; i < MR; i++) xv[i] = V::load(x + i * ld + p * kPanel + c);
      for (int j = 0; j < NR; j++) {
        typename V::type bv = V::load(B + p * panel_stride + j * kPanel + c);
        for (int i = 0; i < MR; i++) acc[i][j] += xv[i] * bv;
      }
    }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) V::store(lanes + i * lane_ld + j * V::W, acc[i][j]);
}

template <class C, int MR>
void dot_rows(const C* x, int64_t ld, const C* B, int r, int panels, C* lanes) {
  constexpr int NR = 4;
  int64_t panel_stride = int64_t(r) * kPanel, lane_ld = int64_t(r) * Vec<C>::W;
  int j = 0;
  for (; j + NR <= r; j += NR)
    dot_kernel<C, MR, NR>(x, ld, B + j * kPanel, panel_stride, panels, lanes + j * Vec<C>::W, lane_ld);
  for (; j < r; j++) dot_kernel<C, MR, 1>(x, ld, B + j * kPanel, panel_stride, panels, lanes + j * Vec<C>::W, lane_ld);
}

template <class C>
void dot(Tile<C> x, int rows, const C* B, int r, int panels, C* lanes) {
  constexpr int MR = kAccumulators / 4;
  int64_t lane_ld = int64_t(r) * Vec<C>::W;
  int i = 0;
  for (; i + MR <= rows; i += MR) dot_rows<C, MR>(x.data + i * x.ld, x.ld, B, r, panels, lanes + i * lane_ld);
  for (; i < rows; i++) dot_rows<C, 1>(x.data + i * x.ld, x.ld, B, r, panels, lanes + i * lane_ld);
}

template <class C>
void reduce_lanes(const C* lanes, int64_t count, C* out) {
  for (int64_t i = 0; i < count; i++) out[i] = Vec<C>::sum(Vec<C>::load(lanes + i * Vec<C>::W));
}

// out[i] = x[i] - sum_j S[i][j] B[j] on one panel; out may be x.
template <class C, int MR>
inline void expand_kernel(const C* x, int64_t ld, const C* S, const C* B, int r, C* out, int64_t out_ld) {
  using V = Vec<C>;
  constexpr int NV = kPanel / V::W;
  typename V::type acc[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int v = 0; v < NV; v++) acc[i][v] = V::load(x + i * ld + v * V::W);
  for (int j = 0; j < r; j++) {
    typename V::type bv[NV];
    for (int v = 0; v < NV; v++) bv[v] = V::load(B + j * kPanel + v * V::W);
    for (int i = 0; i < MR; i++) {
      typename V::type s = V::splat(S[i * r + j]);
      for (int v = 0; v < NV; v++) acc[i][v] -= s * bv[v];
    }
  }
  for (int i = 0; i < MR; i++)
    for (int v = 0; v < NV; v++) V::store(out + i * out_ld + v * V::W, acc[i][v]);
}

template <class C>
void expand(Tile<C> x, int rows, const C* S, const C* B, int r, C* out, int64_t out_ld) {
  constexpr int NV = kPanel / Vec<C>::W;
  constexpr int MR = kAccumulators > NV ? kAccumulators / NV : 1;
  int i = 0;
  for (; i + MR <= rows; i += MR)
    expand_kernel<C, MR>(x.data + i * x.ld, x.ld, S + i * r, B, r, out + i * out_ld, out_ld);
  for (; i < rows; i++) expand_kernel<C, 1>(x.data + i * x.ld, x.ld, S + i * r, B, r, out + i * out_ld, out_ld);
}

// D[j] -= sum_i S[i][j] x[i] on one panel D [r,32].
template <class C, int NR>
inline void outer_kernel(const C* x, int64_t ld, int rows, const C* S, int r, C* D) {
  using V = Vec<C>;
  constexpr int NV = kPanel / V::W;
  typename V::type acc[NR][NV];
  for (int j = 0; j < NR; j++)
    for (int v = 0; v < NV; v++) acc[j][v] = V::load(D + j * kPanel + v * V::W);
  for (int i = 0; i < rows; i++) {
    typename V::type xv[NV];
    for (int v = 0; v < NV; v++) xv[v] = V::load(x + i * ld + v * V::W);
    for (int j = 0; j < NR; j++) {
      typename V::type s = V::splat(S[i * r + j]);
      for (int v = 0; v < NV; v++) acc[j][v] -= s * xv[v];
    }
  }
  for (int j = 0; j < NR; j++)
    for (int v = 0; v < NV; v++) V::store(D + j * kPanel + v * V::W, acc[j][v]);
}

template <class C>
void outer(Tile<C> x, int rows, const C* S, int r, C* D) {
  constexpr int NV = kPanel / Vec<C>::W;
  constexpr int NR = kAccumulators > NV ? kAccumulators / NV : 1;
  int j = 0;
  for (; j + NR <= r; j += NR) outer_kernel<C, NR>(x.data, x.ld, rows, S + j, r, D + j * kPanel);
  for (; j < r; j++) outer_kernel<C, 1>(x.data, x.ld, rows, S + j, r, D + j * kPanel);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
