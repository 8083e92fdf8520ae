// Native CPU API of the householder and gram_schmidt families: a chain of r reflections in compact WY form, H = I - V T
// V^T. Dispatch: one table of entry points per instruction set (portable, AVX2, AVX-512); bf16 may go through AMX tiles
// (amx.h). Shapes: x [M,K], V [K,r] (any strides), T [r,r] fp64 upper triangular, P = x V [M,r], W [N,K].
#pragma once

#include "../common/dtype.h"

namespace peftkern {

constexpr int kMaxRank = 128;

// Row-major matrix with unit inner stride; stride counts elements between rows.
struct Rows {
  void* data;
  Dtype dtype;
  int64_t stride;
};

// V [K,r]; dtype is fp32 or fp64 and decides the arithmetic of the call.
struct Reflectors {
  const void* data;
  Dtype dtype;
  int64_t K;
  int r;
  int64_t stride_k, stride_r;
};

// Outputs P, dV, dx and T are contiguous; P and dV have V's dtype, dx has dz's. Null dx or dV: not wanted.
struct Kernels {
  // T = (striu(V^T V) + diag(|v|^2 / 2))^-1; row and column of a zero reflector are zero.
  void (*wy_factor)(const Reflectors& V, double* T, int threads);
  // dV = V (U + U^T + diag(dA)), dA = -T^T dT T^T, U = striu(dA).
  void (*wy_factor_backward)(const double* dT, const Reflectors& V, const double* T, void* dV, int threads);
  // Q = V B with orthonormal columns, B upper triangular, T = 2 I; a dependent column is zero in all three.
  void (*orthonormal_factor)(const Reflectors& V, void* Q, double* T, double* B, int threads);
  // dV = (dQ - 2 Q (dT + dT^T)) B^T.
  void (*orthonormal_factor_backward)(const Reflectors& dQ, const double* dT, const Reflectors& Q, const double* B,
                                      void* dV, int threads);
  // P = x V.
  void (*project)(const Rows& x, int64_t M, const Reflectors& V, void* P, int threads);
  // dx = dP V^T, dV = x^T dP.
  void (*project_backward)(const void* dP, const Rows& x, int64_t M, const Reflectors& V, void* dx, void* dV,
                           int threads);
  // z = x - S V^T with S = P T^T (x H^T), or S = P T (x H) when reverse.
  void (*rotate)(const Rows& x, int64_t M, const Reflectors& V, const double* T, bool reverse, const Rows& z, void* P,
                 int threads);
  // Q = dz V, R = Q T: dx = dz - R V^T, dV = -dz^T S - x^T R, dT = -Q^T P (T transposed throughout when reverse).
  // dx may be dz itself.
  void (*rotate_backward)(const Rows& dz, const Rows& x, int64_t M, const void* P, const Reflectors& V, const double* T,
                          bool reverse, void* dx, void* dV, double* dT, int threads);
  // u [M,N] = -S (W V)^T with S = P T^T, rounded once to x's dtype: y = u + x W^T + b is left to a library that adds
  // them in one accumulator. B [N,r] = W Vp, with V's columns in pairs, is left for linear_backward.
  void (*linear_update)(const Rows& x, int64_t M, const Rows& W, int64_t N, const Reflectors& V, const double* T,
                        const Rows& u, void* P, void* B, int threads);
  // y = x H^T W^T + bias with x H^T kept in fp32: one read of W, for a handful of rows.
  void (*linear_few_rows)(const Rows& x, int64_t M, const Rows& W, int64_t N, const void* bias, const Reflectors& V,
                          const double* T, const Rows& y, void* P, int threads);
  // dV = -W^T (dy^T S) - x^T R, dT = -Q^T P with Q = dy (W V), R = Q T, S = P T^T, where rotate_backward starts from
  // the rounded dz = dy W; update [M,K] = -R V^T in x's dtype, so that dx = update + dy W.
  void (*linear_backward)(const Rows& dy, const Rows& x, int64_t M, const Rows& W, int64_t N, const void* P,
                          const void* B, const Reflectors& V, const double* T, void* update, void* dV, double* dT,
                          int threads);
  // |I - U^T U|_F^2 (or its square root) over unit columns of V.
  double (*penalty)(const Reflectors& V, bool squared, int threads);
  void (*penalty_backward)(double grad, const Reflectors& V, bool squared, void* dV, int threads);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace amx {
const Kernels& kernels();
}

}  // namespace peftkern
