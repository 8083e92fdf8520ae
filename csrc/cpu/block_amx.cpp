// rotate and rotate_backward for bf16 activations on AMX tiles; every other call goes to the AVX-512 kernels.
// Chosen by dispatch.cpp. All stages of a group of G columns are multiplied out to one dense matrix G x G per call:
// z = x D, dx = dz D^T, dD = x^T dz, and the stages' gradients are those of G rows, the identity, with the incoming dD.
#if defined(__x86_64__)
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include <immintrin.h>

#include "../common/dtype.h"
#include "../common/threads.h"
#include "blocks.h"
#include "householder.h"
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
#define PEFTKERN_ISA amx
#define PEFTKERN_VECTOR_BYTES 64
#include "block_amx.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int kMaxGroup = 128;            // columns of a dense matrix
constexpr int64_t kRunNumbers = 1 << 16;  // of the matrices of a task: they stay in cache over all its rows
constexpr int kRunRows = 128;             // rows of a task that adds nothing up

// Whole groups of the butterfly and whole panels.
inline int64_t group_columns(const Blocks& R) {
  int64_t unit = int64_t(R.b) << (R.f - 1), G = unit;
  while (G % kPanel) G += unit;
  return G;
}

// Tiles do 16 times the multiply-adds of vectors; two terms, and first G rows through several stages in vectors.
inline bool worth_block_tiles(const Rows& x, int64_t M, const Blocks& R) {
  if (x.dtype != kBFloat16 || R.dtype != kFloat32) return false;
  int64_t G = group_columns(R), vector_work = int64_t(R.b) * R.f, once = R.f > 1 ? G * vector_work : G;
  return G <= kMaxGroup && R.K % G == 0 && M * G * kBlockTerms / 16 + once < M * vector_work;
}

// Runs of columns times runs of rows; a task owns the columns of its groups, so that sums need no atomics.
struct GroupTasks {
  GroupTasks(int64_t M, int64_t K, int64_t G, int64_t rows)
      : M(M),
        K(K),
        rows(rows),
        width(round_up(ceil_div(K, ceil_div(K * G, kRunNumbers)), G)),
        runs(ceil_div(K, width)) {}
  int64_t count() const { return runs * ceil_div(M, rows); }
  int64_t first_row(int64_t task) const { return task / runs * rows; }
  int64_t end_row(int64_t task) const { return first_row(task) + rows < M ? first_row(task) + rows : M; }
  int64_t first_column(int64_t task) const { return task % runs * width; }
  int64_t end_column(int64_t task) const { return first_column(task) + width < K ? first_column(task) + width : K; }
  int64_t M, K, rows, width, runs;
};

// 32 rows and G columns in place, or a copy with zeros below where there are fewer rows.
inline HalfBlock group_block(const Rows& x, int64_t row0, int rows, int64_t c0, int64_t G, uint16_t* scratch) {
  if (rows == kBlock) return {reinterpret_cast<const uint16_t*>(address(x, row0, c0)), x.stride};
  memset(scratch, 0, kBlock * G * sizeof(uint16_t));
  for (int i = 0; i < rows; i++) memcpy(scratch + i * G, address(x, row0 + i, c0), G * sizeof(uint16_t));
  return {scratch, G};
}

// Brings a block of rows of a group near, one block before its turn.
inline void prefetch_rows(const Rows& x, int64_t row0, int64_t end, int64_t c0, int64_t G, bool write) {
  for (int64_t row = row0; row < end && row < row0 + kBlock; row++)
    for (int64_t c = c0; c < c0 + G; c += kPanel) {
      if (write)
        __builtin_prefetch(address(x, row, c), 1);
      else
        __builtin_prefetch(address(x, row, c));
    }
}

// Products of blocks of rows with matrices of groups. The tiles work one product ahead of the vectors, which round and
// write the last one; sums is scratch for two, [panels][32][32].
class GroupProducts {
 public:
  GroupProducts(const GroupTiles& R, const Rows& out, const Rows& rest, float* sums)
      : R_(R), out_(out), rest_(rest), sums_(sums) {}

  void add(HalfBlock x, int64_t row0, int rows, int64_t c0, int64_t group) {
    float* sums = sums_ + turn_ * R_.panels * kBlock * kPanel;
    turn_ = 1 - turn_;
    finish_stores();
    for (int p = 0; p < R_.panels; p++) multiply_panel(x, R_, group, p, sums + p * kBlock * kPanel);
    finish();
    last_ = sums;
    row0_ = row0;
    rows_ = rows;
    c0_ = c0;
  }
  void finish() {
    for (int p = 0; last_ && p < R_.panels; p++) {
      int64_t c = c0_ + p * kPanel;
      uint16_t* rest = rest_.data ? reinterpret_cast<uint16_t*>(address(rest_, row0_, c)) : nullptr;
      write_panel(last_ + p * kBlock * kPanel, rows_, reinterpret_cast<uint16_t*>(address(out_, row0_, c)), rest,
                  out_.stride);
    }
    last_ = nullptr;
  }

 private:
  const GroupTiles& R_;
  Rows out_, rest_;
  float *sums_, *last_ = nullptr;
  int turn_ = 0, rows_ = 0;
  int64_t row0_ = 0, c0_ = 0;
};

// The dense matrices of a call and the scratch they come from; eye is what several stages act on.
struct MultipliedOut {
  MultipliedOut(const Blocks& R, int64_t G, bool transpose, int threads)
      : eye(R.f > 1 ? G * R.K : 0),
        numbers(G * R.K),
        matrices(R.f > 1 ? multiply_out(R, G, transpose, eye.data(), numbers.data(), threads)
                         : spread_blocks(R, G, transpose, numbers.data(), threads)) {}
  Buffer<float> eye, numbers;
  GroupMatrices matrices;
};

void rotate_tiles(const Rows& x, int64_t M, const Blocks& R, bool transpose, const Rows& z, const Rows& rest,
                  int threads) {
  int64_t K = R.K, G = group_columns(R);
  MultipliedOut dense(R, G, transpose, threads);
  GroupTiles D(dense.matrices, K, G, threads);
  GroupTasks tasks(M, K, G, kRunRows);
  threads = useful_threads(threads, tasks.count(), M * K * G / 8);
  Buffer<float> sums(threads * 2 * kBlock * G);
  Buffer<uint16_t> copies(threads * kBlock * G);
#pragma omp parallel num_threads(threads)
  {
    float* own_sums = sums.data() + thread_index() * 2 * kBlock * G;
    uint16_t* copy = copies.data() + thread_index() * kBlock * G;
    configure_tiles(16);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks.count(); task++) {
      GroupProducts products(D, z, rest, own_sums);
      int64_t end = tasks.end_row(task), last = tasks.end_column(task);
      for (int64_t row0 = tasks.first_row(task); row0 < end; row0 += kBlock) {
        int rows = min_int(kBlock, end - row0);
        for (int64_t c0 = tasks.first_column(task); c0 < last; c0 += G) {
          prefetch_rows(x, row0 + kBlock, end, c0, G, false);
          prefetch_rows(z, row0 + kBlock, end, c0, G, true);
          products.add(group_block(x, row0, rows, c0, G, copy), row0, rows, c0, c0 / G);
        }
      }
      products.finish();
    }
    _tile_release();
  }
}

// Rows that one sum of dD takes: few sums, which are as large as the blocks, but tasks for many threads.
inline int64_t rows_per_group_sum(int64_t M) { return round_up(ceil_div(M, 32) > 256 ? ceil_div(M, 32) : 256, kBlock); }

void rotate_backward_tiles(const Rows& dz, const Rows& x, int64_t M, const Blocks& R, bool transpose, void* dx,
                           float* dR, int threads) {
  int64_t K = R.K, G = group_columns(R);
  int requested = threads, panels = int(G / kPanel);
  MultipliedOut dense(R, G, !transpose, threads);
  GroupTiles D(dense.matrices, K, G, threads);
  GroupTasks tasks(M, K, G, rows_per_group_sum(M));
  int64_t sum_size = K * G, sums = ceil_div(M, tasks.rows), packed_size = panels * 2 * kTile;
  bool in_place = dx == dz.data;
  Buffer<float> partial(dR ? sums * sum_size : 0);
  Rows out = {dx, kBFloat16, K};
  threads = useful_threads(threads, tasks.count(), M * K * G / 4);
  Buffer<float> products_sums(threads * 2 * kBlock * G);
  Buffer<uint16_t> copies(threads * 2 * kBlock * G), packed(threads * 2 * packed_size);
#pragma omp parallel num_threads(threads)
  {
    float* own_sums = products_sums.data() + thread_index() * 2 * kBlock * G;
    uint16_t *copy_g = copies.data() + thread_index() * 2 * kBlock * G, *copy_x = copy_g + kBlock * G;
    uint16_t *packed_x = packed.data() + thread_index() * 2 * packed_size, *packed_g = packed_x + packed_size;
    configure_tiles(16);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks.count(); task++) {
      GroupProducts products(D, out, {}, own_sums);
      int64_t end = tasks.end_row(task), first = tasks.first_column(task), last = tasks.end_column(task);
      float* sum = partial.data() + tasks.first_row(task) / tasks.rows * sum_size;
      if (dR) memset(sum + first * G, 0, (last - first) * G * sizeof(float));
      for (int64_t row0 = tasks.first_row(task); row0 < end; row0 += kBlock) {
        int rows = min_int(kBlock, end - row0);
        for (int64_t c0 = first; c0 < last; c0 += G) {
          prefetch_rows(dz, row0 + kBlock, end, c0, G, in_place);
          if (dx && !in_place) prefetch_rows(out, row0 + kBlock, end, c0, G, true);
          if (dR) prefetch_rows(x, row0 + kBlock, end, c0, G, false);
          HalfBlock g = group_block(dz, row0, rows, c0, G, copy_g);
          if (dR) {
            HalfBlock u = group_block(x, row0, rows, c0, G, copy_x);
            for (int p = 0; p < panels; p++) {
              pack_transposed({u.data + p * kPanel, u.stride}, packed_x + p * 2 * kTile);
              pack_gradient({g.data + p * kPanel, g.stride}, packed_g + p * 2 * kTile);
            }
          }
          if (dx) products.add(g, row0, rows, c0, c0 / G);
          if (!dR) continue;
          finish_stores();
          for (int p = 0; p < panels; p++)
            for (int q = 0; q < panels; q++)
              outer_panel(packed_x + p * 2 * kTile, packed_g + q * 2 * kTile, sum + c0 * G + (p * panels + q) * 1024);
        }
      }
      products.finish();
    }
    _tile_release();
  }
  if (!dR) return;
  int64_t groups = K / G;
  const GroupMatrices& dD = dense.matrices;
  threads = useful_threads(requested, groups, (sums + 1) * sum_size);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups; g++) unpack_sums(partial.data() + g * G * G, sums, sum_size, G, dD.of(g), dD.ld);
  if (R.f == 1)
    gather_blocks(dD, R, G, transpose, dR, requested);
  else
    avx512::block_kernels.rotate_backward({dD.data, kFloat32, K}, {dense.eye.data(), kFloat32, K}, G, R, transpose,
                                          nullptr, dR, requested);
}

void rotate_blocks_entry(const Rows& x, int64_t M, const Blocks& R, bool transpose, const Rows& z, const Rows& rest,
                         int threads) {
  if (worth_block_tiles(x, M, R) && z.dtype == kBFloat16)
    rotate_tiles(x, M, R, transpose, z, rest, threads);
  else
    avx512::block_kernels.rotate(x, M, R, transpose, z, rest, threads);
}

void rotate_blocks_backward_entry(const Rows& dz, const Rows& x, int64_t M, const Blocks& R, bool transpose, void* dx,
                                  void* dR, int threads) {
  if (worth_block_tiles(x, M, R))
    rotate_backward_tiles(dz, x, M, R, transpose, dx, static_cast<float*>(dR), threads);
  else
    avx512::block_kernels.rotate_backward(dz, x, M, R, transpose, dx, dR, threads);
}

// A function, so that the order in which the tables are initialised does not matter.
const BlockKernels& block_kernels() {
  static const BlockKernels table = [] {
    BlockKernels with_tiles = avx512::block_kernels;
    with_tiles.rotate = rotate_blocks_entry;
    with_tiles.rotate_backward = rotate_blocks_backward_entry;
    return with_tiles;
  }();
  return table;
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif
