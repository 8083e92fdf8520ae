// orthonormal_factor and its backward: Gram-Schmidt on the reflectors, H = I - 2 Q Q^T.
// Compiled once per instruction set; Cholesky of the Gram matrix in fp64 (wy.h), pivot by pivot, a dependent column
// dropped; twice where once is not enough. B [r,r] upper triangular, Q = V B [K,r] rounded to V's dtype, T = 2 I.
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

inline void orthonormal_factor(const Reflectors& V, void* Q, double* T, double* B, int threads) {
  int r = V.r, rp = padded_rank(r);
  double rounding = gram_rounding(V.K);
  Buffer<double> G(rp * rp), padded(r * rp), first(r * r);
  gram(V, G.data(), threads);
  double norm = orthonormaliser(G.data(), r, rounding, B);
  pad_matrix(B, r, false, padded.data());
  multiply_reflectors({{V, padded.data(), kUpper}}, Q, threads);
  // Once is enough where the error of V B is far below the rounding of Q. Negated, so that what is no number goes on.
  if (!(V.dtype == kFloat32 && norm * rounding <= 0x1p-27)) {
    Reflectors columns = {Q, V.dtype, V.K, r, r, 1};
    memcpy(first.data(), B, r * r * sizeof(double));
    gram(columns, G.data(), threads);
    orthonormaliser(G.data(), r, rounding, B);
    pad_matrix(B, r, false, padded.data());
    multiply_reflectors({{columns, padded.data(), kUpper}}, Q, threads);
    multiply_small(first.data(), r, r, padded.data(), B);
  }
  for (int i = 0; i < r; i++)
    for (int j = 0; j < r; j++) T[i * r + j] = i == j && B[i * r + i] != 0 ? 2 : 0;
}

// dV = (dQ - 2 Q (dT + dT^T)) B^T.
inline void orthonormal_factor_backward(const Reflectors& dQ, const double* dT, const Reflectors& Q, const double* B,
                                        void* dV, int threads) {
  int r = Q.r, rp = padded_rank(r);
  Buffer<double> N(r * r), product(r * r), padded(r * rp), Bt(r * rp);
  for (int i = 0; i < r; i++)
    for (int j = 0; j < r; j++) N[i * r + j] = -2 * (dT[i * r + j] + dT[j * r + i]);
  pad_matrix(B, r, true, Bt.data());
  multiply_small(N.data(), r, r, Bt.data(), product.data());
  pad_matrix(product.data(), r, false, padded.data());
  multiply_reflectors({{dQ, Bt.data(), kLower}, {Q, padded.data(), kFull}}, dV, threads);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
