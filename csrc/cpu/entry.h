// The table of entry points of one instruction set: the included kernels, chosen by V's dtype.
// Included last by isa_*.cpp, which define PEFTKERN_ISA and the target before it.
// Formulas and shapes: householder.h.
#pragma once

#include "exact_backward.h"
#include "gram_schmidt.h"

namespace peftkern {
namespace PEFTKERN_ISA {

inline void project_entry(const Rows& x, int64_t M, const Reflectors& V, void* P, int threads) {
  if (V.dtype == kFloat64)
    project(x, M, V, static_cast<double*>(P), threads);
  else
    project(x, M, V, static_cast<float*>(P), threads);
}

inline void project_backward_entry(const void* dP, const Rows& x, int64_t M, const Reflectors& V, void* dx, void* dV,
                                   int threads) {
  if (V.dtype == kFloat64)
    project_backward(static_cast<const double*>(dP), x, M, V, dx, static_cast<double*>(dV), threads);
  else
    project_backward(static_cast<const float*>(dP), x, M, V, dx, static_cast<float*>(dV), threads);
}

inline void rotate_entry(const Rows& x, int64_t M, const Reflectors& V, const double* T, bool reverse, const Rows& z,
                         void* P, int threads) {
  if (V.dtype == kFloat64)
    rotate(x, M, V, T, reverse, z, static_cast<double*>(P), threads);
  else
    rotate(x, M, V, T, reverse, z, static_cast<float*>(P), threads);
}

inline void rotate_backward_entry(const Rows& dz, const Rows& x, int64_t M, const void* P, const Reflectors& V,
                                  const double* T, bool reverse, void* dx, void* dV, double* dT, int threads) {
  if (V.dtype == kFloat64)
    rotate_backward(dz, x, M, static_cast<const double*>(P), V, T, reverse, dx, static_cast<double*>(dV), dT, threads);
  else
    rotate_backward(dz, x, M, static_cast<const float*>(P), V, T, reverse, dx, static_cast<float*>(dV), dT, threads);
}

const Kernels kernels = {
    wy_factor,        wy_factor_backward,     orthonormal_factor, orthonormal_factor_backward,
    project_entry,    project_backward_entry, rotate_entry,       rotate_backward_entry,
    linear_update,    linear_few_rows,        linear_backward,    penalty,
    penalty_backward,
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
