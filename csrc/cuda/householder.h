// Launchers of the householder family: raw pointers and sizes in, a cudaError_t out. V, P, S, R are float32 and
// contiguous; the r x r matrices are float64. Formulas: peftkern/ops/householder/README.md.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace peftkern::cuda {

constexpr int kMaxRank = 128;

// An r x r matrix C [i, j] = at[i * row + j * column], block triangular in tiles of eight.
struct Core {
  const double* at;
  int row, column;
  bool lower;
};

// Products of rows with V [K, r], and updates of rows by it; householder_rows.cuh says what is done when.
struct Rows {
  const void* x;     // [M, K], may be null in an update: zeros
  int64_t x_stride;  // elements between rows
  const float* V;    // [K, r]
  void* z;           // [M, K] or null; may be x
  int64_t z_stride;
  float* P;            // [parts, M, r] or null
  float* S;            // [M, r] or null
  float* split;        // [row_parts(M, K), M, r]; where there are parts, z needs S as well
  const float* given;  // [M, r], taken for S: no sweep over x
  const float* saved;  // [M, r] or null, multiplied with saved_core into saved_out
  float* saved_out;
  Core core, saved_core;  // at null: none
  int64_t M;
  int K, r;
  float sign;   // z = x + sign S V^T
  bool paired;  // V is in the pair basis, P is wanted in the plain one
  // Set by the launcher.
  int part_columns;  // columns of one block; a multiple of 64, or K
  int x_stages;
  bool wide_x, wide_V, wide_z;
};

inline unsigned row_tiles(int64_t M) { return unsigned((M + 63) / 64); }
int row_part_columns(int64_t M, int K);  // columns of one block; K where the rows fill a device
int row_parts(int64_t M, int K);         // blocks that share 64 rows
int finish_parts(const Rows& args, int parts, void* stream);
int rows_float32(const Rows& args, void* stream);
int rows_bfloat16(const Rows& args, void* stream);
int rows_float16(const Rows& args, void* stream);

// What is made of the Gram matrices of a list of layers with one r; householder_factor.cu.
constexpr int kMaxLayers = 64;
enum FactorJob : int { kFactor = 0, kPenalty = 1, kPenaltyCore = 2 };
struct FactorLayer {
  const void* V;  // [K, r]
  void* out;      // kFactor: T [r, r]; kPenalty: one number like V's; kPenaltyCore: [r, r] float64
  int64_t first_partial;
  int K;
};
struct Factor {
  FactorLayer layers[kMaxLayers];
  double* partial;     // sum over layers of factor_partials(K, r) times 1024
  double* matrix;      // layers times factor_matrix(r), or null for shared memory, where that is enough
  unsigned* counters;  // one per layer, 0 before and after
  const void* grad;    // kPenaltyCore: one number like V's
  FactorJob job;
  int r;
  bool is_double, squared;
  // Set by the launcher.
  bool in_shared, wide;
};
int64_t factor_partials(int K, int r);
int factor_matrix(int r);  // 0 where this device's shared memory is enough
int factor(Factor f, int layers, void* stream);

// dV = V (U + U^T + diag(dA)) from dT; with T null, dV = V dT for a symmetric dT.
int factor_backward(bool is_double, const void* V, const double* T, const double* dT, void* dV, int K, int r,
                    void* stream);

// Contractions over rows; householder_outer.cu.
struct OuterPair {
  const void* x;  // [rows, K]
  int64_t x_stride;
  const float* S;  // [rows, r]
  int64_t rows;    // 0: no such pair
  // Set by the launcher.
  int chunks;
  int64_t chunk_rows;
};
struct Outer {
  OuterPair pairs[2];
  float* partial;        // sum of outer_chunks(rows, K) over the pairs, times K r
  float* dV;             // [K, r]
  const float *A, *B;    // [core_rows, r]
  double* core_partial;  // core_partials(core_rows, r) times 1024
  double* D;             // [r, r] or null
  int64_t core_rows;
  int K, r;
  float sign;
  // Set by the launcher.
  int core_chunks;
  bool wide[2], wide_S[2], wide_core, wide_sum;
};
int outer_chunks(int64_t rows, int K);
int core_partials(int64_t rows, int r);
int outer(Dtype dtype, Outer a, void* stream);

// householder_small.cu
struct PairBasis {
  const float* V;
  const double* T;
  float* Vp;
  double* Cp;
  int K, r;
};
int pair_basis(PairBasis a, void* stream);
// plain [N, r] = the columns of which B [N, r] has the means and differences.
int plain_basis(const float* B, float* plain, int64_t N, int r, void* stream);

struct Product {            // C = alpha A B + D in float64, C contiguous
  const double *A, *B, *D;  // D may be null; its columns are contiguous
  double* C;
  int64_t m, n, k, A_row, A_column, B_row, B_column, D_row;
  double alpha;
};
int product_f64(Product a, void* stream);

}  // namespace peftkern::cuda
