// The exact precision: y = x H^T W^T + b with one accumulator and one rounding.
// Compiled once per instruction set; many rows: operands for one library product, few rows: fp32 z and a product of its
// own. xs = [x | S'] [M, K + pad], ws = [W | -W V'] [N, K + pad]: xs ws^T = x W^T - (x V')(C T^T C^T) (W V')^T, V' the
// pair basis, S' and W V' as sums of two half-precision numbers (3 r columns).
#pragma once

#include "rotate.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Half-precision row as fp32.
inline void read_half_row(float* dst, Dtype dtype, const char* src, int cols) {
  if (dtype == kBFloat16) widen(dst, reinterpret_cast<const bf16*>(src), cols);
  if (dtype == kFloat16) widen(dst, reinterpret_cast<const fp16*>(src), cols);
}

// Rows [row0, row0 + rows) of [in | high low high | 0] (left operand) or [in | high high low | 0] (right operand),
// where high + low is tail [rows][r]: rounded once, the tail would cost more than the one rounding of y.
inline void write_augmented(const Rows& in, const float* tail, int64_t row0, int rows, int64_t K, int r, bool left,
                            const Rows& out) {
  size_t size = dtype_size(in.dtype);
  float low[kMaxRank];
  for (int i = 0; i < rows; i++, tail += r) {
    char *dst = address(out, row0 + i, 0), *high = dst + K * size, *second = high + r * size,
         *third = second + r * size;
    memcpy(dst, address(in, row0 + i, 0), K * size);
    write_row(high, in.dtype, tail, r);
    read_half_row(low, in.dtype, high, r);
    for (int j = 0; j < r; j++) low[j] = tail[j] - low[j];
    write_row(left ? second : third, in.dtype, low, r);
    memcpy(left ? third : second, high, r * size);
    memset(third + r * size, 0, (out.stride - K - 3 * r) * size);
  }
}

inline void pack_linear(const Rows& x, int64_t M, const Rows& W, int64_t N, const Reflectors& reflectors,
                        const double* T, const Rows& xs, const Rows& ws, void* P_out, int threads) {
  int r = reflectors.r;
  int64_t K = reflectors.K, x_blocks = ceil_div(M, kBlock), blocks = x_blocks + ceil_div(N, kBlock);
  Panels<float> V(reflectors, true, threads);
  Buffer<float> factors(r);
  Buffer<double> small(int64_t(r) * padded_rank(r));
  balance_columns(V, factors.data());
  to_pair_basis(T, r, true, small.data());
  for (int i = 0; i < r; i++)
    for (int j = 0; j < r; j++) small[i * padded_rank(r) + j] /= double(factors[i]) * factors[j];
  threads = useful_threads(threads, blocks, (M + N) * K * r);
  Workspace<float> workspace(r, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadScratch<float> scratch(workspace);
    float *product = scratch.small[0], *tail = scratch.small[1];
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
      bool is_x = b < x_blocks;
      int64_t row0 = (is_x ? b : b - x_blocks) * kBlock;
      int rows = min_int(kBlock, (is_x ? M : N) - row0);
      if (is_x) {
        float* P = static_cast<float*>(P_out) + row0 * r;
        shrink(x, row0, rows, K, V, P, scratch);
        multiply_small(P, rows, r, small.data(), tail);
        for (int i = 0; i < rows * r; i++) P[i] /= factors[i % r];
        to_plain_basis(P, rows, r);
        write_augmented(x, tail, row0, rows, K, r, true, xs);
      } else {
        shrink(W, row0, rows, K, V, product, scratch);
        for (int i = 0; i < rows * r; i++) tail[i] = -product[i];
        write_augmented(W, tail, row0, rows, K, r, false, ws);
      }
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
