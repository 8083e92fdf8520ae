// Products of 32 rows of bf16 with the dense matrix [G][G] of a group of columns, on AMX tiles with fp32 sums.
// Used by block_amx.cpp; G is a multiple of 32. x is exact in one bf16 term, the matrix takes two, high and low: 16
// bits, where the result is rounded to 8. x^T g takes one product, both being exact.
#pragma once

#include "amx_tiles.h"
#include "blocks.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int kBlockTerms = 2;

// Dense matrices as rows [G][K], that of group g in the columns [g G, g G + G): the product of all stages.
inline void multiply_out(const Blocks& R, int64_t G, bool transpose, float* eye, float* dense, int threads) {
  memset(eye, 0, G * R.K * sizeof(float));
  for (int64_t i = 0; i < G; i++)
    for (int64_t c = i; c < R.K; c += G) eye[i * R.K + c] = 1;
  avx512::block_kernels.rotate({eye, kFloat32, R.K}, G, R, transpose, {dense, kFloat32, R.K}, {}, threads);
}

// The matrices as right operands of tile products: [group][panel of columns][panel of rows][term][half of the columns].
class GroupTiles {
 public:
  GroupTiles(const float* dense, int64_t K, int64_t G, int threads)
      : panels(int(G / kPanel)), tiles_(K / G * panels * panels * kBlockTerms * 2 * kTile) {
    int64_t tasks = K / kPanel;
    threads = useful_threads(threads, tasks, K * G * 4);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < tasks; task++)
      for (int k = 0; k < panels; k++) pack(dense + k * kPanel * K + task * kPanel, K, task * panels + k);
  }

  const uint16_t* tiles(int64_t group, int column_panel, int row_panel) const {
    return tiles_.data() + ((group * panels + column_panel) * panels + row_panel) * kBlockTerms * 2 * kTile;
  }

  const int panels;

 private:
  void pack(const float* rows, int64_t ld, int64_t index) {
    uint16_t* out = tiles_.data() + index * kBlockTerms * 2 * kTile;
    for (int pair = 0; pair < 16; pair++, rows += 2 * ld)
      for (int half = 0; half < 2; half++) {
        VF::type even = VF::load(rows + half * 16), odd = VF::load(rows + ld + half * 16);
        for (int term = 0; term < kBlockTerms; term++) {
          Half16 even_part = round_bf16(even), odd_part = round_bf16(odd);
          store_half32(out + (term * 2 + half) * kTile + pair * 32, interleave(even_part, odd_part));
          even -= widen_bf16(even_part);
          odd -= widen_bf16(odd_part);
        }
      }
  }

  Buffer<uint16_t> tiles_;
};

// sum [32][32] = the rows of x times one panel of columns of a group's matrix.
inline void multiply_panel(HalfBlock x, const GroupTiles& R, int64_t group, int panel, float* sum) {
  int64_t bytes = x.stride * 2;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < R.panels; k++) {
    const uint16_t *rows = x.data + k * kPanel, *tiles = R.tiles(group, panel, k);
    _tile_loadd(4, rows, bytes);
    _tile_loadd(5, rows + 16 * x.stride, bytes);
    for (int term = 0; term < kBlockTerms; term++, tiles += 2 * kTile) {
      _tile_loadd(6, tiles, 64);
      _tile_loadd(7, tiles + kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sum, kPanel * 4);
  _tile_stored(1, sum + 16 * kPanel, kPanel * 4);
  _tile_stored(2, sum + 16, kPanel * 4);
  _tile_stored(3, sum + 16 * kPanel + 16, kPanel * 4);
}

inline Half32 round_panel(VF::type low, VF::type high) {
  return (Half32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// Rows of a panel, rounded once, and what that leaves (null rest: not wanted).
inline void write_panel(const float* sum, int rows, uint16_t* out, uint16_t* rest, int64_t stride) {
  for (int i = 0; i < rows; i++, sum += kPanel, out += stride) {
    VF::type low = VF::load(sum), high = VF::load(sum + 16);
    store_half32(out, round_panel(low, high));
    if (!rest) continue;
    const bf16* rounded = reinterpret_cast<const bf16*>(out);
    store_half32(rest, round_panel(low - load(rounded), high - load(rounded + 16)));
    rest += stride;
  }
}

typedef uint32_t Word16 __attribute__((vector_size(64)));

// 16 x 16 numbers of 32 bits, in place. Masks of all lanes: GCC 12 warns about the unmasked forms.
inline void transpose_words(Word16* v) {
  Word16 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = (Word16)_mm512_maskz_unpacklo_epi32(0xffff, (__m512i)v[i], (__m512i)v[i + 1]);
    t[i + 1] = (Word16)_mm512_maskz_unpackhi_epi32(0xffff, (__m512i)v[i], (__m512i)v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; k++) {
      v[i + 2 * k] = (Word16)_mm512_maskz_unpacklo_epi64(0xff, (__m512i)t[i + k], (__m512i)t[i + k + 2]);
      v[i + 2 * k + 1] = (Word16)_mm512_maskz_unpackhi_epi64(0xff, (__m512i)t[i + k], (__m512i)t[i + k + 2]);
    }
  // v[4 q + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 q to 4 q + 3, one in each 16 bytes.
  for (int c = 0; c < 4; c++)
    for (int half = 0; half < 2; half++) {
      __m512i a = (__m512i)v[8 * half + c], b = (__m512i)v[8 * half + 4 + c];
      t[4 * c + half] = (Word16)_mm512_maskz_shuffle_i32x4(0xffff, a, b, 0x88);
      t[4 * c + 2 + half] = (Word16)_mm512_maskz_shuffle_i32x4(0xffff, a, b, 0xdd);
    }
  for (int c = 0; c < 4; c++)
    for (int odd = 0; odd < 2; odd++) {
      __m512i a = (__m512i)t[4 * c + 2 * odd], b = (__m512i)t[4 * c + 2 * odd + 1];
      v[c + 4 * odd] = (Word16)_mm512_maskz_shuffle_i32x4(0xffff, a, b, 0x88);
      v[c + 4 * odd + 8] = (Word16)_mm512_maskz_shuffle_i32x4(0xffff, a, b, 0xdd);
    }
}

// The even columns, then the odd ones, of two rows of 32: pairs (a, b).
inline Half32 even_pairs(Word16 a, Word16 b) { return (Half32)((a & 0xffffu) | b << 16); }
inline Half32 odd_pairs(Word16 a, Word16 b) { return (Half32)(a >> 16 | (b & 0xffff0000u)); }

inline Word16 load_words(const uint16_t* p) { return (Word16)load_half32(p); }

// Right operand of x^T g: 32 rows of g, a panel of columns, as a tile of even columns and one of odd ones; row i is
// paired with row i + 16.
inline void pack_gradient(HalfBlock g, uint16_t* tiles) {
  for (int i = 0; i < 16; i++) {
    Word16 a = load_words(g.data + i * g.stride), b = load_words(g.data + (i + 16) * g.stride);
    store_half32(tiles + i * 32, even_pairs(a, b));
    store_half32(tiles + kTile + i * 32, odd_pairs(a, b));
  }
}

// Left operand: x^T, columns dealt out and rows paired in the same way.
inline void pack_transposed(HalfBlock x, uint16_t* tiles) {
  Word16 a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = load_words(x.data + i * x.stride);
  transpose_words(a);
  for (int i = 0; i < 16; i++) b[i] = load_words(x.data + (i + 16) * x.stride);
  transpose_words(b);
  for (int d = 0; d < 16; d++) {
    store_half32(tiles + d * 32, even_pairs(a[d], b[d]));
    store_half32(tiles + kTile + d * 32, odd_pairs(a[d], b[d]));
  }
}

// D [even or odd column of x][of g][16][16] += x^T g over `blocks` blocks of 32 rows, packed one after the other.
inline void outer_panels(const uint16_t* x, const uint16_t* g, int blocks, float* D) {
  _tile_loadd(0, D, 64);
  _tile_loadd(1, D + 256, 64);
  _tile_loadd(2, D + 512, 64);
  _tile_loadd(3, D + 768, 64);
  for (int i = 0; i < blocks; i++, x += 2 * kTile, g += 2 * kTile) {
    _tile_loadd(4, x, 64);
    _tile_loadd(5, x + kTile, 64);
    _tile_loadd(6, g, 64);
    _tile_loadd(7, g + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, D, 64);
  _tile_stored(1, D + 256, 64);
  _tile_stored(2, D + 512, 64);
  _tile_stored(3, D + 768, 64);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
