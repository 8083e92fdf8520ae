// Launchers of the gram_schmidt family: raw pointers and sizes in, a cudaError_t out. V and Q are float32 or float64,
// the r x r matrices float64 and contiguous. Formulas: peftkern/ops/gram_schmidt/README.md.
#pragma once

#include <cstdint>

namespace peftkern::cuda {

// A [K, r] matrix; strides in elements.
struct Columns {
  const void* at;
  int64_t stride_k, stride_r;
};

struct OrthonormalFactor {
  Columns V;
  void* Q;            // [K, r]
  double *T, *B;      // [r, r]
  double* workspace;  // orthonormal_workspace(K, r)
  int K, r;
  bool is_double;
  // Set by the launcher.
  int blocks, rows_per_block;
  bool wide;
};
int64_t orthonormal_workspace(int K, int r);
int orthonormal_factor(OrthonormalFactor args, void* stream);

// dV [K, r] = (dQ - 2 Q (dT + dT^T)) B^T.
struct OrthonormalFactorBackward {
  Columns dQ, Q;
  const double *dT, *B;
  void* dV;
  int K, r;
  bool is_double;
  // Set by the launcher.
  bool wide;
};
int orthonormal_factor_backward(OrthonormalFactorBackward args, void* stream);

}  // namespace peftkern::cuda
