// orthonormal_factor and its backward: Gram-Schmidt on the reflectors, H = I - 2 Q Q^T = I - Q T Q^T.
// Compiled once per instruction set; Cholesky of the Gram matrix in fp64 (wy.h), pivot by pivot, a dependent column
// dropped. B [r,r] upper triangular, Q = V B [K,r] rounded to V's dtype, T = 2 (Q^T Q)^-1 [r,r] fp64.
#pragma once

#include <cmath>

#include "wy.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Relative rounding error allowed to a Gram matrix of K rows: pivots up to here count as zero.
inline double gram_rounding(int64_t K) { return 8 * double(K) * 0x1p-52; }

// B [r][r] upper triangular with B^T G B = I, from G [rp][rp], which is overwritten by the factor of the cosines; row
// and column of a dropped column are zero. Returns the squared norm of B for columns of length 1, which says how much
// of G's rounding error comes out in V B.
inline double orthonormaliser(double* G, int r, double threshold, double* B) {
  int rp = padded_rank(r);
  double scale[kMaxRank];
  for (int j = 0; j < r; j++) scale[j] = G[j * rp + j] == 0 ? 0 : 1 / std::sqrt(G[j * rp + j]);
  for (int i = 0; i < r; i++)
    for (int j = i; j < r; j++) G[i * rp + j] *= scale[i] * scale[j];
  for (int k = 0; k < r; k++) {
    double* row = G + k * rp;
    // Negative answers keep a pivot that is no number, so that it shows.
    bool dropped = row[k] <= threshold;
    double inverse = dropped ? 0 : 1 / std::sqrt(row[k]);
    for (int j = k; j < r; j++) row[j] *= inverse;
    for (int i = k + 1; i < r && !dropped; i++)
      for (int j = i; j < r; j++) G[i * rp + j] -= row[i] * row[j];
  }
  invert_upper(G, r, B);
  double norm = 0;
  for (int i = 0; i < r; i++)
    for (int j = i; j < r; j++) {
      norm += B[i * r + j] * B[i * r + j];
      B[i * r + j] *= scale[i];
    }
  return norm;
}

// T = 2 (Q^T Q)^-1 over the columns that are not zero.
inline void projector_factor(const Reflectors& Q, double* T, int threads) {
  int r = Q.r, rp = padded_rank(r);
  Buffer<double> G(rp * rp), B(r * r), Bt(r * rp);
  gram(Q, G.data(), threads);
  orthonormaliser(G.data(), r, gram_rounding(Q.K), B.data());
  pad_matrix(B.data(), r, true, Bt.data());
  for (int i = 0; i < r * r; i++) B[i] *= 2;
  multiply_small(B.data(), r, r, Bt.data(), T);
}

inline void orthonormal_factor(const Reflectors& V, void* Q, double* T, double* B, int threads) {
  int r = V.r, rp = padded_rank(r);
  Buffer<double> G(rp * rp), padded(r * rp);
  gram(V, G.data(), threads);
  double norm = orthonormaliser(G.data(), r, gram_rounding(V.K), B);
  pad_matrix(B, r, false, padded.data());
  multiply_reflectors({{V, padded.data(), kUpper}}, Q, threads);
  // Where V B is orthonormal far below float32's rounding, T is 2 I; elsewhere Q's own Gram matrix says what it is.
  if (V.dtype == kFloat32 && norm * gram_rounding(V.K) <= 0x1p-27) {
    for (int i = 0; i < r; i++)
      for (int j = 0; j < r; j++) T[i * r + j] = i == j && B[i * r + i] != 0 ? 2 : 0;
    return;
  }
  projector_factor({Q, V.dtype, V.K, r, r, 1}, T, threads);
}

// dV = (dQ - Q N) B^T with N = T (dT + dT^T) T / 2.
inline void orthonormal_factor_backward(const Reflectors& dQ, const double* dT, const Reflectors& Q, const double* T,
                                        const double* B, void* dV, int threads) {
  int r = Q.r, rp = padded_rank(r);
  Buffer<double> symmetric(r * r), product(r * r), N(r * r), padded(r * rp), Bt(r * rp);
  for (int i = 0; i < r; i++)
    for (int j = 0; j < r; j++) symmetric[i * r + j] = -(dT[i * r + j] + dT[j * r + i]) / 2;
  pad_matrix(T, r, false, padded.data());
  multiply_small(symmetric.data(), r, r, padded.data(), product.data());
  pad_matrix(product.data(), r, false, padded.data());
  multiply_small(T, r, r, padded.data(), N.data());
  pad_matrix(B, r, true, Bt.data());
  multiply_small(N.data(), r, r, Bt.data(), product.data());
  pad_matrix(product.data(), r, false, padded.data());
  multiply_reflectors({{dQ, Bt.data(), kLower}, {Q, padded.data(), kFull}}, dV, threads);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
