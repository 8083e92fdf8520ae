// bf16 products on AMX tiles with fp32 sums: a block of 32 rows X [32,K] against packed reflectors V [K,r].
// Used by isa_amx.cpp; K is a multiple of 32 and X is exact in bf16, so only V and S are split into bf16 terms.
// shrink P = X V and outer D -= S^T X with three terms, expand X - S V^T with two (S_hi V_hi + S_hi V_lo + S_lo V_hi).
#pragma once

#include "exact_backward.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int kTile = 512;  // bf16 elements of a 1 KiB tile: 16 rows of 32, or 16 pairs of rows of 16

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler does not know that tile instructions read memory: without this it may move or drop the stores before
// them.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// `rows` is the height of tiles 0 to 5; tiles 6 and 7 are always whole. Costs about 170 cycles: once per phase of a
// block.
inline void configure_tiles(int rows) {
  TileConfig config;
  for (int t = 0; t < 6; t++) config.rows[t] = uint8_t(rows);
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

typedef uint16_t Half16 __attribute__((vector_size(32)));
typedef uint16_t Half32 __attribute__((vector_size(64)));

inline Half16 round_bf16(VF::type v) { return (Half16)_mm512_cvtneps_pbh((__m512)v); }
inline VF::type widen_bf16(Half16 h) { return (VF::type)(widen_lanes((VH)h) << 16); }

// One 64-byte row of a tile: elements of a and b alternate.
inline Half32 interleave(Half16 a, Half16 b) { return (Half32)(widen_lanes((VH)a) | widen_lanes((VH)b) << 16); }

inline Half32 load_half32(const uint16_t* p) { return (Half32)_mm512_loadu_si512(p); }
inline void store_half32(uint16_t* p, Half32 v) { _mm512_storeu_si512(p, (__m512i)v); }

// Terms of a split: two give 16 significant bits, enough for what is rounded to bf16 next, three give all 24 of fp32.
constexpr int kTerms = 3;

// parts[0] + ... + parts[terms - 1] = value.
inline void split_bf16(const float* values, int n, int terms, uint16_t* const parts[]) {
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    VF::type rest = VF::load(values + i);
    for (int t = 0; t < terms; t++) {
      Half16 part = round_bf16(rest);
      memcpy(parts[t] + i, &part, sizeof part);
      rest -= widen_bf16(part);
    }
  }
  for (; i < n; i++) {
    float rest = values[i];
    for (int t = 0; t < terms; t++) {
      parts[t][i] = to_bf16(rest).bits;
      rest -= to_float(bf16{parts[t][i]});
    }
  }
}

// V in the two layouts that tile products read, negated for expand: brought into the pair basis, or already there.
class TilePanels {
 public:
  TilePanels(const Reflectors& V, bool paired, int threads)
      : r(V.r),
        columns(int(ceil_div(V.r, 16))),
        terms(int(ceil_div(3 * V.r, 32))),
        panels(V.K / kPanel),
        shrink_(panels * columns * kTerms * kTile),
        expand_(panels * 2 * terms * kTile) {
    Panels<float> source(V, paired, threads);
    threads = useful_threads(threads, panels, V.K * V.r * 4);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < panels; p++) pack(source.panel(p), p);
  }

  // Tile (k, j) of panel p, one part of the split.
  const uint16_t* shrink(int64_t p, int column, int part) const {
    return shrink_.data() + ((p * columns + column) * kTerms + part) * kTile;
  }
  // Tile (term and rank, k) of 16 columns, `half` 0 or 1 of panel p.
  const uint16_t* expand(int64_t p, int half, int term) const {
    return expand_.data() + ((p * 2 + half) * terms + term) * kTile;
  }

  const int r, columns, terms;
  const int64_t panels;

 private:
  void pack(const float* v, int64_t p) {
    alignas(64) uint16_t split[3 * kMaxRank + 32][kPanel];
    for (int j = 0; j < r; j++) {
      uint16_t* const parts[] = {split[j], split[r + j], split[2 * r + j]};
      split_bf16(v + j * kPanel, kPanel, kTerms, parts);
    }
    uint16_t* tiles = shrink_.data() + p * columns * kTerms * kTile;
    memset(tiles, 0, columns * kTerms * kTile * sizeof(uint16_t));
    for (int j = 0; j < r; j++)
      for (int part = 0; part < kTerms; part++)
        for (int pair = 0; pair < 16; pair++)
          memcpy(tiles + (j / 16 * kTerms + part) * kTile + (pair * 16 + j % 16) * 2, &split[part * r + j][2 * pair],
                 4);

    // hi, lo, hi of every reflection: the rows t of the expand operand, zeros up to whole tiles.
    memcpy(split[2 * r], split[0], r * sizeof split[0]);
    memset(split[3 * r], 0, (terms * 32 - 3 * r) * sizeof split[0]);

    tiles = expand_.data() + p * 2 * terms * kTile;
    Half32 minus = (Half32){} + uint16_t(0x8000);
    for (int half = 0; half < 2; half++)
      for (int pair = 0; pair < terms * 16; pair++, tiles += 32) {
        Half16 even, odd;
        memcpy(&even, &split[2 * pair][half * 16], sizeof even);
        memcpy(&odd, &split[2 * pair + 1][half * 16], sizeof odd);
        store_half32(tiles, interleave(even, odd) ^ minus);
      }
  }

  Buffer<uint16_t> shrink_, expand_;
};

// Bf16 rows of one block: in place, or a zero-padded copy where the block has fewer than 32 rows.
struct HalfBlock {
  const uint16_t* data;
  int64_t stride;
};

inline HalfBlock whole_block(const Rows& x, int64_t row0, int rows, int64_t K, uint16_t* scratch) {
  if (rows == kBlock) return {reinterpret_cast<const uint16_t*>(address(x, row0, 0)), x.stride};
  memset(scratch, 0, kBlock * K * sizeof(uint16_t));
  for (int i = 0; i < rows; i++) memcpy(scratch + i * K, address(x, row0 + i, 0), K * sizeof(uint16_t));
  return {scratch, K};
}

// P [32][r] = X V; sums is [32][columns * 16]. Tiles 0 to 3 hold two row tiles times two column tiles.
inline void tile_shrink(HalfBlock x, const TilePanels& V, float* sums, float* P) {
  int64_t x_bytes = x.stride * 2, ld = V.columns * 16;
  finish_stores();
  for (int column = 0; column < V.columns; column += 2) {
    bool two = column + 1 < V.columns;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t p = 0; p < V.panels; p++) {
      const uint16_t* rows = x.data + p * kPanel;
      _tile_loadd(4, rows, x_bytes);
      _tile_loadd(5, rows + 16 * x.stride, x_bytes);
      for (int part = 0; part < kTerms; part++) {
        _tile_loadd(6, V.shrink(p, column, part), 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (!two) continue;
        _tile_loadd(7, V.shrink(p, column + 1, part), 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums + column * 16, ld * 4);
    _tile_stored(1, sums + column * 16 + 16 * ld, ld * 4);
    if (!two) continue;
    _tile_stored(2, sums + column * 16 + 16, ld * 4);
    _tile_stored(3, sums + column * 16 + 16 + 16 * ld, ld * 4);
  }
  for (int i = 0; i < kBlock; i++) memcpy(P + i * V.r, sums + i * ld, V.r * sizeof(float));
}

// Left operand of expand, [32 rows][terms * 32]: S_hi, S_hi, S_lo along the inner dimension, then zeros.
inline void pack_expand_rows(const uint16_t* hi, const uint16_t* lo, int r, int terms, uint16_t* out) {
  for (int i = 0; i < kBlock; i++, hi += r, lo += r, out += terms * 32) {
    for (int j = 0; j < r; j++) out[j] = out[r + j] = hi[j];
    for (int j = 0; j < r; j++) out[2 * r + j] = lo[j];
    for (int t = 3 * r; t < terms * 32; t++) out[t] = 0;
  }
}

// sum [32][32] = -S V^T on panel p.
inline void tile_expand_panel(const uint16_t* S, const TilePanels& V, int64_t p, float* sum) {
  for (int half = 0; half < 2; half++) {
    _tile_zero(0);
    _tile_zero(1);
    for (int term = 0; term < V.terms; term++) {
      _tile_loadd(6, V.expand(p, half, term), 64);
      _tile_loadd(4, S + term * 32, V.terms * 64);
      _tile_loadd(5, S + term * 32 + 16 * V.terms * 32, V.terms * 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
    }
    _tile_stored(0, sum + half * 16, kPanel * 4);
    _tile_stored(1, sum + half * 16 + 16 * kPanel, kPanel * 4);
  }
}

// out = X - S V^T, one rounding; sums is scratch for two panels [32][32]: the tiles work one panel ahead of the
// additions.
inline void tile_expand(HalfBlock x, int rows, const uint16_t* S, const TilePanels& V, uint16_t* out,
                        int64_t out_stride, float* sums) {
  finish_stores();
  tile_expand_panel(S, V, 0, sums);
  for (int64_t p = 0; p < V.panels; p++) {
    if (p + 1 < V.panels) tile_expand_panel(S, V, p + 1, sums + (p + 1) % 2 * kBlock * kPanel);
    const float* sum = sums + p % 2 * kBlock * kPanel;
    for (int i = 0; i < rows; i++, sum += kPanel) {
      const bf16* row = reinterpret_cast<const bf16*>(x.data + i * x.stride + p * kPanel);
      // Ownership of the lines that are written two panels from here: their misses were the largest cost of this loop.
      __builtin_prefetch(out + i * out_stride + (p + 2) * kPanel, 1);
      VF::type low = load(row) + VF::load(sum), high = load(row + 16) + VF::load(sum + 16);
      store_half32(out + i * out_stride + p * kPanel, (Half32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
  }
}

// Left operand of outer: -S^T in three terms, [columns][kTerms][height][32 rows of the block].
inline void pack_outer_rows(uint16_t* const parts[], int r, int columns, int height, uint16_t* out) {
  memset(out, 0, columns * kTerms * kTile * sizeof(uint16_t));
  for (int j = 0; j < r; j++) {
    uint16_t* tile = out + j / height * kTerms * kTile + j % height * 32;
    for (int part = 0; part < kTerms; part++, tile += kTile)
      for (int i = 0; i < kBlock; i++) tile[i] = parts[part][i * r + j] ^ 0x8000;
  }
}

// Column of the panel that stands in column c of tile `half` of a packed operand of outer, and so of D.
inline int paired_column(int half, int c) { return c / 4 * 8 + half * 4 + c % 4; }

// Right operand of outer: 32 rows of X, 32 columns, as two tiles of row pairs. Unpacking within 16-byte lanes takes one
// instruction a line; it deals the columns out as paired_column says.
inline void pack_row_pairs(const uint16_t* x, int64_t stride, uint16_t* tiles) {
  for (int pair = 0; pair < 16; pair++) {
    __m512i even = (__m512i)load_half32(x + 2 * pair * stride), odd = (__m512i)load_half32(x + (2 * pair + 1) * stride);
    store_half32(tiles + pair * 32, (Half32)_mm512_unpacklo_epi16(even, odd));
    store_half32(tiles + kTile + pair * 32, (Half32)_mm512_unpackhi_epi16(even, odd));
  }
}

// Tiles 0 and 1 -= S^T X for two tiles of row pairs of X.
inline void tile_outer_terms(const uint16_t* S, const uint16_t* pairs) {
  _tile_loadd(6, pairs, 64);
  _tile_loadd(7, pairs + kTile, 64);
  _tile_loadd(2, S, 64);
  _tile_loadd(3, S + kTile, 64);
  _tile_loadd(4, S + 2 * kTile, 64);
  _tile_dpbf16ps(0, 2, 6);
  _tile_dpbf16ps(1, 2, 7);
  _tile_dpbf16ps(0, 3, 6);
  _tile_dpbf16ps(1, 3, 7);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
}

// One summand S^T X of outer: 32 rows of X and S as pack_outer_rows left it.
struct OuterOperand {
  HalfBlock x;
  const uint16_t* S;
};

// D -= sum of S^T X over one or two operands; D is [K/32][2][columns][height][16] fp32, tiles 0 to 5 have `height`
// rows.
inline void tile_outer(const OuterOperand* operands, int count, int columns, int height, int64_t panels,
                       uint16_t* pairs, float* D) {
  static_assert(kTerms == 3, "tile_outer_terms names its tiles");
  for (int64_t p = 0; p < panels; p++) {
    for (int o = 0; o < count; o++)
      pack_row_pairs(operands[o].x.data + p * kPanel, operands[o].x.stride, pairs + o * 2 * kTile);
    finish_stores();
    for (int column = 0; column < columns; column++) {
      float* d = D + (p * 2 * columns + column) * height * 16;
      int64_t next_half = int64_t(columns) * height * 16;
      _tile_loadd(0, d, 64);
      _tile_loadd(1, d + next_half, 64);
      for (int o = 0; o < count; o++) tile_outer_terms(operands[o].S + column * kTerms * kTile, pairs + o * 2 * kTile);
      _tile_stored(0, d, 64);
      _tile_stored(1, d + next_half, 64);
    }
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
