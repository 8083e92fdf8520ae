// The r x r algebra in fp64: products with small matrices, triangular inverse, change to the pair basis.
// Compiled once per instruction set; called between the two passes over a row block and by wy_factor.
// Matrices are row-major with rows padded to rp = 8 ceil(r/8) zeros, so inner loops are whole vectors.
#pragma once

#include "tiles.h"

namespace peftkern {
namespace PEFTKERN_ISA {

inline int padded_rank(int r) { return int(round_up(r, 8)); }

// out [r][rp] = A or A^T, with A [r][r] contiguous.
inline void pad_matrix(const double* A, int r, bool transpose, double* out) {
  int rp = padded_rank(r);
  for (int i = 0; i < r; i++)
    for (int j = 0; j < rp; j++) out[i * rp + j] = j >= r ? 0 : transpose ? A[j * r + i] : A[i * r + j];
}

template <class C, int MR>
inline void multiply_small_rows(const C* A, int r, const double* B, C* out) {
  using V = Vec<double>;
  int rp = padded_rank(r);
  double row[MR][kMaxRank];
  for (int c = 0; c < rp; c += V::W) {
    V::type acc[MR] = {};
    for (int j = 0; j < r; j++) {
      V::type b = V::load(B + j * rp + c);
      for (int i = 0; i < MR; i++) acc[i] += double(A[i * r + j]) * b;
    }
    for (int i = 0; i < MR; i++) V::store(row[i] + c, acc[i]);
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < r; j++) out[i * r + j] = C(row[i][j]);
}

// out [rows][r] = A [rows][r] * B [r][rp], accumulated in fp64, rounded once to C.
template <class C>
void multiply_small(const C* A, int rows, int r, const double* B, C* out) {
  constexpr int MR = 8;
  int i = 0;
  for (; i + MR <= rows; i += MR) multiply_small_rows<C, MR>(A + i * r, r, B, out + i * r);
  for (; i < rows; i++) multiply_small_rows<C, 1>(A + i * r, r, B, out + i * r);
}

// out [rp][rp] += sign * A^T B over `rows` rows of A, B [rows][rp]; with upper, blocks strictly below the diagonal are
// skipped.
inline void cross_accumulate(const double* A, const double* B, int rows, int r, double sign, bool upper, double* out) {
  using V = Vec<double>;
  constexpr int NR = 8;
  int rp = padded_rank(r);
  for (int i0 = 0; i0 < r; i0 += NR)
    for (int c = upper ? i0 : 0; c < rp; c += V::W) {
      V::type acc[NR] = {};
      for (int k = 0; k < rows; k++) {
        V::type b = V::load(B + k * rp + c);
        for (int i = 0; i < NR; i++) acc[i] += A[k * rp + i0 + i] * b;
      }
      for (int i = 0; i < NR; i++) {
        double* o = out + (i0 + i) * rp + c;
        V::store(o, V::load(o) + sign * acc[i]);
      }
    }
}

// dst [rows][rp] = fp64 copy of A [rows][r], zero-padded.
template <class C>
void widen_small(const C* A, int rows, int r, double* dst) {
  int rp = padded_rank(r);
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < rp; j++) dst[i * rp + j] = j < r ? double(A[i * r + j]) : 0;
}

// T [r][r] = inverse of the upper triangle of A [rp][rp]; a zero pivot gives a zero row and column.
inline void invert_upper(const double* A, int r, double* T) {
  int rp = padded_rank(r);
  for (int i = 0; i < r * r; i++) T[i] = 0;
  for (int i = r - 1; i >= 0; i--) {
    double pivot = A[i * rp + i];
    if (pivot == 0) continue;
    T[i * r + i] = 1;
    for (int k = i + 1; k < r; k++)
      for (int j = k; j < r; j++) T[i * r + j] -= A[i * rp + k] * T[k * r + j];
    for (int j = i; j < r; j++) T[i * r + j] /= pivot;
  }
}

// G [r][rp] = C M C^T (M^T when transpose) with V = V' C, V' the pair basis of panels.h; an odd last column stays as it
// is.
inline void to_pair_basis(const double* M, int r, bool transpose, double* G) {
  int rp = padded_rank(r);
  auto at = [&](int i, int j) { return transpose ? M[j * r + i] : M[i * r + j]; };
  auto row = [&](int i, int j) {
    if (i + 1 >= r && i % 2 == 0) return at(i, j);
    return i % 2 == 0 ? at(i, j) + at(i + 1, j) : (at(i - 1, j) - at(i, j)) / 2;
  };
  for (int i = 0; i < r; i++)
    for (int j = 0; j < rp; j++) {
      bool single = j + 1 == r && j % 2 == 0;
      G[i * rp + j] = j >= r       ? 0
                      : single     ? row(i, j)
                      : j % 2 == 0 ? row(i, j) + row(i, j + 1)
                                   : (row(i, j - 1) - row(i, j)) / 2;
    }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
