// Backward of the exact precision: dx and the reflectors' gradient from dy itself, in fp32 as if dz were never rounded.
// Compiled once per instruction set; the products are those of rotate.h, chained through buffers of N x r and M x r.
// B = W V, Q = dy B, R = Q T, S = P T^T:  dx = dz - R V^T,  dV = -W^T (dy^T S) - x^T R,  dT = -Q^T P.
#pragma once

#include "exact.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// out [M][r] = sign * A [M][r] * C [r][rp].
inline void multiply_rows(const float* A, int64_t M, int r, const double* C, float sign, float* out, int threads) {
  threads = useful_threads(threads, ceil_div(M, kBlock), M * r * r);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row0 = 0; row0 < M; row0 += kBlock) {
    int rows = min_int(kBlock, M - row0);
    multiply_small(A + row0 * r, rows, r, C, out + row0 * r);
    for (int64_t i = row0 * r; i < (row0 + rows) * r; i++) out[i] *= sign;
  }
}

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

// The skinny products of linear_backward in fp32 vectors; isa_amx.cpp has them on tiles.
struct VectorProducts {
  static void project(const Rows& x, int64_t M, const Reflectors& V, float* P, int threads) {
    PEFTKERN_ISA::project(x, M, V, P, threads);
  }
  static void project_backward(const float* dP, const Rows& x, int64_t M, const Reflectors& V, void* dx, float* dV,
                               int threads, const Rows* addend) {
    PEFTKERN_ISA::project_backward(dP, x, M, V, dx, dV, threads, addend);
  }
};

// dz [M,K] = dy W comes from the library, rounded; null dx or dV: not wanted.
template <class Products>
void linear_backward(const Rows& dy, const Rows& x, const Rows& dz, int64_t M, const Rows& W, int64_t N,
                     const void* P_in, const Reflectors& V, const double* T, void* dx, void* dV_out, double* dT,
                     int threads) {
  int r = V.r;
  int64_t K = V.K;
  const float* P = static_cast<const float*>(P_in);
  float* dV = static_cast<float*>(dV_out);
  Buffer<float> B(N * r), Q(M * r), R(M * r), S(dV ? M * r : 0), dB(dV ? N * r : 0), dV_x(dV ? K * r : 0);
  Buffer<double> C(int64_t(r) * padded_rank(r));
  Reflectors B_as_V = {B.data(), kFloat32, N, r, r, 1};
  Products::project(W, N, V, B.data(), threads);
  Products::project(dy, M, B_as_V, Q.data(), threads);
  pad_matrix(T, r, false, C.data());
  multiply_rows(Q.data(), M, r, C.data(), -1, R.data(), threads);
  Products::project_backward(R.data(), x, M, V, dx, dV ? dV_x.data() : nullptr, threads, dx ? &dz : nullptr);
  if (!dV) return;
  pad_matrix(T, r, true, C.data());
  multiply_rows(P, M, r, C.data(), -1, S.data(), threads);
  Products::project_backward(S.data(), dy, M, B_as_V, nullptr, dB.data(), threads, nullptr);
  Products::project_backward(dB.data(), W, N, V, nullptr, dV, threads, nullptr);
  for (int64_t i = 0; i < K * r; i++) dV[i] += dV_x[i];
  small_gradient(Q.data(), P, M, r, dT);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
