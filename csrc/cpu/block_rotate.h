// rotate and rotate_backward: all stages of a tile of 32 rows in cache, one read and one write of the activations.
// Compiled once per instruction set; arithmetic in R's dtype C, activations in theirs, one rounding at the store.
// Forward u_0 = x, u_(t+1) = u_t B_t, z = u_f; backward g_f = dz, dB_t = u_t^T g_(t+1), g_t = g_(t+1) B_t^T, dx = g_0,
// with the u_t replayed from x (f - 1 stages; going back from z would take 2 f - 1).
#pragma once

#include <type_traits>

#include "../common/buffer.h"
#include "../common/threads.h"
#include "block_tiles.h"
#include "rotate.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int64_t kRotateChunk = 256;  // columns of a tile: 32 rows of them and their blocks stay in cache

// The blocks in the order of application, rows padded to whole vectors; in place where R already is that.
template <class C>
class BlockPanels {
 public:
  static constexpr int W = Vec<C>::W;

  // `reverse` packs the transposes of what x is multiplied with, for the gradient.
  BlockPanels(const Blocks& R, bool transpose, bool reverse, int threads)
      : f(R.f),
        b(R.b),
        half(R.b / 2),
        blocks(R.K / R.b),
        stored(R.stored),
        bp(round_up(R.b, W)),
        size(bp * R.b),
        transpose_(transpose),
        in_place_(bp == R.b && transpose == reverse),
        data_(in_place_ ? static_cast<const C*>(R.data) : nullptr),
        packed_(in_place_ ? 0 : R.f * R.stored * bp * R.b) {
    if (in_place_) return;
    const C* source = static_cast<const C*>(R.data);
    int64_t count = int64_t(f) * stored;
    bool flip = transpose != reverse;
    threads = useful_threads(threads, count, count * size * 4);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < count; j++) {
      const C* from = source + j * b * b;
      C* to = packed_.data() + j * size;
      for (int k = 0; k < b; k++)
        for (int64_t c = 0; c < bp; c++) to[k * bp + c] = c >= b ? 0 : flip ? from[c * b + k] : from[k * b + c];
    }
  }

  // Stage that is applied at step t.
  int stage(int t) const { return transpose_ ? t : f - 1 - t; }
  const C* block(int t, int64_t j) const {
    const C* base = data_ ? data_ : packed_.data();
    return base + (stage(t) * stored + (stored == 1 ? 0 : j)) * size;
  }

  // Whether step t can write rows of a dtype where they belong: no rounding, and no store beyond a block.
  bool writes_in_place(int t, Dtype dtype) const {
    return dtype == dtype_of<C>::value && (bp == b || stage(t) > 0);
  }

  const int f, b, half;
  const int64_t blocks, stored, bp, size;

 private:
  const bool transpose_, in_place_;
  const C* data_;
  Buffer<C> packed_;
};

// Columns that a tile takes at once: whole groups of the last stage, about kRotateChunk.
inline int64_t rotate_chunk(const Blocks& R) {
  int64_t unit = int64_t(R.b) << (R.f - 1), chunk = unit < kRotateChunk ? kRotateChunk / unit * unit : unit;
  return chunk < R.K ? chunk : R.K;
}

// Columns [c0, c0 + cols) of a row block as C with `pad` readable columns behind them; in place where `direct`.
template <class C>
Tile<C> read_tile(const Rows& x, int64_t row0, int rows, int64_t c0, int64_t cols, bool direct, C* scratch,
                  int64_t ld) {
  if (direct) return {reinterpret_cast<const C*>(address(x, row0, c0)), x.stride};
  for (int i = 0; i < rows; i++) {
    const char* src = address(x, row0 + i, c0);
    C* dst = scratch + i * ld;
    if (x.dtype == kFloat64) widen(dst, reinterpret_cast<const double*>(src), int(cols));
    if (x.dtype == kFloat32) widen(dst, reinterpret_cast<const float*>(src), int(cols));
    if (x.dtype == kBFloat16) widen(dst, reinterpret_cast<const bf16*>(src), int(cols));
    if (x.dtype == kFloat16) widen(dst, reinterpret_cast<const fp16*>(src), int(cols));
    for (int64_t c = cols; c < ld; c++) dst[c] = 0;
  }
  return {scratch, ld};
}

inline void write_split(char* high, char* low, Dtype dtype, const float* src, int cols, float* rest) {
  write_row(high, dtype, src, cols);
  if (dtype == kBFloat16) widen(rest, reinterpret_cast<const bf16*>(high), cols);
  if (dtype == kFloat16) widen(rest, reinterpret_cast<const fp16*>(high), cols);
  for (int c = 0; c < cols; c++) rest[c] = src[c] - rest[c];
  write_row(low, dtype, rest, cols);
}
inline void write_split(char*, char*, Dtype, const double*, int, double*) {}

// Rows of a tile to columns c0 on of z, in one, two or three terms K columns apart.
template <class C>
void write_tile(Tile<C> tile, int rows, const Rows& z, int64_t row0, int64_t c0, int64_t cols, int64_t K, int terms,
                C* scratch) {
  size_t size = dtype_size(z.dtype);
  for (int i = 0; i < rows; i++) {
    char* dst = address(z, row0 + i, c0);
    if (terms == 1) {
      write_row(dst, z.dtype, tile.data + i * tile.ld, int(cols));
      continue;
    }
    write_split(dst, dst + K * size, z.dtype, tile.data + i * tile.ld, int(cols), scratch);
    if (terms == 3) memcpy(dst + 2 * K * size, dst, cols * size);
  }
}

// Where block j of a stage lies in a tile of whole groups.
template <class C, class Element>
Columns<Element> block_columns(const BlockPanels<C>& R, int stage, int64_t j, Element* tile, int64_t ld) {
  if (stage == 0) return {tile + j * R.b, tile, ld, R.b};
  int64_t group = j >> stage, t = j & ((int64_t(1) << stage) - 1);
  Element* first = tile + (group << stage) * R.b + t * R.half;
  return {first, first + (int64_t(R.half) << stage), ld, R.half};
}

// A tile that is written.
template <class C>
struct OutTile {
  C* data;
  int64_t ld;
  operator Tile<C>() const { return {data, ld}; }
};

// Block j of out = block j of the tile, at a, times its block of step t; `temp` holds the rows of one block.
template <class C>
void multiply_one(const BlockPanels<C>& R, int t, int64_t j0, int64_t j, Columns<const C> a, int rows, OutTile<C> out,
                  C* temp) {
  const C* P = R.block(t, j0 + j);
  Columns<C> to = block_columns(R, R.stage(t), j, out.data, out.ld);
  if (R.stage(t) == 0) return multiply_block(a, rows, R.b, P, R.bp, to.first, to.ld);
  multiply_block<C>(a, rows, R.b, P, R.bp, temp, R.bp);
  scatter_units(temp, R.bp, to.first, to.second, to.ld, rows, R.half);
}

template <class C>
void apply_stage(const BlockPanels<C>& R, int t, int64_t j0, int64_t count, Tile<C> tile, int rows, OutTile<C> out,
                 C* temp) {
  for (int64_t j = 0; j < count; j++)
    multiply_one(R, t, j0, j, block_columns(R, R.stage(t), j, tile.data, tile.ld), rows, out, temp);
}

template <class C>
void rotate_blocks(const Rows& x, int64_t M, const Blocks& blocks, bool transpose, int terms, const Rows& z,
                   int threads) {
  BlockPanels<C> R(blocks, transpose, false, threads);
  int64_t K = blocks.K, chunk = rotate_chunk(blocks), ld = chunk + R.bp, chunks = ceil_div(K, chunk);
  int64_t tasks = ceil_div(M, kBlock) * chunks;
  bool from_x = x.dtype == dtype_of<C>::value, to_z = terms == 1 && R.writes_in_place(R.f - 1, z.dtype);
  threads = useful_threads(threads, tasks, M * K * R.b * R.f);
  Buffer<C> tiles(threads * 2 * kBlock * ld), temps(threads * kBlock * R.bp);
#pragma omp parallel num_threads(threads)
  {
    C* first_tile = tiles.data() + 2 * thread_index() * kBlock * ld;
    C* scratch[2] = {first_tile, first_tile + kBlock * ld};
    C* temp = temps.data() + thread_index() * kBlock * R.bp;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
      int64_t row0 = task / chunks * kBlock, c0 = task % chunks * chunk, cols = K - c0 < chunk ? K - c0 : chunk;
      int rows = min_int(kBlock, M - row0);
      Tile<C> tile = read_tile(x, row0, rows, c0, cols, from_x, scratch[0], ld);
      for (int t = 0; t < R.f; t++) {
        OutTile<C> out = {scratch[(t + 1) % 2], ld};
        if (to_z && t == R.f - 1) out = {reinterpret_cast<C*>(address(z, row0, c0)), z.stride};
        apply_stage(R, t, c0 / R.b, cols / R.b, tile, rows, out, temp);
        tile = out;
      }
      if (!to_z) write_tile(tile, rows, z, row0, c0, cols, K, terms, scratch[R.f % 2 ? 0 : 1]);
    }
  }
}

// dR [f][stored][b][b] = sum over partial sums [f][K/b][b][bp], in order, and over the blocks that share one.
template <class C>
void add_partial_dR(const C* partial, int64_t sums, const BlockPanels<C>& R, bool transpose, C* dR, int threads) {
  int64_t count = int64_t(R.f) * R.stored, shared = R.blocks / R.stored, stage_size = R.blocks * R.size;
  int b = R.b;
  threads = useful_threads(threads, count, sums * R.f * stage_size);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t j = 0; j < count; j++) {
    const C* first = partial + (R.stored == 1 ? j * stage_size : j * R.size);
    C* out = dR + j * b * b;
    for (int k = 0; k < b; k++) {
      C row[kMaxBlock] = {};
      for (int64_t s = 0; s < sums; s++)
        for (int64_t i = 0; i < shared; i++) {
          const C* from = first + s * R.f * stage_size + i * R.size + k * R.bp;
          for (int c = 0; c < b; c++) row[c] += from[c];
        }
      for (int c = 0; c < b; c++) out[transpose ? c * b + k : k * b + c] = row[c];
    }
  }
}

template <class C>
void rotate_blocks_backward(const Rows& dz, const Rows& x, int64_t M, const Blocks& blocks, bool transpose, void* dx,
                            C* dR, int threads) {
  BlockPanels<C> forward(blocks, transpose, false, threads), R(blocks, transpose, true, threads);
  int64_t K = blocks.K, chunk = rotate_chunk(blocks), ld = chunk + R.bp, chunks = ceil_div(K, chunk);
  int64_t sum_rows = rows_per_sum(M), sums = ceil_div(M, sum_rows), sum_size = dR ? R.f * R.blocks * R.size : 0;
  int f = R.f, requested = threads, tile_count = f + 2;
  Rows out_rows = {dx, dz.dtype, K};
  bool same = x.dtype == dtype_of<C>::value, to_dx = dx && R.writes_in_place(0, x.dtype);
  // Whole vectors of dz are read, of x single numbers.
  bool from_x = same, from_dz = same && (R.bp == R.b || R.stage(f - 1) > 0);
  Buffer<C> partial(sums * sum_size);
  threads = useful_threads(threads, sums, 3 * M * K * R.b * f);
  Buffer<C> tiles(threads * tile_count * kBlock * ld), temps(threads * 2 * kBlock * R.bp);
#pragma omp parallel num_threads(threads)
  {
    C* scratch = tiles.data() + thread_index() * tile_count * kBlock * ld;
    C *g_block = temps.data() + thread_index() * 2 * kBlock * R.bp, *temp = g_block + kBlock * R.bp;
    memset(g_block, 0, kBlock * R.bp * sizeof(C));
    auto scratch_tile = [&](int i) { return OutTile<C>{scratch + i * kBlock * ld, ld}; };
#pragma omp for schedule(dynamic)
    for (int64_t s = 0; s < sums; s++) {
      C* sum = partial.data() + s * sum_size;
      memset(sum, 0, sum_size * sizeof(C));
      int64_t end = (s + 1) * sum_rows < M ? (s + 1) * sum_rows : M;
      for (int64_t task = 0; task < ceil_div(end - s * sum_rows, kBlock) * chunks; task++) {
        int64_t row0 = s * sum_rows + task / chunks * kBlock, c0 = task % chunks * chunk;
        int64_t cols = K - c0 < chunk ? K - c0 : chunk, j0 = c0 / R.b, count = cols / R.b;
        int rows = min_int(kBlock, end - row0);
        Tile<C> u[64] = {}, g = read_tile(dz, row0, rows, c0, cols, from_dz, scratch, ld);
        int spare = 1;
        if (dR) {
          u[0] = read_tile(x, row0, rows, c0, cols, from_x, scratch + 2 * kBlock * ld, ld);
          for (int t = 0; t + 1 < f; t++) {
            OutTile<C> next = scratch_tile(t + 3);
            apply_stage(forward, t, j0, count, u[t], rows, next, temp);
            u[t + 1] = next;
          }
        }
        for (int t = f - 1; t >= 0; t--) {
          int stage = R.stage(t);
          bool last = t == 0;
          OutTile<C> out = scratch_tile(spare);
          if (last && to_dx) out = {reinterpret_cast<C*>(address(out_rows, row0, c0)), K};
          for (int64_t j = 0; j < count; j++) {
            Columns<const C> from = block_columns(R, stage, j, g.data, g.ld);
            if (stage > 0) {
              gather_units(g_block, R.bp, from.first, from.second, g.ld, rows, R.half);
              from = {g_block, g_block, R.bp, R.b};
            }
            if (dR)
              outer_block(block_columns(R, stage, j, u[t].data, u[t].ld), rows, R.b, from.first, from.ld,
                          sum + (stage * R.blocks + j0 + j) * R.size, R.bp);
            if (!last || dx) multiply_one(R, t, j0, j, from, rows, out, temp);
          }
          g = out;
          spare = 1 - spare;
        }
        if (dx && !to_dx) write_tile(g, rows, out_rows, row0, c0, cols, K, 1, temp);
      }
    }
  }
  if (dR) add_partial_dR(partial.data(), sums, R, transpose, dR, requested);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
