// The exact precision: y = x H^T W^T + b with one accumulator and one rounding.
// Compiled once per instruction set; many rows: operands for one library product, few rows: fp32 z and a product of its
// own. xs = [x | S'] [M, K + pad], ws = [W | -W V'] [N, K + pad]: xs ws^T = x W^T - (x V')(C T^T C^T) (W V')^T, V' the
// pair basis.
#pragma once

#include "rotate.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Rows [row0, row0 + rows) of [in | tail], tail [rows][r] rounded once and zero-padded to the width of out.
inline void write_augmented(const Rows& in, const float* tail, int64_t row0, int rows, int64_t K, int r, int64_t pad,
                            const Rows& out) {
  size_t size = dtype_size(in.dtype);
  for (int i = 0; i < rows; i++) {
    char* dst = address(out, row0 + i, 0);
    memcpy(dst, address(in, row0 + i, 0), K * size);
    write_row(dst + K * size, in.dtype, tail + int64_t(i) * r, r);
    memset(dst + (K + r) * size, 0, (pad - r) * size);
  }
}

inline void pack_linear(const Rows& x, int64_t M, const Rows& W, int64_t N, const Reflectors& reflectors,
                        const double* T, const Rows& xs, const Rows& ws, void* P_out, int threads) {
  int r = reflectors.r;
  int64_t K = reflectors.K, pad = xs.stride - K, x_blocks = ceil_div(M, kBlock),
          blocks = x_blocks + ceil_div(N, kBlock);
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
        write_augmented(x, tail, row0, rows, K, r, pad, xs);
      } else {
        shrink(W, row0, rows, K, V, product, scratch);
        for (int i = 0; i < rows * r; i++) tail[i] = -product[i];
        write_augmented(W, tail, row0, rows, K, r, pad, ws);
      }
    }
  }
}

// y [M][n0..n0+cols) = z W^T + bias for M <= 8 rows of fp32 z [M][ld]; each row of W is read once.
template <class E, int MR>
void few_rows_kernel(const float* z, int64_t ld, const Rows& W, const E* bias, int64_t K, int64_t n, const Rows& y) {
  const E* w = reinterpret_cast<const E*>(address(W, n, 0));
  VF::type acc[MR][2] = {};
  int64_t k = 0;
  for (; k + 2 * VF::W <= K; k += 2 * VF::W) {
    VF::type w0 = load(w + k), w1 = load(w + k + VF::W);
    for (int i = 0; i < MR; i++) {
      acc[i][0] += VF::load(z + i * ld + k) * w0;
      acc[i][1] += VF::load(z + i * ld + k + VF::W) * w1;
    }
  }
  for (int i = 0; i < MR; i++) {
    float sum = VF::sum(acc[i][0] + acc[i][1]);
    for (int64_t t = k; t < K; t++) sum += z[i * ld + t] * load1(w + t);
    if (bias) sum += load1(bias + n);
    store1(reinterpret_cast<E*>(address(y, i, n)), sum);
  }
}

template <class E>
void few_rows(const float* z, int64_t M, const Rows& W, int64_t N, const E* bias, int64_t K, const Rows& y,
              int threads) {
  threads = useful_threads(threads, N, M * N * K);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < N; n++) {
    int64_t i = 0;
    for (; i + 4 <= M; i += 4)
      few_rows_kernel<E, 4>(z + i * K, K, W, bias, K, n, {address(y, i, 0), y.dtype, y.stride});
    for (; i < M; i++) few_rows_kernel<E, 1>(z + i * K, K, W, bias, K, n, {address(y, i, 0), y.dtype, y.stride});
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
