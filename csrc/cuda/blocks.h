// Launchers of the block rotations and butterflies: raw pointers and sizes in, a cudaError_t out. Matrices are
// contiguous and float32, or float64 where that is said. Formulas: peftkern/ops/block_rotation/README.md,
// butterfly/README.md.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace peftkern::cuda {

// Columns of one group: of a block, or of the 2^(f-1) blocks that f stages mix. Half of it in float32 and float64.
constexpr int kMaxGroup = 128;
constexpr int padded_group(int G) { return G <= 8 ? 8 : G <= 16 ? 16 : G <= 32 ? 32 : G <= 64 ? 64 : 128; }

// Rows of n groups of G columns times one dense matrix D per group; block_rows.cuh.
struct BlockRows {
  const void* rows;  // [M, n G]
  int64_t stride;    // elements between rows
  const float* D;    // [n, G, G], or [1, G, G] for all groups
  bool shared;
  bool transpose;          // times D^T
  void* z;                 // [M, n G]; backward: may be null
  void* z_low;             // half precision only, or null: what z lacks of the unrounded rows
  const float* row_scale;  // [M] or null: z times a number of its row
  // Backward, where `rows` are dz and D is applied the other way round:
  const void* saved;  // x [M, n G]
  int64_t saved_stride;
  float* partial;  // [block_chunks, n, G, G]
  int64_t M;
  int n, G;
  // Set by the launcher.
  int64_t chunk_rows;
  bool wide_D;             // pairs of its numbers can be read at once
  int piece, saved_piece;  // bytes that one copy moves: 16, 4, or an element
};

int block_chunks(int64_t M, int n, int G);  // runs of rows that have partial sums of their own
int block_rows_float32(BlockRows args, void* stream);
int block_rows_bfloat16(BlockRows args, void* stream);
int block_rows_float16(BlockRows args, void* stream);

// out [count] = the sum of `terms` vectors, in order.
int block_sum(bool is_double, const void* partial, void* out, int64_t count, int64_t terms, void* stream);

// C [batch, m, n] = A B in float64, any strides; block_stages.cu.
struct BatchedProduct {
  const double *A, *B;
  double* C;
  int64_t A_strides[3], B_strides[3], C_strides[3];  // batch, row, column
  int64_t batch, m, n, k;
};
int batched_product(const BatchedProduct& args, void* stream);

// Stages of a butterfly R [f, n 2^(f-1), b, b] as one matrix per group, and back; float32 or float64; block_stages.cu.
struct Stages {
  bool is_double;
  const void* R;
  void* D;         // [n, G, G]
  const void* dD;  // [chunks, n, G, G], to be summed
  void* dR;        // like R
  int chunks, n, b, f;
};
int stages_product(const Stages& args, void* stream);
int stages_backward(const Stages& args, void* stream);

// Rotations made of skew matrices of b x b, S of them; block_maps.cu.
constexpr int kMaxTerms = 32, kMaxBlock = 64;
struct BlockMap {
  bool is_double;
  bool packed;     // the parameter is q [S, b (b - 1) / 2] of Q, else B [S, b, b] of Q = (B - B^T) / 2
  const void* q;   // the parameter; backward of the exact map: R
  const void* dR;  // backward only
  void* out;       // R, or the gradient in the parameter
  int64_t S;
  int b, terms;  // terms 0: the exact map
  double coefficients[kMaxTerms];
};
bool block_map_fits(int b);  // whether the current device has the shared memory for a polynomial's gradient in float64
int block_map(const BlockMap& args, void* stream);
int block_map_backward(const BlockMap& args, void* stream);

// (y - bias) scale + bias for rows of N; block_scale.cu.
struct OutputScale {
  const void* y;  // [M, N]
  int64_t y_stride;
  const void* scale;
  const void* bias;  // [N] or null
  void* z;           // [M, N] or null
  // Backward:
  const void* dy;  // [M, N]
  int64_t dy_stride;
  void* partial;  // [scale_chunks, N] or null: sums over rows of dy (y - bias)
  int64_t M;
  int N;
  // Set by the launcher.
  int64_t chunk_rows;
  bool wide;
};
int scale_chunks(Dtype dtype, int64_t M, int N);
int scale_outputs(Dtype dtype, OutputScale args, void* stream);
int scale_outputs_backward(Dtype dtype, OutputScale args, void* stream);

// z = (y + y_low) scale + bias and p = y + y_low of a product y [M, N] in float32 (float64), all contiguous.
struct ScaledProduct {
  const void* y;
  const void* y_low;  // [M, N] like z, or null
  const void* scale;  // [N], null: 1
  const void* bias;   // [N] like z, or null
  void* z;            // [M, N]
  void* p;            // [M, N] like z, or null
  int64_t M;
  int N;
  // Set by the launcher.
  int64_t chunk_rows;
  bool wide;
};
int scale_product(Dtype dtype, const ScaledProduct& args, void* stream);

}  // namespace peftkern::cuda
