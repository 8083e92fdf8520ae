// The exact precision: y = x H^T W^T + b with one accumulator and one rounding.
// Compiled once per instruction set. Many rows: the update u = -S (W V)^T, S = (x V) T^T, onto which the library adds
// x W^T and b before it rounds. Few rows: fp32 z and a product of its own.
#pragma once

#include "rotate.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// A [M][r] * C [r][rp], times sign.
inline void multiply_rows(const float* A, int64_t M, int r, const double* C, float sign, float* out, int threads) {
  threads = useful_threads(threads, ceil_div(M, kBlock), M * r * r);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row0 = 0; row0 < M; row0 += kBlock) {
    int rows = min_int(kBlock, M - row0);
    multiply_small(A + row0 * r, rows, r, C, out + row0 * r);
    for (int64_t i = row0 * r; i < (row0 + rows) * r; i++) out[i] *= sign;
  }
}

inline Reflectors columns_of(const float* B, int64_t N, int r) { return {B, kFloat32, N, r, r, 1}; }

// In the pair basis, where small updates do not cancel in the float32 sums.
inline void linear_update(const Rows& x, int64_t M, const Rows& W, int64_t N, const Reflectors& reflectors,
                          const double* T, const Rows& u, void* P_out, void* B_out, int threads) {
  int r = reflectors.r;
  int64_t K = reflectors.K, blocks = ceil_div(M, kBlock);
  Panels<float> V(reflectors, true, threads);
  float* WV = static_cast<float*>(B_out);
  project(W, N, K, V, WV, threads);
  Panels<float> B(columns_of(WV, N, r), false, threads);
  Buffer<double> small(int64_t(r) * padded_rank(r));
  to_pair_basis(T, r, true, small.data());
  threads = useful_threads(threads, blocks, M * (K + N) * r);
  Workspace<float> workspace(r, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadScratch<float> scratch(workspace);
    float* S = scratch.small[0];
    memset(scratch.tile1, 0, kBlock * kChunk * sizeof(float));
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t row0 = b * kBlock;
      int rows = min_int(kBlock, M - row0);
      float* P = static_cast<float*>(P_out) + row0 * r;
      shrink(x, row0, rows, K, V, P, scratch);
      multiply_small(P, rows, r, small.data(), S);
      to_plain_basis(P, rows, r);
      for (int64_t n0 = 0; n0 < N; n0 += kChunk)
        expand_chunk<float>({scratch.tile1, kChunk}, rows, S, B, n0, min_int(kChunk, N - n0), u, row0, scratch.out);
    }
  }
}

// y [MR rows][NR columns] = z W^T + bias for fp32 z and NR neighbouring rows of W, each read once.
template <class E, int MR, int NR>
inline void few_rows_kernel(const float* z, const Rows& W, const E* bias, int64_t K, int64_t n, const Rows& y,
                            int64_t row) {
  // With a single row the sums are split in two, or the additions would wait for each other.
  constexpr int KR = MR == 1 ? 2 : 1;
  const E* w = reinterpret_cast<const E*>(address(W, n, 0));
  VF::type acc[MR][NR][KR] = {};
  int64_t k = 0;
  for (; k + KR * VF::W <= K; k += KR * VF::W)
    for (int u = 0; u < KR; u++) {
      VF::type zv[MR];
      for (int i = 0; i < MR; i++) zv[i] = VF::load(z + i * K + k + u * VF::W);
      for (int j = 0; j < NR; j++) {
        VF::type wv = load(w + j * W.stride + k + u * VF::W);
        for (int i = 0; i < MR; i++) acc[i][j][u] += zv[i] * wv;
      }
    }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) {
      float sum = VF::sum(KR == 2 ? acc[i][j][0] + acc[i][j][KR - 1] : acc[i][j][0]);
      for (int64_t t = k; t < K; t++) sum += z[i * K + t] * load1(w + j * W.stride + t);
      if (bias) sum += load1(bias + n + j);
      store1(reinterpret_cast<E*>(address(y, row + i, n + j)), sum);
    }
}

template <class E, int NR>
void few_rows_columns(const float* z, int64_t M, const Rows& W, const E* bias, int64_t K, int64_t n, const Rows& y) {
  constexpr int MR = kAccumulators / 4;
  int64_t i = 0;
  for (; i + MR <= M; i += MR) few_rows_kernel<E, MR, NR>(z + i * K, W, bias, K, n, y, i);
  for (; i < M; i++) few_rows_kernel<E, 1, NR>(z + i * K, W, bias, K, n, y, i);
}

template <class E>
void few_rows(const float* z, int64_t M, const Rows& W, int64_t N, const E* bias, int64_t K, const Rows& y,
              int threads) {
  constexpr int NR = 4;
  int64_t groups = ceil_div(N, NR);
  threads = useful_threads(threads, groups, M * N * K);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups; g++) {
    int64_t n = g * NR;
    if (n + NR <= N)
      few_rows_columns<E, NR>(z, M, W, bias, K, n, y);
    else
      for (; n < N; n++) few_rows_columns<E, 1>(z, M, W, bias, K, n, y);
  }
}

inline void linear_few_rows(const Rows& x, int64_t M, const Rows& W, int64_t N, const void* bias, const Reflectors& V,
                            const double* T, const Rows& y, void* P, int threads) {
  Buffer<float> z(M * V.K);
  rotate<float>(x, M, V, T, false, {z.data(), kFloat32, V.K}, static_cast<float*>(P), threads);
  if (W.dtype == kFloat32) few_rows(z.data(), M, W, N, static_cast<const float*>(bias), V.K, y, threads);
  if (W.dtype == kBFloat16) few_rows(z.data(), M, W, N, static_cast<const bf16*>(bias), V.K, y, threads);
  if (W.dtype == kFloat16) few_rows(z.data(), M, W, N, static_cast<const fp16*>(bias), V.K, y, threads);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
