// rotate, rotate_backward and pack_linear for bf16 activations on AMX tiles; every other call goes to the AVX-512
// kernels. Chosen by dispatch.cpp with AMX-BF16 and AVX512-BF16; taken for fp32 V, K a multiple of 32 and at least 16
// rows. P' = x V', S' = P' (C T^T C^T), z = x - S' V'^T in the pair basis V'; dV = -dz^T S - x^T R in the plain one.
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

void rotate_tiles(const Rows& x, int64_t M, const Reflectors& reflectors, const double* T, bool reverse, const Rows& z,
                  float* P, int threads) {
  int r = reflectors.r;
  int64_t K = reflectors.K, blocks = ceil_div(M, kBlock);
  TilePanels V(reflectors, threads);
  Buffer<double> small(int64_t(r) * padded_rank(r));
  to_pair_basis(T, r, !reverse, small.data());
  threads = useful_threads(threads, blocks, M * K * r / 4);
  TileWorkspace workspace(K, r, V.columns, V.terms, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadTiles scratch(workspace);
    float *block_P = scratch.small[0], *S = scratch.small[1];
    configure_tiles(16);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t row0 = b * kBlock;
      int rows = min_int(kBlock, M - row0);
      HalfBlock block = whole_block(x, row0, rows, K, scratch.block0);
      tile_shrink(block, V, scratch.sums, block_P);
      multiply_small(block_P, kBlock, r, small.data(), S);
      split_bf16(S, kBlock * r, 2, scratch.split);
      pack_expand_rows(scratch.split[0], scratch.split[1], r, V.terms, scratch.expand);
      tile_expand(block, rows, scratch.expand, V, reinterpret_cast<uint16_t*>(address(z, row0, 0)), z.stride,
                  scratch.sums);
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
  TilePanels V(reflectors, threads);
  Rows out = {dx, kBFloat16, K};
  int64_t dV_size = dV ? K * V.columns * height : 0, dT_size = dV ? int64_t(rp) * rp : 0;
  Buffer<double> small_S(r * rp), small_R(r * rp), pair_R(r * rp), partial_dT(sums * dT_size);
  Buffer<float> partial_dV(sums * dV_size);
  pad_matrix(T, r, !reverse, small_S.data());
  pad_matrix(T, r, reverse, small_R.data());
  to_pair_basis(T, r, reverse, pair_R.data());
  threads = useful_threads(threads, sums, M * K * r / 2);
  TileWorkspace workspace(K, r, V.columns, V.terms, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadTiles scratch(workspace);
    float *Q = scratch.small[0], *R = scratch.small[1], *S = scratch.small[2], *block_P = scratch.small[3];
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
        if (dx) {
          multiply_small(Q, kBlock, r, pair_R.data(), R);
          split_bf16(R, kBlock * r, 2, scratch.split);
          pack_expand_rows(scratch.split[0], scratch.split[1], r, V.terms, scratch.expand);
          tile_expand(dz_block, rows, scratch.expand, V, reinterpret_cast<uint16_t*>(address(out, row0, 0)), K,
                      scratch.sums);
        }
        if (!dV) continue;
        HalfBlock x_block = whole_block(x, row0, rows, K, scratch.block1);
        to_plain_basis(Q, kBlock, r);
        memset(block_P, 0, kBlock * r * sizeof(float));
        memcpy(block_P, P + row0 * r, rows * r * sizeof(float));
        multiply_small(Q, kBlock, r, small_R.data(), R);
        multiply_small(block_P, kBlock, r, small_S.data(), S);
        widen_small(block_P, kBlock, r, scratch.wide[0]);
        widen_small(Q, kBlock, r, scratch.wide[1]);
        cross_accumulate(scratch.wide[reverse ? 0 : 1], scratch.wide[reverse ? 1 : 0], kBlock, r, -1, false, sum_dT);
        split_bf16(S, kBlock * r, kTerms, scratch.split);
        pack_outer_rows(scratch.split, r, V.columns, height, scratch.outer_S);
        split_bf16(R, kBlock * r, kTerms, scratch.split);
        pack_outer_rows(scratch.split, r, V.columns, height, scratch.outer_R);
        configure_tiles(height);
        OuterOperand operands[] = {{dz_block, scratch.outer_S}, {x_block, scratch.outer_R}};
        tile_outer(operands, 2, V.columns, height, V.panels, scratch.pairs, sum_dV);
      }
    }
  }
  if (!dV) return;
  add_tile_sums(partial_dV.data(), sums, K, r, V.columns, height, dV, requested);
  add_partial_dT(partial_dT.data(), sums, r, dT);
}

void pack_linear_tiles(const Rows& x, int64_t M, const Rows& W, int64_t N, const Reflectors& reflectors,
                       const double* T, const Rows& xs, const Rows& ws, float* P, int threads) {
  int r = reflectors.r;
  int64_t K = reflectors.K, x_blocks = ceil_div(M, kBlock), blocks = x_blocks + ceil_div(N, kBlock);
  TilePanels V(reflectors, threads);
  Buffer<double> small(int64_t(r) * padded_rank(r));
  to_pair_basis(T, r, true, small.data());
  threads = useful_threads(threads, blocks, (M + N) * K * r / 8);
  TileWorkspace workspace(K, r, V.columns, V.terms, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadTiles scratch(workspace);
    float *product = scratch.small[0], *tail = scratch.small[1];
    configure_tiles(16);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
      bool is_x = b < x_blocks;
      const Rows& in = is_x ? x : W;
      int64_t row0 = (is_x ? b : b - x_blocks) * kBlock;
      int rows = min_int(kBlock, (is_x ? M : N) - row0);
      tile_shrink(whole_block(in, row0, rows, K, scratch.block0), V, scratch.sums, product);
      if (is_x) {
        multiply_small(product, rows, r, small.data(), tail);
        to_plain_basis(product, rows, r);
        memcpy(P + row0 * r, product, rows * r * sizeof(float));
      } else {
        for (int i = 0; i < rows * r; i++) tail[i] = -product[i];
      }
      write_augmented(in, tail, row0, rows, K, r, is_x, is_x ? xs : ws);
    }
  }
}

void project_tiles(const Rows& x, int64_t M, const Reflectors& reflectors, float* P, int threads) {
  int r = reflectors.r;
  int64_t K = reflectors.K, blocks = ceil_div(M, kBlock);
  TilePanels V(reflectors, threads);
  threads = useful_threads(threads, blocks, M * K * r / 8);
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
      to_plain_basis(block_P, rows, r);
      memcpy(P + row0 * r, block_P, rows * r * sizeof(float));
    }
  }
}

// dx = addend + dP V^T with bf16 addend (null dx: not wanted), dV = x^T dP (null dV: not wanted).
void project_backward_tiles(const float* dP, const Rows& x, int64_t M, const Reflectors& reflectors, void* dx,
                            float* dV, int threads, const Rows* addend) {
  int r = reflectors.r, requested = threads, height = r <= 8 ? 8 : 16;
  int64_t K = reflectors.K, sum_rows = rows_per_sum(M), sums = ceil_div(M, sum_rows);
  TilePanels V(reflectors, threads);
  Rows out = {dx, kBFloat16, K};
  int64_t dV_size = dV ? K * V.columns * height : 0;
  Buffer<float> partial_dV(sums * dV_size);
  threads = useful_threads(threads, sums, M * K * r / 4);
  TileWorkspace workspace(K, r, V.columns, V.terms, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadTiles scratch(workspace);
    float *S = scratch.small[0], *paired_S = scratch.small[1];
#pragma omp for schedule(dynamic)
    for (int64_t s = 0; s < sums; s++) {
      float* sum_dV = partial_dV.data() + s * dV_size;
      memset(sum_dV, 0, dV_size * sizeof(float));
      int64_t end = (s + 1) * sum_rows < M ? (s + 1) * sum_rows : M;
      for (int64_t row0 = s * sum_rows; row0 < end; row0 += kBlock) {
        int rows = min_int(kBlock, end - row0);
        memset(S, 0, kBlock * r * sizeof(float));
        for (int i = 0; i < rows * r; i++) S[i] = -dP[row0 * r + i];
        if (dx) {
          HalfBlock base = whole_block(*addend, row0, rows, K, scratch.block0);
          to_paired_coefficients(S, kBlock, r, paired_S);
          split_bf16(paired_S, kBlock * r, 2, scratch.split);
          pack_expand_rows(scratch.split[0], scratch.split[1], r, V.terms, scratch.expand);
          configure_tiles(16);
          tile_expand(base, rows, scratch.expand, V, reinterpret_cast<uint16_t*>(address(out, row0, 0)), K,
                      scratch.sums);
        }
        if (!dV) continue;
        split_bf16(S, kBlock * r, kTerms, scratch.split);
        pack_outer_rows(scratch.split, r, V.columns, height, scratch.outer_S);
        OuterOperand operand = {whole_block(x, row0, rows, K, scratch.block1), scratch.outer_S};
        configure_tiles(height);
        tile_outer(&operand, 1, V.columns, height, V.panels, scratch.pairs, sum_dV);
      }
    }
  }
  if (dV) add_tile_sums(partial_dV.data(), sums, K, r, V.columns, height, dV, requested);
}

// The products of linear_backward: on tiles where they fit, as bf16 blocks with float32 sums.
struct TileProducts {
  static void project(const Rows& x, int64_t M, const Reflectors& V, float* P, int threads) {
    if (worth_tiles(x, M, V))
      project_tiles(x, M, V, P, threads);
    else
      avx512::kernels.project(x, M, V, P, threads);
  }
  static void project_backward(const float* dP, const Rows& x, int64_t M, const Reflectors& V, void* dx, float* dV,
                               int threads, const Rows* addend) {
    if (worth_tiles(x, M, V))
      project_backward_tiles(dP, x, M, V, dx, dV, threads, addend);
    else
      VectorProducts::project_backward(dP, x, M, V, dx, dV, threads, addend);
  }
};

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

void pack_linear_entry(const Rows& x, int64_t M, const Rows& W, int64_t N, const Reflectors& V, const double* T,
                       const Rows& xs, const Rows& ws, void* P, int threads) {
  if (worth_tiles(x, M, V))
    pack_linear_tiles(x, M, W, N, V, T, xs, ws, static_cast<float*>(P), threads);
  else
    avx512::kernels.pack_linear(x, M, W, N, V, T, xs, ws, P, threads);
}

Kernels with_tiles() {
  Kernels table = avx512::kernels;
  table.rotate = rotate_entry;
  table.rotate_backward = rotate_backward_entry;
  table.pack_linear = pack_linear_entry;
  table.linear_backward = linear_backward<TileProducts>;
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
