// rotate and rotate_backward: all stages of a tile of 32 rows in cache, one read and one write of the activations.
// Compiled once per instruction set; arithmetic in R's dtype C, activations in theirs, one rounding at the store.
// Forward u_0 = x, u_(t+1) = u_t B_t, z = u_f; backward g_f = dz, dB_t = u_t^T g_(t+1), g_t = g_(t+1) B_t^T, dx = g_0,
// with the u_t replayed from x (f - 1 stages; going back from z would take 2 f - 1).
#pragma once

#include <type_traits>

#include "../common/buffer.h"
#include "../common/threads.h"
#include "block_windows.h"
#include "rotate.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int64_t kRotateChunk = 256;  // columns of a tile: 32 rows of them and their blocks stay in cache

// The blocks in the order of application: of each stage rows padded to whole vectors (in place where R already is
// that), or the coefficients of its windows.
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
        whole_windows(R.K % W == 0),
        transpose_(transpose),
        in_place_(bp == R.b && transpose == reverse),
        source_(static_cast<const C*>(R.data)),
        packed_(R.f * stage_size()),
        lanes_(R.f * 16 * W) {
    for (int s = 0; s < f; s++) {
      if (windows(s))
        pack_windows(s, transpose != reverse, threads);
      else if (!in_place_)
        pack_blocks(s, transpose != reverse, threads);
    }
  }

  // Stage that is applied at step t.
  int stage(int t) const { return transpose_ ? t : f - 1 - t; }
  bool windows(int stage) const { return whole_windows && windows_serve<C>(b, stage); }
  // Numbers of one stage, packed either way.
  int64_t stage_size() const { return blocks * size; }
  const C* coefficients(int stage) const { return packed_.data() + stage * stage_size(); }
  // The permutations of the windows of a stage.
  const typename Shuffle<C>::index* lanes(int stage) const { return lanes_.data() + stage * 16 * W; }
  const C* block(int stage, int64_t j) const {
    if (stored == 1) j = 0;
    return in_place_ ? source_ + (stage * stored + j) * size : coefficients(stage) + j * size;
  }
  // Whether step t can write rows of a dtype where they belong: no rounding, and no store beyond a block.
  bool writes_in_place(int t, Dtype dtype) const {
    return dtype == dtype_of<C>::value && (bp == b || stage(t) > 0 || windows(0));
  }

  const int f, b, half;
  const int64_t blocks, stored, bp, size;
  const bool whole_windows;

 private:
  void pack_blocks(int stage, bool flip, int threads) {
    const C* source = source_ + stage * stored * b * b;
    C* target = packed_.data() + stage * stage_size();
    threads = useful_threads(threads, stored, stored * size * 4);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < stored; j++) {
      const C* from = source + j * b * b;
      C* to = target + j * size;
      for (int k = 0; k < b; k++)
        for (int64_t c = 0; c < bp; c++) to[k * bp + c] = c >= b ? 0 : flip ? from[c * b + k] : from[k * b + c];
    }
  }

  void pack_windows(int stage, bool flip, int threads) {
    const C* source = source_ + stage * stored * b * b;
    C* target = packed_.data() + stage * stage_size();
    WindowLayout layout(b, stage, W);
    WindowTables<C> tables(layout, flip, stored == 1);
    int64_t count = layout.count(blocks * b);
    int numbers = layout.vectors() * W;
    memcpy(lanes_.data() + stage * 16 * W, tables.lanes, sizeof tables.lanes);
    threads = useful_threads(threads, count, count * numbers);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t w = 0; w < count; w++) {
      const C* from = source + (stored == 1 ? 0 : layout.first_block(w) * b * b);
      for (int i = 0; i < numbers; i++) target[w * numbers + i] = from[tables.entries[i]];
    }
  }

  const bool transpose_, in_place_;
  const C* source_;
  Buffer<C> packed_;
  Buffer<typename Shuffle<C>::index> lanes_;
};

// Columns that a tile takes at once: whole groups of the last stage, half as many where several stages need tiles.
inline int64_t rotate_chunk(const Blocks& R) {
  int64_t unit = int64_t(R.b) << (R.f - 1), wanted = R.f == 1 ? kRotateChunk : kRotateChunk / 2;
  int64_t chunk = unit < wanted ? wanted / unit * unit : unit;
  return chunk < R.K ? chunk : R.K;
}

// Columns [c0, c0 + cols) of a row block as C, zeros up to ld. Copied where the dtypes agree too: rows that lie a power
// of two apart would share few sets of the cache.
template <class C>
Tile<C> read_tile(const Rows& x, int64_t row0, int rows, int64_t c0, int64_t cols, C* scratch, int64_t ld) {
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

// rest = src - its rounding in dst.
inline void write_rest(char* rest, const char* dst, Dtype dtype, const float* src, int cols) {
  for (int c = 0; c < cols; c += kPanel) {
    float left[kPanel];
    int n = min_int(kPanel, cols - c);
    size_t at = c * dtype_size(dtype);
    if (dtype == kFloat32) memcpy(left, dst + at, n * sizeof(float));
    if (dtype == kBFloat16) widen(left, reinterpret_cast<const bf16*>(dst + at), n);
    if (dtype == kFloat16) widen(left, reinterpret_cast<const fp16*>(dst + at), n);
    for (int i = 0; i < n; i++) left[i] = src[c + i] - left[i];
    write_row(rest + at, dtype, left, n);
  }
}
inline void write_rest(char* rest, const char*, Dtype, const double*, int cols) {
  memset(rest, 0, cols * sizeof(double));
}

// Brings the lines of a tile near before its turn: the hardware follows fewer rows than a tile has.
inline void prefetch_tile(const Rows& x, int64_t row0, int rows, int64_t c0, int64_t cols, bool write) {
  int64_t bytes = cols * int64_t(dtype_size(x.dtype));
  for (int i = 0; i < rows; i++) {
    const char* line = address(x, row0 + i, c0);
    for (int64_t o = 0; o < bytes; o += 64) {
      if (write)
        __builtin_prefetch(line + o, 1);
      else
        __builtin_prefetch(line + o);
    }
  }
}

// Tiles of a run of rows, row blocks outermost: of all columns, or of `chunks` runs of them from the first on.
struct TileOrder {
  int64_t first_row, end, K, chunk, chunks, first;
  TileOrder(int64_t first_row, int64_t end, int64_t K, int64_t chunk)
      : TileOrder(first_row, end, K, chunk, 0, ceil_div(K, chunk)) {}
  TileOrder(int64_t first_row, int64_t end, int64_t K, int64_t chunk, int64_t first, int64_t chunks)
      : first_row(first_row), end(end), K(K), chunk(chunk), chunks(chunks), first(first) {}
  int64_t count() const { return ceil_div(end - first_row, kBlock) * chunks; }
  int64_t row(int64_t task) const { return first_row + task / chunks * kBlock; }
  int64_t column(int64_t task) const { return (first + task % chunks) * chunk; }
  int rows(int64_t task) const { return min_int(kBlock, end - row(task)); }
  int64_t columns(int64_t task) const { return K - column(task) < chunk ? K - column(task) : chunk; }
  void prefetch(int64_t task, const Rows& x, bool write) const {
    if (task < count()) prefetch_tile(x, row(task), rows(task), column(task), columns(task), write);
  }
};

// Rows of a tile to columns c0 on of z, and what their rounding leaves.
template <class C>
void write_tile(Tile<C> tile, int rows, const Rows& z, const Rows& rest, int64_t row0, int64_t c0, int64_t cols) {
  for (int i = 0; i < rows; i++) {
    const C* src = tile.data + i * tile.ld;
    char* dst = address(z, row0 + i, c0);
    write_row(dst, z.dtype, src, int(cols));
    if (rest.data) write_rest(address(rest, row0 + i, c0), dst, z.dtype, src, int(cols));
  }
}

// Where block j of a stage lies in a tile of whole groups.
template <class C, class Element>
Columns<Element> block_columns(const BlockPanels<C>& R, int stage, int64_t j, Element* tile, int64_t ld) {
  if (stage == 0) return {tile + j * R.b, tile + (j + 1) * R.b, ld, R.b};
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

// What a thread needs for one stage at a time.
template <class C>
struct StageScratch {
  C *incoming, *product;  // one block of rows each
};

// to = from P for one block of columns.
template <class C>
void multiply_one(const BlockPanels<C>& R, int stage, int64_t j, Columns<const C> from, Columns<C> to, int rows,
                  C* product) {
  const C* P = R.block(stage, j);
  if (stage == 0) return multiply_block(from, rows, R.b, P, R.bp, to.first, to.ld);
  multiply_block(from, rows, R.b, P, R.bp, product, R.bp);
  scatter_units(product, R.bp, to.first, to.second, to.ld, rows, R.half);
}

// out = tile B_s, the blocks j0 on.
template <class C>
void apply_stage(const BlockPanels<C>& R, int stage, int64_t j0, int64_t cols, Tile<C> tile, int rows, OutTile<C> out,
                 const StageScratch<C>& scratch) {
#if PEFTKERN_VECTOR_BYTES > 16
  if constexpr (Shuffle<C>::exists)
    if (R.windows(stage)) {
      WindowLayout layout(R.b, stage, R.W);
      const C* coefficients = R.coefficients(stage) + j0 * R.b * R.b;
      return with_block_size(R.b, [&](auto b) {
        multiply_windows<C, b()>(layout, R.lanes(stage), coefficients, cols, tile.data, tile.ld, rows, out.data,
                                 out.ld);
      });
    }
#endif
  for (int64_t j = 0; j < cols / R.b; j++) {
    Columns<const C> from = block_columns(R, stage, j, tile.data, tile.ld);
    Columns<C> to = block_columns(R, stage, j, out.data, out.ld);
    multiply_one(R, stage, j0 + j, from, to, rows, scratch.product);
  }
}

// The gradient through a stage with input u: sum += u^T g (null sum: not wanted), out = g B_s^T (null out.data).
template <class C>
void reverse_stage(const BlockPanels<C>& R, int stage, int64_t j0, int64_t cols, Tile<C> u, Tile<C> g, int rows, C* sum,
                   OutTile<C> out, const StageScratch<C>& scratch) {
#if PEFTKERN_VECTOR_BYTES > 16
  if constexpr (Shuffle<C>::exists)
    if (R.windows(stage)) {
      WindowLayout layout(R.b, stage, R.W);
      C* D = sum + j0 * R.b * R.b;
      if (sum)
        with_block_size(R.b, [&](auto b) {
          outer_windows<C, b()>(layout, R.lanes(stage), cols, u.data, u.ld, g.data, g.ld, rows, D);
        });
      if (out.data) apply_stage(R, stage, j0, cols, g, rows, out, scratch);
      return;
    }
#endif
  for (int64_t j = 0; j < cols / R.b; j++) {
    Columns<const C> from = block_columns(R, stage, j, g.data, g.ld);
    if (stage > 0) {
      gather_units(scratch.incoming, R.bp, from.first, from.second, g.ld, rows, R.half);
      from = {scratch.incoming, scratch.incoming + R.b, R.bp, R.b};
    }
    if (sum)
      outer_block(block_columns(R, stage, j, u.data, u.ld), rows, R.b, from.first, from.ld, sum + (j0 + j) * R.size,
                  R.bp);
    if (out.data)
      multiply_one(R, stage, j0 + j, from, block_columns(R, stage, j, out.data, out.ld), rows, scratch.product);
  }
}

// One stage of blocks of whole vectors, rows in the dtype of the blocks: nothing is copied. A few rows at a time, so
// that the hardware follows them along all columns; the blocks come from the second level of cache, where they fit.
constexpr int kStraightRows = 16;
constexpr size_t kStraightBytes = 1 << 19;

template <class C>
bool goes_straight(const BlockPanels<C>& R, const Rows& x, const Rows& z) {
  constexpr Dtype own = dtype_of<C>::value;
  bool fits = R.stage_size() * sizeof(C) <= kStraightBytes;
  return R.f == 1 && x.dtype == own && z.dtype == own && R.bp == R.b && !R.windows(0) && fits;
}

template <class C>
void rotate_straight(const Rows& x, int64_t M, const BlockPanels<C>& R, const Rows& z, int threads) {
  int64_t tasks = ceil_div(M, kStraightRows);
  threads = useful_threads(threads, tasks, M * R.blocks * R.size);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks; task++) {
    int64_t row0 = task * kStraightRows;
    int rows = min_int(kStraightRows, M - row0);
    C *from = reinterpret_cast<C*>(address(x, row0, 0)), *to = reinterpret_cast<C*>(address(z, row0, 0));
    for (int64_t j = 0; j < R.blocks; j++, from += R.b, to += R.b) {
      if (j + 2 < R.blocks) prefetch_tile(z, row0, rows, (j + 2) * R.b, R.b, true);
      multiply_block(Columns<const C>{from, from + R.b, x.stride, R.b}, rows, R.b, R.block(0, j), R.bp, to, z.stride);
    }
  }
}

template <class C>
void rotate_blocks(const Rows& x, int64_t M, const Blocks& blocks, bool transpose, const Rows& z, const Rows& rest,
                   int threads) {
  BlockPanels<C> R(blocks, transpose, false, threads);
  int64_t K = blocks.K, chunk = rotate_chunk(blocks), ld = chunk + R.bp;
  if (goes_straight(R, x, z) && !rest.data) return rotate_straight(x, M, R, z, threads);
  TileOrder order(0, M, K, chunk);
  int64_t tasks = order.count();
  bool to_z = !rest.data && R.writes_in_place(R.f - 1, z.dtype);
  threads = useful_threads(threads, tasks, M * K * R.b * R.f);
  Buffer<C> tiles(threads * 2 * kBlock * ld), products(threads * kBlock * R.bp);
#pragma omp parallel num_threads(threads)
  {
    C* first_tile = tiles.data() + 2 * thread_index() * kBlock * ld;
    OutTile<C> scratch[2] = {{first_tile, ld}, {first_tile + kBlock * ld, ld}};
    StageScratch<C> stage_scratch = {nullptr, products.data() + thread_index() * kBlock * R.bp};
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
      int64_t row0 = order.row(task), c0 = order.column(task), cols = order.columns(task);
      int rows = order.rows(task);
      prefetch_tile(z, row0, rows, c0, cols, true);
      order.prefetch(task + 1, x, false);
      Tile<C> tile = read_tile(x, row0, rows, c0, cols, scratch[0].data, ld);
      for (int t = 0; t < R.f; t++) {
        OutTile<C> out = scratch[(t + 1) % 2];
        if (to_z && t == R.f - 1) out = {reinterpret_cast<C*>(address(z, row0, c0)), z.stride};
        apply_stage(R, R.stage(t), c0 / R.b, cols, tile, rows, out, stage_scratch);
        tile = out;
      }
      if (!to_z) write_tile(tile, rows, z, rest, row0, c0, cols);
    }
  }
}

// One stage of dR [stored][b][b] from the sum [blocks][b][bp], over the blocks that share one in order.
template <class C>
void unpack_blocks(const C* sum, const BlockPanels<C>& R, bool transpose, C* dR, int threads) {
  int64_t shared = R.blocks / R.stored;
  int b = R.b;
  threads = useful_threads(threads, R.stored, R.stage_size());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t j = 0; j < R.stored; j++)
    for (int k = 0; k < b; k++) {
      C row[kMaxBlock] = {};
      for (int64_t i = 0; i < shared; i++) {
        const C* from = sum + (j + i) * R.size + k * R.bp;
        for (int c = 0; c < b; c++) row[c] += from[c];
      }
      for (int c = 0; c < b; c++) dR[j * b * b + (transpose ? c * b + k : k * b + c)] = row[c];
    }
}

// The same from the sums of windows.
template <class C>
void unpack_windows(const C* sum, const BlockPanels<C>& R, int stage, bool transpose, C* dR) {
  WindowLayout layout(R.b, stage, R.W);
  WindowTables<C> tables(layout, transpose, R.stored == 1);
  int numbers = layout.vectors() * R.W;
  memset(dR, 0, R.stored * R.b * R.b * sizeof(C));
  for (int64_t w = 0; w < layout.count(R.blocks * R.b); w++, sum += numbers) {
    C* to = dR + (R.stored == 1 ? 0 : layout.first_block(w) * R.b * R.b);
    for (int i = 0; i < numbers; i++) to[tables.entries[i]] += sum[i];
  }
}

// dR [f][stored][b][b] = sum over partial sums, in order; the first of them is overwritten.
template <class C>
void add_partial_dR(C* partial, int64_t sums, const BlockPanels<C>& R, bool transpose, C* dR, int threads) {
  int64_t size = R.f * R.stage_size(), pieces = ceil_div(size, kRotateChunk);
  int useful = useful_threads(threads, pieces, sums * size);
#pragma omp parallel for num_threads(useful) schedule(static)
  for (int64_t p = 0; p < pieces; p++) {
    int64_t end = (p + 1) * kRotateChunk < size ? (p + 1) * kRotateChunk : size;
    for (int64_t s = 1; s < sums; s++)
      for (int64_t i = p * kRotateChunk; i < end; i++) partial[i] += partial[s * size + i];
  }
  for (int s = 0; s < R.f; s++) {
    const C* sum = partial + s * R.stage_size();
    C* out = dR + s * R.stored * R.b * R.b;
    if (R.windows(s))
      unpack_windows(sum, R, s, transpose, out);
    else
      unpack_blocks(sum, R, transpose, out, threads);
  }
}

template <class C>
void rotate_blocks_backward(const Rows& dz, const Rows& x, int64_t M, const Blocks& blocks, bool transpose, void* dx,
                            C* dR, int threads) {
  BlockPanels<C> R(blocks, transpose, true, threads);
  int64_t K = blocks.K, chunk = rotate_chunk(blocks), ld = chunk + R.bp;
  if (M == 0) {
    if (dR) memset(dR, 0, R.f * R.stored * R.b * R.b * sizeof(C));
    return;
  }
  int64_t sum_rows = rows_per_sum(M), sums = ceil_div(M, sum_rows), sum_size = dR ? R.f * R.stage_size() : 0;
  int f = R.f, requested = threads, tile_count = dR ? f + 2 : 2;
  Blocks replayed = blocks;
  if (!dR || f == 1) replayed.f = 0;
  BlockPanels<C> forward(replayed, transpose, false, threads);
  Rows out_rows = {dx, dz.dtype, K};
  bool to_dx = dx && R.writes_in_place(0, x.dtype);
  Buffer<C> partial(sums * sum_size);
  // Fewer sums than threads: the columns are shared out, each with its part of a sum.
  int64_t chunks = ceil_div(K, chunk), runs = sums < threads ? chunks : 1;
  threads = useful_threads(threads, sums * runs, 3 * M * K * R.b * f);
  if (dR && runs > 1) memset(partial.data(), 0, sums * sum_size * sizeof(C));
  Buffer<C> tiles(threads * tile_count * kBlock * ld), temps(threads * 2 * kBlock * R.bp);
#pragma omp parallel num_threads(threads)
  {
    C* scratch = tiles.data() + thread_index() * tile_count * kBlock * ld;
    C* first_temp = temps.data() + thread_index() * 2 * kBlock * R.bp;
    StageScratch<C> stage_scratch = {first_temp, first_temp + kBlock * R.bp};
    memset(first_temp, 0, kBlock * R.bp * sizeof(C));
    auto scratch_tile = [&](int i) { return OutTile<C>{scratch + i * kBlock * ld, ld}; };
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < sums * runs; unit++) {
      int64_t s = unit / runs, first_row = s * sum_rows, end = first_row + sum_rows < M ? first_row + sum_rows : M;
      C* sum = partial.data() + s * sum_size;
      if (dR && runs == 1) memset(sum, 0, sum_size * sizeof(C));
      TileOrder order(first_row, end, K, chunk, unit % runs, chunks / runs);
      for (int64_t task = 0; task < order.count(); task++) {
        int64_t row0 = order.row(task), c0 = order.column(task), cols = order.columns(task), j0 = c0 / R.b;
        int rows = order.rows(task);
        order.prefetch(task + 1, dz, false);
        if (dR) order.prefetch(task + 1, x, false);
        if (dx) prefetch_tile(out_rows, row0, rows, c0, cols, true);
        Tile<C> u[64] = {}, g = read_tile(dz, row0, rows, c0, cols, scratch, ld);
        if (dR) u[0] = read_tile(x, row0, rows, c0, cols, scratch + 2 * kBlock * ld, ld);
        for (int t = 0; dR && t + 1 < f; t++) {
          OutTile<C> next = scratch_tile(t + 3);
          apply_stage(forward, R.stage(t), j0, cols, u[t], rows, next, stage_scratch);
          u[t + 1] = next;
        }
        for (int t = f - 1; t >= 0; t--) {
          OutTile<C> out = scratch_tile((f - t) % 2);
          if (t == 0) {
            if (!dx) out.data = nullptr;
            if (to_dx) out = {reinterpret_cast<C*>(address(out_rows, row0, c0)), K};
          }
          reverse_stage(R, R.stage(t), j0, cols, u[t], g, rows, dR ? sum + R.stage(t) * R.stage_size() : nullptr, out,
                        stage_scratch);
          g = out;
        }
        if (dx && !to_dx) write_tile(g, rows, out_rows, {}, row0, c0, cols);
      }
    }
  }
  if (dR) add_partial_dR(partial.data(), sums, R, transpose, dR, requested);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
