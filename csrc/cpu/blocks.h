// Native CPU API of the block_rotation and butterfly families: rows times orthogonal blocks, and the blocks themselves.
// Dispatch: one table of entry points per instruction set (portable, AVX2, AVX-512), chosen by dispatch.cpp; bf16 may
// go through AMX tiles (block_amx.h).
// Shapes: x [M,K], R [f, K/b, b, b]; stage s couples the halves t and t + 2^s of each group of 2^(s+1) units of b/2
// columns; x R applies stages f-1 ... 0, x R^T the transposed blocks of stages 0 ... f-1.
#pragma once

#include "householder.h"

namespace peftkern {

constexpr int kMaxBlock = 256;

// R [f][stored][b][b], contiguous; stored = K/b, or 1 block for all (f = 1). The dtype is fp32 or fp64 and decides the
// arithmetic of the call.
struct Blocks {
  const void* data;
  Dtype dtype;
  int64_t K;
  int f;
  int64_t stored;
  int b;
};

// A batch of small matrices: S of [b][b], or packed as the S x b (b - 1) / 2 numbers above the diagonal.
struct SmallBatch {
  const void* data;
  Dtype dtype;
  int64_t S;
  int b;
  bool packed;
};

// Outputs are contiguous and have the dtype of the corresponding input; null: not wanted.
struct BlockKernels {
  // z = x R, or x R^T when transpose, and the rest that its rounding leaves, in z's dtype; null rest: not wanted.
  void (*rotate)(const Rows& x, int64_t M, const Blocks& R, bool transpose, const Rows& z, const Rows& rest,
                 int threads);
  // dx = dz R^T, dR_s = u_s^T g_s with u_s the input of stage s, g_s the gradient of its output. dx may be dz.
  void (*rotate_backward)(const Rows& dz, const Rows& x, int64_t M, const Blocks& R, bool transpose, void* dx, void* dR,
                          int threads);
  // R = sum_k c_k Q^k for k < count, of packed skew matrices.
  void (*polynomial)(const SmallBatch& q, const double* c, int count, void* R, int threads);
  void (*polynomial_backward)(const void* dR, const SmallBatch& q, const double* c, int count, void* dq, int threads);
  // R = (I - A)(I + A)^-1, A the packed skew matrix or (B - B^T) / 2.
  void (*cayley)(const SmallBatch& a, void* R, int threads);
  // dA = -(I + R)^T dR (I + R)^T / 2: packed as dA - dA^T, or dB = (dA - dA^T) / 2.
  void (*cayley_backward)(const void* dR, const SmallBatch& R, bool packed, void* out, int threads);
  // out = (y - bias) s + bias; bias may be null.
  void (*scale)(const Rows& y, int64_t M, int64_t N, const void* s, const void* bias, void* out, int threads);
  // dy0 = dy s, ds = sum over rows of dy (y - bias).
  void (*scale_backward)(const Rows& dy, const Rows& y, int64_t M, int64_t N, const void* s, const void* bias,
                         void* dy0, void* ds, int threads);
};

namespace portable {
extern const BlockKernels block_kernels;
}
namespace avx2 {
extern const BlockKernels block_kernels;
}
namespace avx512 {
extern const BlockKernels block_kernels;
}
namespace amx {
const BlockKernels& block_kernels();
}

}  // namespace peftkern
