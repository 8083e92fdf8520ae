// rotate, rotate_backward and the exact products for bf16 activations on AMX tiles; every other call goes to the
// AVX-512 kernels. Chosen by dispatch.cpp with AMX-BF16 and AVX512-BF16; taken for fp32 V, K a multiple of 32 and at
// least 16 rows. P' = x V', S' = P' (C T^T C^T), z = x - S' V'^T in the pair basis V'; dV = -dz^T S - x^T R in the
// plain one.
#if defined(__x86_64__)
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include <immintrin.h>

#include "../common/dtype.h"
#include "../common/threads.h"
#include "householder.h"
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
#define PEFTKERN_ISA amx
#define PEFTKERN_VECTOR_BYTES 64
#include "amx_tiles.h"

namespace peftkern {
namespace PEFTKERN_ISA {

bool worth_tiles(const Rows& x, int64_t M, const Reflectors& V) {
  return x.dtype == kBFloat16 && V.dtype == kFloat32 && V.K % kPanel == 0 && M >= 16;
}

// Scratch of all threads; ThreadTiles is one thread's part.
struct TileWorkspace {
  TileWorkspace(int64_t K, int r, int columns, int terms, int threads)
      : K(K),
        small_size(kBlock * padded_rank(r)),
        column_size(columns * kTerms * kTile),
        term_size(terms * 2 * kTile),
        sum_size(kBlock * (columns * 16 > 2 * kPanel ? columns * 16 : 2 * kPanel)),
        block0(threads * kBlock * K),
        block1(threads * kBlock * K),
        split(threads * kTerms * small_size),
        expand(threads * term_size),
        outer(threads * 2 * column_size),
        pairs(threads * 4 * kTile),
        sums(threads * sum_size),
        small(threads * 4 * small_size),
        wide(threads * 2 * small_size) {}

  const int64_t K, small_size, column_size, term_size, sum_size;
  Buffer<uint16_t> block0, block1, split, expand, outer, pairs;
  Buffer<float> sums, small;
  Buffer<double> wide;
};

struct ThreadTiles {
  explicit ThreadTiles(TileWorkspace& w) {
    int t = thread_index();
    block0 = w.block0.data() + t * kBlock * w.K;
    block1 = w.block1.data() + t * kBlock * w.K;
    for (int i = 0; i < kTerms; i++) split[i] = w.split.data() + (kTerms * t + i) * w.small_size;
    expand = w.expand.data() + t * w.term_size;
    outer_S = w.outer.data() + 2 * t * w.column_size;
    outer_R = outer_S + w.column_size;
    pairs = w.pairs.data() + t * 4 * kTile;
    sums = w.sums.data() + t * w.sum_size;
    for (int i = 0; i < 4; i++) small[i] = w.small.data() + (4 * t + i) * w.small_size;
    for (int i = 0; i < 2; i++) wide[i] = w.wide.data() + (2 * t + i) * w.small_size;
  }
  ~ThreadTiles() { _tile_release(); }

  uint16_t *block0, *block1, *split[kTerms], *expand, *outer_S, *outer_R, *pairs;
  float *sums, *small[4];
  double* wide[2];
};

// What the gradients of a chain need of one block of rows, from its Q and P [rows][r]: R and S as operands of outer in
// scratch.outer_R and outer_S, dT -= Q^T P (P^T Q when reversed). Q comes in the pair basis and leaves in the plain
// one.
struct GradientRows {
  GradientRows(const double* T, int r, bool reverse)
      : r(r), reverse(reverse), S(r * padded_rank(r)), R(r * padded_rank(r)) {
    pad_matrix(T, r, !reverse, S.data());
    pad_matrix(T, r, reverse, R.data());
  }

  void operator()(ThreadTiles& scratch, const float* P, int rows, int columns, int height, double* dT) const {
    float *Q = scratch.small[0], *product = scratch.small[1], *block_P = scratch.small[3];
    to_plain_basis(Q, kBlock, r);
    memset(block_P, 0, kBlock * r * sizeof(float));
    memcpy(block_P, P, rows * r * sizeof(float));
    widen_small(block_P, kBlock, r, scratch.wide[0]);
    widen_small(Q, kBlock, r, scratch.wide[1]);
    cross_accumulate(scratch.wide[reverse ? 0 : 1], scratch.wide[reverse ? 1 : 0], kBlock, r, -1, false, dT);
    multiply_small(block_P, kBlock, r, S.data(), product);
    split_bf16(product, kBlock * r, kTerms, scratch.split);
    pack_outer_rows(scratch.split, r, columns, height, scratch.outer_S);
    multiply_small(Q, kBlock, r, R.data(), product);
    split_bf16(product, kBlock * r, kTerms, scratch.split);
    pack_outer_rows(scratch.split, r, columns, height, scratch.outer_R);
  }

  int r;
  bool reverse;
  Buffer<double> S, R;
};

// The operand S' = Q C of expand_rows, in the pair basis.
void pack_expansion(const float* Q, const Buffer<double>& C, const TilePanels& V, ThreadTiles& scratch) {
  float* S = scratch.small[1];
  multiply_small(Q, kBlock, V.r, C.data(), S);
  split_bf16(S, kBlock * V.r, 2, scratch.split);
  pack_expand_rows(scratch.split[0], scratch.split[1], V.r, V.terms, scratch.expand);
}

// Rows [row0, row0 + rows) of out = base - S' V'^T, S' packed; out may be base itself.
void expand_rows(HalfBlock base, int rows, const TilePanels& V, ThreadTiles& scratch, const Rows& out, int64_t row0) {
  tile_expand(base, rows, scratch.expand, V, reinterpret_cast<uint16_t*>(address(out, row0, 0)), out.stride,
              scratch.sums);
}

void rotate_tiles(const Rows& x, int64_t M, const Reflectors& reflectors, const double* T, bool reverse, const Rows& z,
                  float* P, int threads) {
  int r = reflectors.r;
  int64_t K = reflectors.K, blocks = ceil_div(M, kBlock);
  TilePanels V(reflectors, true, threads);
  Buffer<double> small(int64_t(r) * padded_rank(r));
  to_pair_basis(T, r, !reverse, small.data());
  threads = useful_threads(threads, blocks, M * K * r / 4);
  TileWorkspace workspace(K, r, V.columns, V.terms, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadTiles scratch(workspace);
    float* block_P = scratch.small[0];
    configure_tiles(16);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t row0 = b * kBlock;
      int rows = min_int(kBlock, M - row0);
      HalfBlock block = whole_block(x, row0, rows, K, scratch.block0);
      tile_shrink(block, V, scratch.sums, block_P);
      pack_expansion(block_P, small, V, scratch);
      expand_rows(block, rows, V, scratch, z, row0);
      to_plain_basis(block_P, rows, r);
      memcpy(P + row0 * r, block_P, rows * r * sizeof(float));
    }
  }
}

// dV [K][r] = sum over partial sums [K/32][2][columns][height][16], in order.
void add_tile_sums(const float* partial, int64_t sums, int64_t K, int r, int columns, int height, float* dV,
                   int threads) {
  int64_t size = K * columns * height, groups = K / 16;
  threads = useful_threads(threads, groups, sums * size);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups; g++)
    for (int j = 0; j < r; j++) {
      VF::type sum = {};
      for (int64_t s = 0; s < sums; s++) sum += VF::load(partial + s * size + (g * columns * height + j) * 16);
      float* panel = dV + g / 2 * kPanel * r;
      for (int c = 0; c < 16; c++) panel[paired_column(g % 2, c) * r + j] = sum[c];
    }
}

void rotate_backward_tiles(const Rows& dz, const Rows& x, int64_t M, const float* P, const Reflectors& reflectors,
                           const double* T, bool reverse, void* dx, float* dV, double* dT, int threads) {
  int r = reflectors.r, rp = padded_rank(r), requested = threads, height = r <= 8 ? 8 : 16;
  int64_t K = reflectors.K, sum_rows = rows_per_sum(M), sums = ceil_div(M, sum_rows);
  TilePanels V(reflectors, true, threads);
  Rows out = {dx, kBFloat16, K};
  int64_t dV_size = dV ? K * V.columns * height : 0, dT_size = dV ? int64_t(rp) * rp : 0;
  Buffer<double> pair_R(r * rp), partial_dT(sums * dT_size);
  Buffer<float> partial_dV(sums * dV_size);
  GradientRows gradient_rows(T, r, reverse);
  to_pair_basis(T, r, reverse, pair_R.data());
  threads = useful_threads(threads, sums, M * K * r / 2);
  TileWorkspace workspace(K, r, V.columns, V.terms, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadTiles scratch(workspace);
    float* Q = scratch.small[0];
#pragma omp for schedule(dynamic)
    for (int64_t s = 0; s < sums; s++) {
      float* sum_dV = partial_dV.data() + s * dV_size;
      double* sum_dT = partial_dT.data() + s * dT_size;
      memset(sum_dV, 0, dV_size * sizeof(float));
      memset(sum_dT, 0, dT_size * sizeof(double));
      int64_t end = (s + 1) * sum_rows < M ? (s + 1) * sum_rows : M;
      for (int64_t row0 = s * sum_rows; row0 < end; row0 += kBlock) {
        int rows = min_int(kBlock, end - row0);
        HalfBlock dz_block = whole_block(dz, row0, rows, K, scratch.block0);
        configure_tiles(16);
        tile_shrink(dz_block, V, scratch.sums, Q);
        if (dx) pack_expansion(Q, pair_R, V, scratch);
        if (dV) {
          HalfBlock x_block = whole_block(x, row0, rows, K, scratch.block1);
          gradient_rows(scratch, P + row0 * r, rows, V.columns, height, sum_dT);
          configure_tiles(height);
          OuterOperand operands[] = {{dz_block, scratch.outer_S}, {x_block, scratch.outer_R}};
          tile_outer(operands, 2, V.columns, height, V.panels, scratch.pairs, sum_dV);
        }
        if (!dx) continue;
        configure_tiles(16);
        expand_rows(dz_block, rows, V, scratch, out, row0);
      }
    }
  }
  if (!dV) return;
  add_tile_sums(partial_dV.data(), sums, K, r, V.columns, height, dV, requested);
  add_partial_dT(partial_dT.data(), sums, r, dT);
}

// W V' [N][r], V' the pair basis.
void project_tiles(const Rows& W, int64_t N, const TilePanels& V, int64_t K, float* WV, int threads) {
  int r = V.r;
  int64_t blocks = ceil_div(N, kBlock);
  threads = useful_threads(threads, blocks, N * K * r / 8);
  TileWorkspace workspace(K, r, V.columns, V.terms, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadTiles scratch(workspace);
    float* product = scratch.small[0];
    configure_tiles(16);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t row0 = b * kBlock;
      int rows = min_int(kBlock, N - row0);
      tile_shrink(whole_block(W, row0, rows, K, scratch.block0), V, scratch.sums, product);
      memcpy(WV + row0 * r, product, rows * r * sizeof(float));
    }
  }
}

// dV = -W^T D for partial sums D [N][r] that are already negated.
void outer_tiles(const float* D, const Rows& W, int64_t N, int64_t K, int r, float* dV, int threads) {
  int requested = threads, height = r <= 8 ? 8 : 16, columns = int(ceil_div(r, 16));
  int64_t sum_rows = rows_per_sum(N), sums = ceil_div(N, sum_rows), size = K * columns * height;
  Buffer<float> partial(sums * size);
  threads = useful_threads(threads, sums, N * K * r / 4);
  TileWorkspace workspace(K, r, columns, 0, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadTiles scratch(workspace);
    float* minus_D = scratch.small[0];
    configure_tiles(height);
#pragma omp for schedule(dynamic)
    for (int64_t s = 0; s < sums; s++) {
      float* sum = partial.data() + s * size;
      memset(sum, 0, size * sizeof(float));
      int64_t end = (s + 1) * sum_rows < N ? (s + 1) * sum_rows : N;
      for (int64_t row0 = s * sum_rows; row0 < end; row0 += kBlock) {
        int rows = min_int(kBlock, end - row0);
        memset(minus_D, 0, kBlock * r * sizeof(float));
        for (int i = 0; i < rows * r; i++) minus_D[i] = -D[row0 * r + i];
        split_bf16(minus_D, kBlock * r, kTerms, scratch.split);
        pack_outer_rows(scratch.split, r, columns, height, scratch.outer_S);
        OuterOperand operand = {whole_block(W, row0, rows, K, scratch.block0), scratch.outer_S};
        tile_outer(&operand, 1, columns, height, K / kPanel, scratch.pairs, sum);
      }
    }
  }
  add_tile_sums(partial.data(), sums, K, r, columns, height, dV, requested);
}

void linear_update_tiles(const Rows& x, int64_t M, const Rows& W, int64_t N, const Reflectors& reflectors,
                         const double* T, const Rows& u, float* P, float* WV, int threads) {
  int r = reflectors.r;
  int64_t K = reflectors.K, blocks = ceil_div(M, kBlock);
  TilePanels V(reflectors, true, threads);
  project_tiles(W, N, V, K, WV, threads);
  TilePanels B(columns_of(WV, N, r), false, threads);
  Buffer<double> small(int64_t(r) * padded_rank(r));
  to_pair_basis(T, r, true, small.data());
  Buffer<uint16_t> zeros(N);
  memset(zeros.data(), 0, N * sizeof(uint16_t));
  threads = useful_threads(threads, blocks, M * (K + N) * r / 8);
  TileWorkspace workspace(K, r, V.columns, V.terms, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadTiles scratch(workspace);
    float* block_P = scratch.small[0];
    configure_tiles(16);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t row0 = b * kBlock;
      int rows = min_int(kBlock, M - row0);
      tile_shrink(whole_block(x, row0, rows, K, scratch.block0), V, scratch.sums, block_P);
      pack_expansion(block_P, small, B, scratch);
      expand_rows({zeros.data(), 0}, rows, B, scratch, u, row0);
      to_plain_basis(block_P, rows, r);
      memcpy(P + row0 * r, block_P, rows * r * sizeof(float));
    }
  }
}

void linear_backward_tiles(const Rows& dy, const Rows& x, int64_t M, const Rows& W, int64_t N, const float* P,
                           const float* WV, const Reflectors& reflectors, const double* T, void* update, float* dV,
                           double* dT, int threads) {
  int r = reflectors.r, rp = padded_rank(r), requested = threads, height = r <= 8 ? 8 : 16;
  int64_t K = reflectors.K, sum_rows = rows_per_sum(M), sums = ceil_div(M, sum_rows);
  TilePanels V(reflectors, true, threads);
  TilePanels B(columns_of(WV, N, r), false, threads);
  Rows out = {update, kBFloat16, K};
  int64_t per_column = dV ? V.columns * height : 0, dV_size = K * per_column, dB_size = N * per_column;
  int64_t dT_size = dV ? int64_t(rp) * rp : 0;
  Buffer<double> pair_R(r * rp), partial_dT(sums * dT_size);
  Buffer<float> partial_dV(sums * dV_size), partial_dB(sums * dB_size);
  Buffer<uint16_t> zeros(K);
  memset(zeros.data(), 0, K * sizeof(uint16_t));
  GradientRows gradient_rows(T, r, false);
  to_pair_basis(T, r, false, pair_R.data());
  threads = useful_threads(threads, sums, M * (K + N) * r / 4);
  TileWorkspace workspace(K > N ? K : N, r, V.columns, V.terms, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadTiles scratch(workspace);
    float* Q = scratch.small[0];
#pragma omp for schedule(dynamic)
    for (int64_t s = 0; s < sums; s++) {
      float *sum_dV = partial_dV.data() + s * dV_size, *sum_dB = partial_dB.data() + s * dB_size;
      double* sum_dT = partial_dT.data() + s * dT_size;
      memset(sum_dV, 0, dV_size * sizeof(float));
      memset(sum_dB, 0, dB_size * sizeof(float));
      memset(sum_dT, 0, dT_size * sizeof(double));
      int64_t end = (s + 1) * sum_rows < M ? (s + 1) * sum_rows : M;
      for (int64_t row0 = s * sum_rows; row0 < end; row0 += kBlock) {
        int rows = min_int(kBlock, end - row0);
        HalfBlock dy_block = whole_block(dy, row0, rows, N, scratch.block0);
        configure_tiles(16);
        tile_shrink(dy_block, B, scratch.sums, Q);
        if (update) {
          pack_expansion(Q, pair_R, V, scratch);
          expand_rows({zeros.data(), 0}, rows, V, scratch, out, row0);
        }
        if (!dV) continue;
        gradient_rows(scratch, P + row0 * r, rows, V.columns, height, sum_dT);
        OuterOperand of_dy = {dy_block, scratch.outer_S};
        OuterOperand of_x = {whole_block(x, row0, rows, K, scratch.block1), scratch.outer_R};
        configure_tiles(height);
        tile_outer(&of_dy, 1, V.columns, height, B.panels, scratch.pairs, sum_dB);
        tile_outer(&of_x, 1, V.columns, height, V.panels, scratch.pairs, sum_dV);
      }
    }
  }
  if (!dV) return;
  Buffer<float> dB(N * r), dV_x(K * r);
  add_tile_sums(partial_dB.data(), sums, N, r, V.columns, height, dB.data(), requested);
  add_tile_sums(partial_dV.data(), sums, K, r, V.columns, height, dV_x.data(), requested);
  outer_tiles(dB.data(), W, N, K, r, dV, requested);
  for (int64_t i = 0; i < K * r; i++) dV[i] += dV_x[i];
  add_partial_dT(partial_dT.data(), sums, r, dT);
}

void rotate_entry(const Rows& x, int64_t M, const Reflectors& V, const double* T, bool reverse, const Rows& z, void* P,
                  int threads) {
  if (worth_tiles(x, M, V))
    rotate_tiles(x, M, V, T, reverse, z, static_cast<float*>(P), threads);
  else
    avx512::kernels.rotate(x, M, V, T, reverse, z, P, threads);
}

void rotate_backward_entry(const Rows& dz, const Rows& x, int64_t M, const void* P, const Reflectors& V,
                           const double* T, bool reverse, void* dx, void* dV, double* dT, int threads) {
  if (worth_tiles(x, M, V))
    rotate_backward_tiles(dz, x, M, static_cast<const float*>(P), V, T, reverse, dx, static_cast<float*>(dV), dT,
                          threads);
  else
    avx512::kernels.rotate_backward(dz, x, M, P, V, T, reverse, dx, dV, dT, threads);
}

void linear_update_entry(const Rows& x, int64_t M, const Rows& W, int64_t N, const Reflectors& V, const double* T,
                         const Rows& u, void* P, void* B, int threads) {
  if (worth_tiles(x, M, V) && N % kPanel == 0)
    linear_update_tiles(x, M, W, N, V, T, u, static_cast<float*>(P), static_cast<float*>(B), threads);
  else
    avx512::kernels.linear_update(x, M, W, N, V, T, u, P, B, threads);
}

void linear_backward_entry(const Rows& dy, const Rows& x, int64_t M, const Rows& W, int64_t N, const void* P,
                           const void* B, const Reflectors& V, const double* T, void* update, void* dV, double* dT,
                           int threads) {
  if (worth_tiles(x, M, V) && N % kPanel == 0)
    linear_backward_tiles(dy, x, M, W, N, static_cast<const float*>(P), static_cast<const float*>(B), V, T, update,
                          static_cast<float*>(dV), dT, threads);
  else
    avx512::kernels.linear_backward(dy, x, M, W, N, P, B, V, T, update, dV, dT, threads);
}

Kernels with_tiles() {
  Kernels table = avx512::kernels;
  table.rotate = rotate_entry;
  table.rotate_backward = rotate_backward_entry;
  table.linear_update = linear_update_entry;
  table.linear_backward = linear_backward_entry;
  return table;
}

// A function, so that the order in which the tables are initialised does not matter.
const Kernels& kernels() {
  static const Kernels table = with_tiles();
  return table;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif
