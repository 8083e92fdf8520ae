// The table of block kernels of one instruction set, chosen by the dtype of the blocks.
// Included last by block_*.cpp, which define PEFTKERN_ISA and the target before it.
// Formulas and shapes: blocks.h.
#pragma once

#include "block_maps.h"
#include "block_scale.h"

namespace peftkern {
namespace PEFTKERN_ISA {

inline void rotate_blocks_entry(const Rows& x, int64_t M, const Blocks& R, bool transpose, const Rows& z,
                                const Rows& rest, int threads) {
  if (R.dtype == kFloat64)
    rotate_blocks<double>(x, M, R, transpose, z, rest, threads);
  else
    rotate_blocks<float>(x, M, R, transpose, z, rest, threads);
}

inline void rotate_blocks_backward_entry(const Rows& dz, const Rows& x, int64_t M, const Blocks& R, bool transpose,
                                         void* dx, void* dR, int threads) {
  if (R.dtype == kFloat64)
    rotate_blocks_backward(dz, x, M, R, transpose, dx, static_cast<double*>(dR), threads);
  else
    rotate_blocks_backward(dz, x, M, R, transpose, dx, static_cast<float*>(dR), threads);
}

inline void polynomial_entry(const SmallBatch& q, const double* c, int count, void* R, int threads) {
  if (q.dtype == kFloat64)
    polynomial(q, c, count, static_cast<double*>(R), threads);
  else
    polynomial(q, c, count, static_cast<float*>(R), threads);
}

inline void polynomial_backward_entry(const void* dR, const SmallBatch& q, const double* c, int count, void* dq,
                                      int threads) {
  if (q.dtype == kFloat64)
    polynomial_backward(static_cast<const double*>(dR), q, c, count, static_cast<double*>(dq), threads);
  else
    polynomial_backward(static_cast<const float*>(dR), q, c, count, static_cast<float*>(dq), threads);
}

inline void cayley_entry(const SmallBatch& a, void* R, int threads) {
  if (a.dtype == kFloat64)
    cayley(a, static_cast<double*>(R), threads);
  else
    cayley(a, static_cast<float*>(R), threads);
}

inline void cayley_backward_entry(const void* dR, const SmallBatch& R, bool packed, void* out, int threads) {
  if (R.dtype == kFloat64)
    cayley_backward(static_cast<const double*>(dR), R, packed, static_cast<double*>(out), threads);
  else
    cayley_backward(static_cast<const float*>(dR), R, packed, static_cast<float*>(out), threads);
}

inline void scale_entry(const Rows& y, int64_t M, int64_t N, const void* s, const void* bias, void* out, int threads) {
  if (y.dtype == kFloat64)
    scale_outputs<double>(y, M, N, s, bias, out, threads);
  else
    scale_outputs<float>(y, M, N, s, bias, out, threads);
}

inline void scale_backward_entry(const Rows& dy, const Rows& y, int64_t M, int64_t N, const void* s, const void* bias,
                                 void* dy0, void* ds, int threads) {
  if (y.dtype == kFloat64)
    scale_outputs_backward(dy, y, M, N, s, bias, dy0, static_cast<double*>(ds), threads);
  else
    scale_outputs_backward(dy, y, M, N, s, bias, dy0, static_cast<float*>(ds), threads);
}

const BlockKernels block_kernels = {
    rotate_blocks_entry, rotate_blocks_backward_entry, polynomial_entry, polynomial_backward_entry,
    cayley_entry,        cayley_backward_entry,        scale_entry,      scale_backward_entry,
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
