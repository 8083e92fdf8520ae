// wy_factor, its backward, and the orthogonality penalty: everything that needs the Gram matrix G = V^T V.
// Compiled once per instruction set; G in fp64 over fixed chunks of K, added in order, so threads do not change a bit.
// T = (striu(G) + diag(G)/2)^-1 [r,r]; penalty |I - U^T U|_F^2 over unit columns u = v/|v|; gradients are V M with M
// [r,r].
#pragma once

#include <cmath>

#include "../common/buffer.h"
#include "../common/threads.h"
#include "small.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int64_t kGramChunk = 256;

// dst [rows][ld] = rows k0.. of V, columns beyond r zero.
template <class C, class D>
void read_reflectors(const Reflectors& V, int64_t k0, int rows, D* dst, int ld) {
  const C* v = static_cast<const C*>(V.data) + k0 * V.stride_k;
  for (int k = 0; k < rows; k++)
    for (int j = 0; j < ld; j++) dst[k * ld + j] = j < V.r ? D(v[k * V.stride_k + j * V.stride_r]) : D(0);
}

template <class D>
void read_reflectors(const Reflectors& V, int64_t k0, int rows, D* dst, int ld) {
  if (V.dtype == kFloat64)
    read_reflectors<double, D>(V, k0, rows, dst, ld);
  else
    read_reflectors<float, D>(V, k0, rows, dst, ld);
}

// G [rp][rp], both triangles.
inline void gram(const Reflectors& V, double* G, int threads) {
  int rp = padded_rank(V.r);
  int64_t size = int64_t(rp) * rp, chunks = ceil_div(V.K, kGramChunk);
  threads = useful_threads(threads, chunks, V.K * rp * rp / 2);
  Buffer<double> partial(chunks * size), tiles(threads * kBlock * rp);
#pragma omp parallel num_threads(threads)
  {
    double* tile = tiles.data() + thread_index() * kBlock * rp;
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      double* sum = partial.data() + chunk * size;
      for (int64_t i = 0; i < size; i++) sum[i] = 0;
      int64_t end = min_int(V.K, (chunk + 1) * kGramChunk);
      for (int64_t k0 = chunk * kGramChunk; k0 < end; k0 += kBlock) {
        int rows = min_int(kBlock, end - k0);
        read_reflectors(V, k0, rows, tile, rp);
        cross_accumulate(tile, tile, rows, V.r, 1, true, sum);
      }
    }
  }
  for (int64_t i = 0; i < size; i++) G[i] = 0;
  for (int64_t chunk = 0; chunk < chunks; chunk++)
    for (int64_t i = 0; i < size; i++) G[i] += partial[chunk * size + i];
  for (int i = 0; i < rp; i++)
    for (int j = 0; j < i; j++) G[i * rp + j] = G[j * rp + i];
}

inline void wy_factor(const Reflectors& V, double* T, int threads) {
  int rp = padded_rank(V.r);
  Buffer<double> G(rp * rp);
  gram(V, G.data(), threads);
  for (int i = 0; i < V.r; i++) G[i * rp + i] /= 2;
  invert_upper(G.data(), V.r, T);
}

// out [K][r] = V M, M [r][rp].
template <class C>
void multiply_reflectors(const Reflectors& V, const double* M, C* out, int threads) {
  int64_t blocks = ceil_div(V.K, kBlock);
  threads = useful_threads(threads, blocks, V.K * V.r * V.r);
  Buffer<C> tiles(threads * kBlock * V.r);
#pragma omp parallel num_threads(threads)
  {
    C* tile = tiles.data() + thread_index() * kBlock * V.r;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
      int rows = min_int(kBlock, V.K - b * kBlock);
      read_reflectors(V, b * kBlock, rows, tile, V.r);
      multiply_small(tile, rows, V.r, M, out + b * kBlock * V.r);
    }
  }
}

inline void multiply_reflectors(const Reflectors& V, const double* M, void* out, int threads) {
  if (V.dtype == kFloat64)
    multiply_reflectors(V, M, static_cast<double*>(out), threads);
  else
    multiply_reflectors(V, M, static_cast<float*>(out), threads);
}

inline void wy_factor_backward(const double* dT, const Reflectors& V, const double* T, void* dV, int threads) {
  int r = V.r, rp = padded_rank(r);
  Buffer<double> Tt(r * r), padded(r * rp), product(r * r), dA(r * r), M(r * rp);
  for (int i = 0; i < r; i++)
    for (int j = 0; j < r; j++) Tt[i * r + j] = T[j * r + i];
  pad_matrix(dT, r, false, padded.data());
  multiply_small(Tt.data(), r, r, padded.data(), product.data());
  pad_matrix(T, r, true, padded.data());
  multiply_small(product.data(), r, r, padded.data(), dA.data());
  // M = -(U + U^T + diag): the minus of dA = -T^T dT T^T goes in here.
  for (int i = 0; i < r; i++)
    for (int j = 0; j < rp; j++) M[i * rp + j] = j >= r ? 0 : -dA[i <= j ? i * r + j : j * r + i];
  multiply_reflectors(V, M.data(), dV, threads);
}

// E [rp][rp] = U^T U - I over unit columns, diagonal exactly zero; a zero column counts nothing, inverse_norm [r] is 0
// there.
inline double gram_error(const Reflectors& V, double* E, double* inverse_norm, int threads) {
  int rp = padded_rank(V.r);
  gram(V, E, threads);
  for (int i = 0; i < V.r; i++) inverse_norm[i] = E[i * rp + i] == 0 ? 0 : 1 / std::sqrt(E[i * rp + i]);
  double sum = 0;
  for (int i = 0; i < V.r; i++)
    for (int j = 0; j < V.r; j++) {
      double& e = E[i * rp + j];
      // A product, so that a column that is not finite gives NaN.
      e *= i == j ? 0 : inverse_norm[i] * inverse_norm[j];
      sum += e * e;
    }
  return sum;
}

inline double penalty(const Reflectors& V, bool squared, int threads) {
  int rp = padded_rank(V.r);
  Buffer<double> E(rp * rp), inverse_norm(V.r);
  double value = gram_error(V, E.data(), inverse_norm.data(), threads);
  return squared ? value : std::sqrt(value);
}

// With U' = 4 U E and the projection u' - u (u . u') of each column, divided by |v|: dV = V M. The norm divides by 2
// |E|_F.
inline void penalty_backward(double grad, const Reflectors& V, bool squared, void* dV, int threads) {
  int r = V.r, rp = padded_rank(r);
  Buffer<double> E(rp * rp), inverse_norm(r), M(r * rp);
  double value = gram_error(V, E.data(), inverse_norm.data(), threads);
  double scale = squared ? 4 * grad : value == 0 ? 0 : 2 * grad / std::sqrt(value);
  for (int i = 0; i < r; i++)
    for (int j = 0; j < rp; j++) {
      double m = 0;
      if (i == j)
        for (int l = 0; l < r; l++) m -= l == i ? 0 : E[i * rp + l] * E[i * rp + l];
      else if (j < r)
        m = E[i * rp + j];
      M[i * rp + j] = j < r ? scale * m * inverse_norm[i] * inverse_norm[j] : 0;
    }
  multiply_reflectors(V, M.data(), dV, threads);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
