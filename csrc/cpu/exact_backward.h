// Backward of the exact precision: the update of dx and the reflectors' gradient from dy itself, in fp32.
// Compiled once per instruction set; the products are those of rotate.h, chained through buffers of N x r and M x r.
// B = W V (of the W Vp that the forward leaves), Q = dy B, R = Q T, S = P T^T:  dx = dz - R V^T,  dV = -W^T (dy^T S) -
// x^T R,  dT = -Q^T P.
#pragma once

#include "exact.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// dT [r][r] = -Q^T P in fp64, over blocks of rows in order.
inline void small_gradient(const float* Q, const float* P, int64_t M, int r, double* dT) {
  int rp = padded_rank(r);
  Buffer<double> sum(rp * rp), wide_Q(kBlock * rp), wide_P(kBlock * rp);
  memset(sum.data(), 0, rp * rp * sizeof(double));
  for (int64_t row0 = 0; row0 < M; row0 += kBlock) {
    int rows = min_int(kBlock, M - row0);
    widen_small(Q + row0 * r, rows, r, wide_Q.data());
    widen_small(P + row0 * r, rows, r, wide_P.data());
    cross_accumulate(wide_Q.data(), wide_P.data(), rows, r, -1, false, sum.data());
  }
  for (int i = 0; i < r; i++)
    for (int j = 0; j < r; j++) dT[i * r + j] = sum[i * rp + j];
}

// update [M,K] = -R V^T, onto which the library adds dz = dy W; null update or dV: not wanted.
inline void linear_backward(const Rows& dy, const Rows& x, int64_t M, const Rows& W, int64_t N, const void* P_in,
                            const void* B_in, const Reflectors& V, const double* T, void* update, void* dV_out,
                            double* dT, int threads) {
  int r = V.r;
  int64_t K = V.K;
  const float* P = static_cast<const float*>(P_in);
  float* dV = static_cast<float*>(dV_out);
  Buffer<float> B(N * r), Q(M * r), R(M * r), S(dV ? M * r : 0), dB(dV ? N * r : 0), dV_x(dV ? K * r : 0);
  Buffer<double> C(int64_t(r) * padded_rank(r));
  memcpy(B.data(), B_in, N * r * sizeof(float));
  to_plain_basis(B.data(), N, r);
  project(dy, M, columns_of(B.data(), N, r), Q.data(), threads);
  pad_matrix(T, r, false, C.data());
  multiply_rows(Q.data(), M, r, C.data(), -1, R.data(), threads);
  project_backward<float>(R.data(), x, M, V, update, dV ? dV_x.data() : nullptr, threads);
  if (!dV) return;
  pad_matrix(T, r, true, C.data());
  multiply_rows(P, M, r, C.data(), -1, S.data(), threads);
  project_backward<float>(S.data(), dy, M, columns_of(B.data(), N, r), nullptr, dB.data(), threads);
  project_backward<float>(dB.data(), W, N, V, nullptr, dV, threads);
  for (int64_t i = 0; i < K * r; i++) dV[i] += dV_x[i];
  small_gradient(Q.data(), P, M, r, dT);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
