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
  for (int k = 0; k < rows; k++, v += V.stride_k, dst += ld) {
    // Apart, so that the usual case becomes vectors.
    if (V.stride_r == 1)
      for (int j = 0; j < V.r; j++) dst[j] = D(v[j]);
    else
      for (int j = 0; j < V.r; j++) dst[j] = D(v[j * V.stride_r]);
    for (int j = V.r; j < ld; j++) dst[j] = 0;
  }
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

// One product V M of a sum of them; M [r][rp], of which a triangle may be known to be zero.
enum Shape { kFull, kUpper, kLower };
struct Product {
  Reflectors V;
  const double* M;
  Shape shape;
};

// acc [MR][NV] += columns [c, c + NV W) of V M for MR rows of V [][rp].
template <int MR, int NV>
inline void multiply_kernel(const double* V, int r, int rp, const Product& product, int c,
                            Vec<double>::type (*acc)[NV]) {
  constexpr int W = Vec<double>::W;
  int first = product.shape == kLower ? c : 0;
  int last = product.shape == kUpper ? min_int(r, c + NV * W) : r;
  for (int k = first; k < last; k++) {
    Vec<double>::type m[NV];
    for (int v = 0; v < NV; v++) m[v] = Vec<double>::load(product.M + k * rp + c + v * W);
    for (int i = 0; i < MR; i++) {
      Vec<double>::type a = Vec<double>::splat(V[i * rp + k]);
      for (int v = 0; v < NV; v++) acc[i][v] += a * m[v];
    }
  }
}

// Columns from c on of MR rows of the sum; tiles [count][kBlock][rp] hold the rows of each V.
template <class C, int MR, int NV>
inline void multiply_columns(const Product* sum, int count, const double* tiles, int r, int rp, int c, C* out) {
  constexpr int W = Vec<double>::W;
  Vec<double>::type acc[MR][NV] = {};
  for (int n = 0; n < count; n++) multiply_kernel<MR, NV>(tiles + n * kBlock * rp, r, rp, sum[n], c, acc);
  for (int i = 0; i < MR; i++)
    for (int v = 0; v < NV; v++) {
      double lanes[W];
      Vec<double>::store(lanes, acc[i][v]);
      for (int j = c + v * W, l = 0; l < W && j < r; l++, j++) out[i * r + j] = C(lanes[l]);
    }
}

template <class C, int MR>
inline void multiply_rows(const Product* sum, int count, const double* tiles, int r, int rp, C* out) {
  constexpr int W = Vec<double>::W;
  int c = 0;
  for (; c + 2 * W <= rp; c += 2 * W) multiply_columns<C, MR, 2>(sum, count, tiles, r, rp, c, out);
  for (; c < rp; c += W) multiply_columns<C, MR, 1>(sum, count, tiles, r, rp, c, out);
}

// out [K][r] = sum of products, accumulated in fp64, rounded once.
template <class C>
void multiply_reflectors(const Product* sum, int count, C* out, int threads) {
  constexpr int MR = kAccumulators / 2;
  int r = sum->V.r, rp = padded_rank(r);
  int64_t K = sum->V.K, blocks = ceil_div(K, kBlock);
  threads = useful_threads(threads, blocks, count * K * r * r);
  Buffer<double> buffer(int64_t(threads) * count * kBlock * rp);
#pragma omp parallel num_threads(threads)
  {
    double* tiles = buffer.data() + int64_t(thread_index()) * count * kBlock * rp;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
      int rows = min_int(kBlock, K - b * kBlock), i = 0;
      C* block_out = out + b * kBlock * r;
      for (int n = 0; n < count; n++) read_reflectors(sum[n].V, b * kBlock, rows, tiles + n * kBlock * rp, rp);
      for (; i + MR <= rows; i += MR) multiply_rows<C, MR>(sum, count, tiles + i * rp, r, rp, block_out + i * r);
      for (; i < rows; i++) multiply_rows<C, 1>(sum, count, tiles + i * rp, r, rp, block_out + i * r);
    }
  }
}

template <int count>
void multiply_reflectors(const Product (&sum)[count], void* out, int threads) {
  if (sum[0].V.dtype == kFloat64)
    multiply_reflectors(sum, count, static_cast<double*>(out), threads);
  else
    multiply_reflectors(sum, count, static_cast<float*>(out), threads);
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
  multiply_reflectors({{V, M.data(), kFull}}, dV, threads);
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
  multiply_reflectors({{V, M.data(), kFull}}, dV, threads);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
