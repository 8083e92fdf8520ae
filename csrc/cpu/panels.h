// Packing of the reflectors V [K,r] into zero-padded panels [K/32][r][32], once per call.
// Compiled once per instruction set; any strides of V; parallel over panels.
// Plain basis: column j is v_j. Pair basis: columns (v0 + v1)/2, v0 - v1, ... times powers of two that bring |column|
// near 1.
#pragma once

#include <cmath>

#include "wy.h"

namespace peftkern {
namespace PEFTKERN_ISA {

template <class C>
class Panels {
 public:
  Panels(const Reflectors& V, int threads) : r(V.r), count(ceil_div(V.K, kPanel)), data_(count * V.r * kPanel) {
    threads = useful_threads(threads, count, V.K * V.r);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < count; p++) pack(V, p);
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

  Buffer<C> data_;
};

// The pair basis V' = V C^-1 with exact power-of-two column scales: update of H in it is V' small V'^T.
struct PairBasis {
  explicit PairBasis(int r) : scale(r), small(int64_t(r) * padded_rank(r)) {}
  // Column j of the packed basis is scale[j] times the pair-basis column.
  Buffer<double> scale;
  // D^-1 C T^T C^T D^-1 [r][rp], D = diag(scale): S' = (x V') small.
  Buffer<double> small;
};

// Turns panels of V into panels of V' in place and fills the basis; single-threaded fp32 work of r K additions.
inline void change_to_pair_basis(Panels<float>& panels, const double* T, PairBasis& basis) {
  int r = panels.r, rp = padded_rank(r);
  Buffer<double> square(r), pair(int64_t(r) * r);
  for (int j = 0; j < r; j++) square[j] = 0;
  for (int64_t p = 0; p < panels.count; p++) {
    float* B = panels.panel(p);
    for (int j = 0; j + 1 < r; j += 2) {
      float *v0 = B + j * kPanel, *v1 = v0 + kPanel;
      for (int k = 0; k < kPanel; k++) {
        float mean = 0.5f * v0[k] + 0.5f * v1[k], difference = v0[k] - v1[k];
        v0[k] = mean;
        v1[k] = difference;
      }
    }
    for (int j = 0; j < r; j++) {
      float sum = 0;
      for (int k = 0; k < kPanel; k++) sum += B[j * kPanel + k] * B[j * kPanel + k];
      square[j] += sum;
    }
  }
  for (int j = 0; j < r; j++) {
    double norm = std::sqrt(square[j]);
    bool usable = norm > 0 && std::isfinite(norm);
    basis.scale[j] = usable ? std::ldexp(1.0, -std::ilogb(norm)) : 1.0;
  }
  for (int64_t p = 0; p < panels.count; p++)
    for (int j = 0; j < r; j++) {
      float factor = float(basis.scale[j]), *B = panels.panel(p) + j * kPanel;
      for (int k = 0; k < kPanel; k++) B[k] *= factor;
    }
  to_pair_basis(T, r, true, pair.data());
  for (int i = 0; i < r; i++)
    for (int j = 0; j < rp; j++)
      basis.small[i * rp + j] = j >= r ? 0 : pair[i * r + j] / (basis.scale[i] * basis.scale[j]);
}

// P [rows][r] in the plain basis from P' = x V' in place.
inline void to_plain_basis(float* P, int rows, int r, const double* scale) {
  for (int i = 0; i < rows; i++, P += r)
    for (int j = 0; j < r; j++) {
      if (j % 2 == 0 && j + 1 < r) {
        double mean = P[j] / scale[j], half = 0.5 * P[j + 1] / scale[j + 1];
        P[j] = float(mean + half);
        P[j + 1] = float(mean - half);
        j++;
      } else {
        P[j] = float(P[j] / scale[j]);
      }
    }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
