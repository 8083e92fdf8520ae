// Products of 32 rows of bf16 with the dense matrix [G][G] of a group of columns, on AMX tiles with fp32 sums.
// Used by block_amx.cpp; G is a multiple of 32, and of b 2^(f-1). x is exact in one bf16 term, the matrix takes two,
// high and low: 16 bits, where the result is rounded to 8. x^T g takes one product, both being exact.
#pragma once

#include "amx_tiles.h"
#include "blocks.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int kBlockTerms = 2;

// Dense matrices of groups, each [G][ld].
struct GroupMatrices {
  float* data;
  int64_t group_stride, ld;
  float* of(int64_t group) const { return data + group * group_stride; }
};

// Blocks of one stage, or their transposes, on the diagonals of matrices [G][G].
inline GroupMatrices spread_blocks(const Blocks& R, int64_t G, bool transpose, float* dense, int threads) {
  int64_t groups = R.K / G, b = R.b, per_group = G / b;
  threads = useful_threads(threads, groups, R.K * G);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; group++) {
    float* matrix = dense + group * G * G;
    if (per_group > 1) memset(matrix, 0, G * G * sizeof(float));
    for (int64_t j = 0; j < per_group; j++) {
      const float* from = static_cast<const float*>(R.data) + (R.stored == 1 ? 0 : group * per_group + j) * b * b;
      float* to = matrix + j * b * (G + 1);
      for (int64_t r = 0; r < b; r++)
        for (int64_t c = 0; c < b; c++) to[r * G + c] = transpose ? from[c * b + r] : from[r * b + c];
    }
  }
  return {dense, G * G, G};
}

// The same of several stages multiplied out: what they make of the rows of G x G identities, which it leaves in eye.
inline GroupMatrices multiply_out(const Blocks& R, int64_t G, bool transpose, float* eye, float* dense, int threads) {
  memset(eye, 0, G * R.K * sizeof(float));
  for (int64_t i = 0; i < G; i++)
    for (int64_t c = i; c < R.K; c += G) eye[i * R.K + c] = 1;
  avx512::block_kernels.rotate({eye, kFloat32, R.K}, G, R, transpose, {dense, kFloat32, R.K}, {}, threads);
  return {dense, G, R.K};
}

// The matrices as right operands of tile products: [group][panel of columns][panel of rows][term][half of the columns].
class GroupTiles {
 public:
  GroupTiles(const GroupMatrices& matrices, int64_t K, int64_t G, int threads)
      : panels(int(G / kPanel)), tiles_(K / G * panels * panels * kBlockTerms * 2 * kTile) {
    int64_t tasks = K / kPanel;
    threads = useful_threads(threads, tasks, K * G);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < tasks; task++)
      for (int k = 0; k < panels; k++)
        pack(matrices.of(task / panels) + k * kPanel * matrices.ld + task % panels * kPanel, matrices.ld,
             task * panels + k);
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

// D [even or odd column of x][of g][16][16] += x^T g for 32 rows, packed.
inline void outer_panel(const uint16_t* x, const uint16_t* g, float* D) {
  _tile_loadd(0, D, 64);
  _tile_loadd(1, D + 256, 64);
  _tile_loadd(2, D + 512, 64);
  _tile_loadd(3, D + 768, 64);
  _tile_loadd(4, x, 64);
  _tile_loadd(5, x + kTile, 64);
  _tile_loadd(6, g, 64);
  _tile_loadd(7, g + kTile, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
  _tile_stored(0, D, 64);
  _tile_stored(1, D + 256, 64);
  _tile_stored(2, D + 512, 64);
  _tile_stored(3, D + 768, 64);
}

// The sums of a group, [panel of x][panel of g][outer_panel's D], as rows [G][ld]; several of them added up in order.
inline void unpack_sums(const float* partial, int64_t sums, int64_t sum_size, int64_t G, float* rows, int64_t ld) {
  int64_t panels = G / kPanel;
  Word16 first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, second = first + 8;
  for (int64_t i = 0; i < G; i++)
    for (int64_t p = 0; p < panels; p++) {
      int64_t d = i % kPanel;
      const float* from = partial + ((i / kPanel * panels + p) * 4 + d % 2 * 2) * 256 + d / 2 * 16;
      VF::type even = {}, odd = {};
      for (int64_t s = 0; s < sums; s++) {
        even += VF::load(from + s * sum_size);
        odd += VF::load(from + s * sum_size + 256);
      }
      float* to = rows + i * ld + p * kPanel;
      VF::store(to, (VF::type)_mm512_permutex2var_ps((__m512)even, (__m512i)first, (__m512)odd));
      VF::store(to + 16, (VF::type)_mm512_permutex2var_ps((__m512)even, (__m512i)second, (__m512)odd));
    }
}

// dR of one stage: the blocks on the diagonals of dD; those that share one added up in order.
inline void gather_blocks(const GroupMatrices& dD, const Blocks& R, int64_t G, bool transpose, float* dR, int threads) {
  int64_t b = R.b, per_group = G / b, blocks = R.K / b, shared = blocks / R.stored;
  threads = useful_threads(threads, R.stored, R.K * b);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t stored = 0; stored < R.stored; stored++) {
    float* to = dR + stored * b * b;
    memset(to, 0, b * b * sizeof(float));
    for (int64_t j = stored; j < stored + shared; j++) {
      const float* from = dD.of(j / per_group) + j % per_group * b * (dD.ld + 1);
      for (int64_t r = 0; r < b; r++)
        for (int64_t c = 0; c < b; c++) to[r * b + c] += transpose ? from[c * dD.ld + r] : from[r * dD.ld + c];
    }
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
