// project, rotate and rotate_backward over blocks of 32 rows that stay in L2 between their two passes.
// Compiled once per instruction set; arithmetic in V's dtype C, activations read and written in theirs, one rounding at
// the store. P = x V, S = P T^T, z = x - S V^T;  Q = dz V, R = Q T, dx = dz - R V^T, dV = -dz^T S - x^T R, dT = -Q^T P.
#pragma once

#include "panels.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Rows per partial sum of dV and dT: a function of the shape alone, so the sum does not depend on the number of
// threads.
inline int64_t rows_per_sum(int64_t M) { return round_up(ceil_div(M, 32) > 128 ? ceil_div(M, 32) : 128, kBlock); }

// Scratch of one thread.
template <class C>
struct Workspace {
  Workspace(int r, int threads)
      : lanes_size(int64_t(kBlock) * r * Vec<C>::W),
        small_size(int64_t(kBlock) * padded_rank(r)),
        lanes(threads * lanes_size),
        tile0(threads * kBlock * kChunk),
        tile1(threads * kBlock * kChunk),
        out(threads * kBlock * kChunk),
        small(threads * 4 * small_size),
        wide(threads * 2 * small_size) {}

  const int64_t lanes_size, small_size;
  Buffer<C> lanes, tile0, tile1, out, small;
  Buffer<double> wide;
};

template <class C>
struct ThreadScratch {
  explicit ThreadScratch(Workspace<C>& w) {
    int t = thread_index();
    lanes = w.lanes.data() + t * w.lanes_size;
    tile0 = w.tile0.data() + t * kBlock * kChunk;
    tile1 = w.tile1.data() + t * kBlock * kChunk;
    out = w.out.data() + t * kBlock * kChunk;
    for (int i = 0; i < 4; i++) small[i] = w.small.data() + (4 * t + i) * w.small_size;
    for (int i = 0; i < 2; i++) wide[i] = w.wide.data() + (2 * t + i) * w.small_size;
  }
  C *lanes, *tile0, *tile1, *out, *small[4];
  double* wide[2];
};

// P [rows][r] = x V for one block.
template <class C>
void shrink(const Rows& x, int64_t row0, int rows, int64_t K, const Panels<C>& V, C* P, ThreadScratch<C>& scratch) {
  int64_t lanes = int64_t(rows) * V.r;
  memset(scratch.lanes, 0, lanes * Vec<C>::W * sizeof(C));
  for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
    int cols = min_int(kChunk, K - k0), panels = int(ceil_div(cols, kPanel));
    Tile<C> tile = fetch(x, row0, rows, k0, cols, scratch.tile0);
    dot(tile, rows, V.panel(k0 / kPanel), V.r, panels, scratch.lanes);
  }
  reduce_lanes(scratch.lanes, lanes, P);
}

// Columns [k0, k0 + cols) of out = tile - S V^T.
template <class C>
void expand_chunk(Tile<C> tile, int rows, const C* S, const Panels<C>& V, int64_t k0, int cols, const Rows& out,
                  int64_t row0, C* scratch) {
  bool direct = out.dtype == dtype_of<C>::value && cols % kPanel == 0;
  C* dst = direct ? reinterpret_cast<C*>(address(out, row0, k0)) : scratch;
  int64_t ld = direct ? out.stride : kChunk;
  for (int c = 0; c < cols; c += kPanel)
    expand<C>({tile.data + c, tile.ld}, rows, S, V.panel((k0 + c) / kPanel), V.r, dst + c, ld);
  if (direct) return;
  for (int i = 0; i < rows; i++) write_row(address(out, row0 + i, k0), out.dtype, scratch + i * kChunk, cols);
}

template <class C>
void project(const Rows& x, int64_t M, int64_t K, const Panels<C>& V, C* P, int threads) {
  int r = V.r;
  int64_t blocks = ceil_div(M, kBlock);
  threads = useful_threads(threads, blocks, M * K * r);
  Workspace<C> workspace(r, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadScratch<C> scratch(workspace);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t row0 = b * kBlock;
      shrink(x, row0, min_int(kBlock, M - row0), K, V, P + row0 * r, scratch);
    }
  }
}

template <class C>
void project(const Rows& x, int64_t M, const Reflectors& V, C* P, int threads) {
  project(x, M, V.K, Panels<C>(V, false, threads), P, threads);
}

// dV [K][r] = sum over partial sums [K/32][r][32], in order.
template <class C>
void add_partial_dV(const C* partial, int64_t sums, int64_t K, int r, C* dV, int threads) {
  int64_t panels = ceil_div(K, kPanel), size = panels * r * kPanel;
  threads = useful_threads(threads, panels, sums * size);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < panels; p++) {
    int cols = min_int(kPanel, K - p * kPanel);
    for (int j = 0; j < r; j++) {
      C sum[kPanel] = {};
      for (int64_t s = 0; s < sums; s++) {
        const C* row = partial + s * size + (p * r + j) * kPanel;
        for (int k = 0; k < kPanel; k++) sum[k] += row[k];
      }
      for (int k = 0; k < cols; k++) dV[(p * kPanel + k) * r + j] = sum[k];
    }
  }
}

// dT [r][r] = sum over partial sums [rp][rp], in order.
inline void add_partial_dT(const double* partial, int64_t sums, int r, double* dT) {
  int rp = padded_rank(r);
  for (int i = 0; i < r; i++)
    for (int j = 0; j < r; j++) {
      double sum = 0;
      for (int64_t s = 0; s < sums; s++) sum += partial[(s * rp + i) * rp + j];
      dT[i * r + j] = sum;
    }
}

// S [rows][r] = -dP turns the two accumulating kernels, which subtract, into dx = dP V^T and dV += x^T dP.
template <class C>
void project_backward(const C* dP, const Rows& x, int64_t M, const Reflectors& reflectors, void* dx, C* dV,
                      int threads) {
  int r = reflectors.r, requested = threads;
  int64_t K = reflectors.K, sum_rows = rows_per_sum(M), sums = ceil_div(M, sum_rows);
  Panels<C> V(reflectors, false, threads);
  Rows out = {dx, x.dtype, K};
  int64_t dV_size = dV ? V.count * r * kPanel : 0;
  Buffer<C> partial_dV(sums * dV_size);
  threads = useful_threads(threads, sums, 2 * M * K * r);
  Workspace<C> workspace(r, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadScratch<C> scratch(workspace);
    C* S = scratch.small[0];
    memset(scratch.tile1, 0, kBlock * kChunk * sizeof(C));
#pragma omp for schedule(dynamic)
    for (int64_t s = 0; s < sums; s++) {
      C* sum_dV = partial_dV.data() + s * dV_size;
      memset(sum_dV, 0, dV_size * sizeof(C));
      int64_t end = (s + 1) * sum_rows < M ? (s + 1) * sum_rows : M;
      for (int64_t row0 = s * sum_rows; row0 < end; row0 += kBlock) {
        int rows = min_int(kBlock, end - row0);
        for (int i = 0; i < rows * r; i++) S[i] = -dP[row0 * r + i];
        for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
          int cols = min_int(kChunk, K - k0);
          if (dx) expand_chunk<C>({scratch.tile1, kChunk}, rows, S, V, k0, cols, out, row0, scratch.out);
          if (!dV) continue;
          Tile<C> tile = fetch(x, row0, rows, k0, cols, scratch.tile0);
          for (int c = 0; c < cols; c += kPanel) outer<C>({tile.data + c, tile.ld}, rows, S, r, sum_dV + (k0 + c) * r);
        }
      }
    }
  }
  if (dV) add_partial_dV(partial_dV.data(), sums, K, r, dV, requested);
}

template <class C>
inline void read_row(C* dst, const Rows& x, int64_t row, int64_t cols) {
  const char* src = address(x, row, 0);
  if (x.dtype == kFloat64) widen(dst, reinterpret_cast<const double*>(src), int(cols));
  if (x.dtype == kFloat32) widen(dst, reinterpret_cast<const float*>(src), int(cols));
  if (x.dtype == kBFloat16) widen(dst, reinterpret_cast<const bf16*>(src), int(cols));
  if (x.dtype == kFloat16) widen(dst, reinterpret_cast<const fp16*>(src), int(cols));
}

// Decoding: packing V into panels would cost more than a handful of rows does.
constexpr int kFewRows = 4;

// The columns v_j [K] one after the other: as they lie, or copied.
template <class C>
class LongColumns {
 public:
  explicit LongColumns(const Reflectors& V)
      : copy_(V.stride_k == 1 ? 0 : V.r * V.K), data_(static_cast<const C*>(V.data)), stride_(V.stride_r) {
    if (V.stride_k == 1) return;
    for (int64_t k = 0; k < V.K; k++)
      for (int j = 0; j < V.r; j++) copy_[j * V.K + k] = data_[k * V.stride_k + j * V.stride_r];
    data_ = copy_.data(), stride_ = V.K;
  }
  const C* operator[](int j) const { return data_ + j * stride_; }

 private:
  Buffer<C> copy_;
  const C* data_;
  int64_t stride_;
};

// P [NR] = x V for one row and NR columns from j on.
template <class C, int NR>
inline void dot_columns(const C* x, const LongColumns<C>& V, int j, int64_t K, C* P) {
  using L = Vec<C>;
  typename L::type acc[NR][2] = {};
  int64_t k = 0;
  for (; k + 2 * L::W <= K; k += 2 * L::W)
    for (int u = 0; u < 2; u++) {
      typename L::type row = L::load(x + k + u * L::W);
      for (int c = 0; c < NR; c++) acc[c][u] += row * L::load(V[j + c] + k + u * L::W);
    }
  for (int c = 0; c < NR; c++) {
    P[j + c] = L::sum(acc[c][0] + acc[c][1]);
    for (int64_t t = k; t < K; t++) P[j + c] += x[t] * V[j + c][t];
  }
}

// x -= S V^T for one row and NR columns from j on.
template <class C, int NR>
inline void subtract_columns(C* x, const C* S, const LongColumns<C>& V, int j, int64_t K) {
  using L = Vec<C>;
  int64_t k = 0;
  for (; k + L::W <= K; k += L::W) {
    typename L::type update = {};
    for (int c = 0; c < NR; c++) update += S[j + c] * L::load(V[j + c] + k);
    L::store(x + k, L::load(x + k) - update);
  }
  for (; k < K; k++) {
    C update = 0;
    for (int c = 0; c < NR; c++) update += S[j + c] * V[j + c][k];
    x[k] -= update;
  }
}

template <class C>
void rotate_few_rows(const Rows& x, int64_t M, const Reflectors& V, const double* core, const Rows& z, C* P) {
  constexpr int NR = 8;
  int r = V.r;
  LongColumns<C> columns(V);
  Buffer<C> row(V.K);
  C S[kMaxRank];
  for (int64_t i = 0; i < M; i++, P += r) {
    read_row(row.data(), x, i, V.K);
    int j = 0;
    for (; j + NR <= r; j += NR) dot_columns<C, NR>(row.data(), columns, j, V.K, P);
    for (; j < r; j++) dot_columns<C, 1>(row.data(), columns, j, V.K, P);
    multiply_small(P, 1, r, core, S);
    for (j = 0; j + NR <= r; j += NR) subtract_columns<C, NR>(row.data(), S, columns, j, V.K);
    // Neighbours together: in a pair they nearly cancel.
    for (; j + 2 <= r; j += 2) subtract_columns<C, 2>(row.data(), S, columns, j, V.K);
    for (; j < r; j++) subtract_columns<C, 1>(row.data(), S, columns, j, V.K);
    write_row(address(z, i, 0), z.dtype, row.data(), int(V.K));
  }
}

template <class C>
void rotate(const Rows& x, int64_t M, const Reflectors& reflectors, const double* T, bool reverse, const Rows& z, C* P,
            int threads) {
  int r = reflectors.r;
  int64_t K = reflectors.K, blocks = ceil_div(M, kBlock);
  Buffer<double> small(int64_t(r) * padded_rank(r));
  pad_matrix(T, r, !reverse, small.data());
  if (M <= kFewRows) return rotate_few_rows(x, M, reflectors, small.data(), z, P);
  Panels<C> V(reflectors, false, threads);
  threads = useful_threads(threads, blocks, 2 * M * K * r);
  Workspace<C> workspace(r, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadScratch<C> scratch(workspace);
    C* S = scratch.small[0];
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t row0 = b * kBlock;
      int rows = min_int(kBlock, M - row0);
      shrink(x, row0, rows, K, V, P + row0 * r, scratch);
      multiply_small(P + row0 * r, rows, r, small.data(), S);
      for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
        int cols = min_int(kChunk, K - k0);
        Tile<C> tile = fetch(x, row0, rows, k0, cols, scratch.tile0);
        expand_chunk(tile, rows, S, V, k0, cols, z, row0, scratch.out);
      }
    }
  }
}

template <class C>
void rotate_backward(const Rows& dz, const Rows& x, int64_t M, const C* P, const Reflectors& reflectors,
                     const double* T, bool reverse, void* dx, C* dV, double* dT, int threads) {
  int r = reflectors.r, rp = padded_rank(r), requested = threads;
  int64_t K = reflectors.K, sum_rows = rows_per_sum(M), sums = ceil_div(M, sum_rows);
  Panels<C> V(reflectors, false, threads);
  Rows out = {dx, dz.dtype, K};
  // Without dV a partial sum is only a unit of scheduling.
  int64_t dV_size = dV ? V.count * r * kPanel : 0, dT_size = dV ? int64_t(rp) * rp : 0;
  Buffer<double> small_S(r * rp), small_R(r * rp), partial_dT(sums * dT_size);
  Buffer<C> partial_dV(sums * dV_size);
  pad_matrix(T, r, !reverse, small_S.data());
  pad_matrix(T, r, reverse, small_R.data());
  threads = useful_threads(threads, sums, 4 * M * K * r);
  Workspace<C> workspace(r, threads);
#pragma omp parallel num_threads(threads)
  {
    ThreadScratch<C> scratch(workspace);
    C *Q = scratch.small[0], *R = scratch.small[1], *S = scratch.small[2];
#pragma omp for schedule(dynamic)
    for (int64_t s = 0; s < sums; s++) {
      C* sum_dV = partial_dV.data() + s * dV_size;
      double* sum_dT = partial_dT.data() + s * dT_size;
      memset(sum_dV, 0, dV_size * sizeof(C));
      memset(sum_dT, 0, dT_size * sizeof(double));
      int64_t end = (s + 1) * sum_rows < M ? (s + 1) * sum_rows : M;
      for (int64_t row0 = s * sum_rows; row0 < end; row0 += kBlock) {
        int rows = min_int(kBlock, end - row0);
        shrink(dz, row0, rows, K, V, Q, scratch);
        multiply_small(Q, rows, r, small_R.data(), R);
        if (dV) {
          const C* block_P = P + row0 * r;
          multiply_small(block_P, rows, r, small_S.data(), S);
          widen_small(block_P, rows, r, scratch.wide[0]);
          widen_small(Q, rows, r, scratch.wide[1]);
          if (reverse)
            cross_accumulate(scratch.wide[0], scratch.wide[1], rows, r, -1, false, sum_dT);
          else
            cross_accumulate(scratch.wide[1], scratch.wide[0], rows, r, -1, false, sum_dT);
        }
        for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
          int cols = min_int(kChunk, K - k0);
          Tile<C> dz_tile = fetch(dz, row0, rows, k0, cols, scratch.tile0);
          if (dV) {
            Tile<C> x_tile = fetch(x, row0, rows, k0, cols, scratch.tile1);
            for (int c = 0; c < cols; c += kPanel) {
              C* D = sum_dV + (k0 + c) * r;
              outer<C>({dz_tile.data + c, dz_tile.ld}, rows, S, r, D);
              outer<C>({x_tile.data + c, x_tile.ld}, rows, R, r, D);
            }
          }
          if (dx) expand_chunk(dz_tile, rows, R, V, k0, cols, out, row0, scratch.out);
        }
      }
    }
  }
  if (!dV) return;
  add_partial_dV(partial_dV.data(), sums, K, r, dV, requested);
  add_partial_dT(partial_dT.data(), sums, r, dT);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
