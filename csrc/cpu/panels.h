// Packing of the reflectors V [K,r] into zero-padded panels [K/32][r][32], once per call.
// Compiled once per instruction set; any strides of V; parallel over panels.
// Plain basis: column j is v_j. Pair basis: V' = [(v0 + v1)/2, v0 - v1, ...], V = V' C, so near-equal pairs do not
// cancel.
#pragma once

#include <cmath>

#include "wy.h"

namespace peftkern {
namespace PEFTKERN_ISA {

template <class C>
class Panels {
 public:
  Panels(const Reflectors& V, bool pair_basis, int threads)
      : r(V.r), count(ceil_div(V.K, kPanel)), data_(count * V.r * kPanel) {
    threads = useful_threads(threads, count, 2 * V.K * V.r);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < count; p++) {
      pack(V, p);
      if (pair_basis) pair_columns(panel(p));
    }
  }

  const C* panel(int64_t p) const { return data_.data() + p * r * kPanel; }
  C* panel(int64_t p) { return data_.data() + p * r * kPanel; }

  const int r;
  const int64_t count;

 private:
  void pack(const Reflectors& V, int64_t p) {
    const C* src = static_cast<const C*>(V.data) + p * kPanel * V.stride_k;
    int cols = min_int(kPanel, V.K - p * kPanel);
    C* dst = panel(p);
    for (int j = 0; j < r; j++, dst += kPanel) {
      const C* v = src + j * V.stride_r;
      if (V.stride_k == 1)
        memcpy(dst, v, cols * sizeof(C));
      else
        for (int k = 0; k < cols; k++) dst[k] = v[k * V.stride_k];
      for (int k = cols; k < kPanel; k++) dst[k] = 0;
    }
  }

  void pair_columns(C* v) {
    for (int j = 0; j + 1 < r; j += 2, v += 2 * kPanel)
      for (int k = 0; k < kPanel; k++) {
        C v0 = v[k], v1 = v[k + kPanel];
        v[k] = v0 / 2 + v1 / 2;
        v[k + kPanel] = v0 - v1;
      }
  }

  Buffer<C> data_;
};

// P [rows][r] = P' C in place, P' = x V': p0 = mean + difference / 2, p1 = mean - difference / 2.
inline void to_plain_basis(float* P, int rows, int r) {
  for (int i = 0; i < rows; i++, P += r)
    for (int j = 0; j + 1 < r; j += 2) {
      float mean = P[j], half = P[j + 1] / 2;
      P[j] = mean + half;
      P[j + 1] = mean - half;
    }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
