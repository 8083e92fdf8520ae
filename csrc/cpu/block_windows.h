// Small blocks: products of a tile with b < W (or halves < W) in whole vectors, by permutations within a vector.
// Compiled per instruction set, for AVX2 fp32 and AVX-512; b a power of two up to W. A window is one vector of columns
// that holds whole groups of a stage (out = sum_k P_k perm_k(x), k < b), or, where a stage couples columns W or more
// apart, the pair of vectors low and high: out_low = sum_(k < b/2) P_0k perm_k(low) + P_1k perm_k(high), and out_high.
#pragma once

#include "block_tiles.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// v[index[lane]] for every lane.
template <class C>
struct Shuffle {
  static constexpr bool exists = false;
  using index = int32_t;
};
#if PEFTKERN_VECTOR_BYTES == 64
template <>
struct Shuffle<float> {
  static constexpr bool exists = true;
  using index = int32_t;
  static VF::type run(VF::type v, const index* lanes) {
    return (VF::type)_mm512_maskz_permutexvar_ps(0xffff, _mm512_loadu_si512(lanes), (__m512)v);
  }
};
template <>
struct Shuffle<double> {
  static constexpr bool exists = true;
  using index = int64_t;
  static Vec<double>::type run(Vec<double>::type v, const index* lanes) {
    return (Vec<double>::type)_mm512_maskz_permutexvar_pd(0xff, _mm512_loadu_si512(lanes), (__m512d)v);
  }
};
#elif PEFTKERN_VECTOR_BYTES == 32
template <>
struct Shuffle<float> {
  static constexpr bool exists = true;
  using index = int32_t;
  static VF::type run(VF::type v, const index* lanes) {
    return (VF::type)_mm256_permutevar8x32_ps((__m256)v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
  }
};
#endif

// What the lanes of the windows of one stage stand for.
struct WindowLayout {
  WindowLayout(int b, int stage, int W)
      : b(b), stage(stage), W(W), half(b / 2), distance(int64_t(b / 2) << stage), pair(distance >= W) {}

  // First column of window (or of the lower vector of pair) w.
  int64_t column(int64_t w) const {
    if (!pair) return w * W;
    int64_t pairs = distance / W;
    return w / pairs * 2 * distance + w % pairs * W;
  }
  int64_t first_block(int64_t w) const {
    if (!pair) return w * (W / b);
    int64_t pairs = distance / W;
    return (w / pairs << stage) + w % pairs * (W / half);
  }
  // Windows (or pairs) in so many columns.
  int64_t count(int64_t columns) const { return columns / W / (pair ? 2 : 1); }
  // Vectors of coefficients of a window (or a pair).
  int vectors() const { return pair ? 2 * b : b; }
  int permutations() const { return pair ? half : b; }

  // Lane from which permutation k takes lane l.
  int lane(int k, int l) const {
    if (pair) return l / half * half + k;
    int group = int(2 * distance), start = l / group * group, t = l % int(distance) / half;
    return start + t * half + k % half + k / half * int(distance);
  }
  // Entry of the blocks from first_block on that lane l of vector i holds; i = k, or in a pair 4 k + 2 (half of the
  // output) + (half of the input).
  int entry(int i, int l, bool transpose, bool shared) const {
    int row, column, block;
    if (pair) {
      block = l / half;
      row = i / 4 + i % 2 * half;
      column = l % half + i % 4 / 2 * half;
    } else {
      int group = int(2 * distance), within = l % group;
      block = (l / group << stage) + within % int(distance) / half;
      row = i;
      column = l % half + within / int(distance) * half;
    }
    return (shared ? 0 : block * b * b) + (transpose ? column * b + row : row * b + column);
  }

  const int b, stage, W, half;
  const int64_t distance;
  const bool pair;
};

// Whether windows serve a stage.
template <class C>
inline bool windows_serve(int b, int stage) {
  constexpr int W = Vec<C>::W;
  if (!Shuffle<C>::exists || b < 2 || b > W || (b & (b - 1))) return false;
  return b < W || stage > 0;
}

#if PEFTKERN_VECTOR_BYTES > 16
template <class C, int B>
void multiply_windows(const WindowLayout& layout, const typename Shuffle<C>::index* lanes, const C* coefficients,
                      int64_t columns, const C* x, int64_t ld, int rows, C* out, int64_t out_ld) {
  using V = Vec<C>;
  using T = typename V::type;
  constexpr int W = V::W, H = B / 2;
  int64_t count = layout.count(columns);
  for (int64_t w = 0; w < count; w++, coefficients += layout.vectors() * W) {
    const C* from = x + layout.column(w);
    C* to = out + layout.column(w);
    if (!layout.pair) {
      T p[B];
      PEFTKERN_UNROLL
      for (int k = 0; k < B; k++) p[k] = V::load(coefficients + k * W);
      for (int i = 0; i < rows; i++) {
        T v = V::load(from + i * ld), even = {}, odd = {};
        PEFTKERN_UNROLL
        for (int k = 0; k < B; k += 2) {
          even += Shuffle<C>::run(v, lanes + k * W) * p[k];
          odd += Shuffle<C>::run(v, lanes + (k + 1) * W) * p[k + 1];
        }
        V::store(to + i * out_ld, even + odd);
      }
    } else {
      for (int i = 0; i < rows; i++) {
        T low = V::load(from + i * ld), high = V::load(from + i * ld + layout.distance);
        T sums[4] = {};
        PEFTKERN_UNROLL
        for (int k = 0; k < H; k++) {
          T l = Shuffle<C>::run(low, lanes + k * W), h = Shuffle<C>::run(high, lanes + k * W);
          sums[0] += l * V::load(coefficients + (4 * k) * W);
          sums[1] += h * V::load(coefficients + (4 * k + 1) * W);
          sums[2] += l * V::load(coefficients + (4 * k + 2) * W);
          sums[3] += h * V::load(coefficients + (4 * k + 3) * W);
        }
        V::store(to + i * out_ld, sums[0] + sums[1]);
        V::store(to + i * out_ld + layout.distance, sums[2] + sums[3]);
      }
    }
  }
}

// D += the products of permuted x with g, in the layout of the coefficients.
template <class C, int B>
void outer_windows(const WindowLayout& layout, const typename Shuffle<C>::index* lanes, int64_t columns, const C* x,
                   int64_t ld, const C* g, int64_t g_ld, int rows, C* D) {
  using V = Vec<C>;
  using T = typename V::type;
  constexpr int W = V::W, H = B / 2, S = H < 4 ? H : 4;
  int64_t count = layout.count(columns);
  for (int64_t w = 0; w < count; w++, D += layout.vectors() * W) {
    const C *from = x + layout.column(w), *incoming = g + layout.column(w);
    if (!layout.pair) {
      T sums[B];
      PEFTKERN_UNROLL
      for (int k = 0; k < B; k++) sums[k] = V::load(D + k * W);
      for (int i = 0; i < rows; i++) {
        T v = V::load(from + i * ld), gv = V::load(incoming + i * g_ld);
        PEFTKERN_UNROLL
        for (int k = 0; k < B; k++) sums[k] += Shuffle<C>::run(v, lanes + k * W) * gv;
      }
      PEFTKERN_UNROLL
      for (int k = 0; k < B; k++) V::store(D + k * W, sums[k]);
      continue;
    }
    for (int k0 = 0; k0 < H; k0 += S) {
      T sums[4 * S];
      C* d = D + 4 * k0 * W;
      PEFTKERN_UNROLL
      for (int k = 0; k < 4 * S; k++) sums[k] = V::load(d + k * W);
      for (int i = 0; i < rows; i++) {
        T low = V::load(from + i * ld), high = V::load(from + i * ld + layout.distance);
        T g_low = V::load(incoming + i * g_ld), g_high = V::load(incoming + i * g_ld + layout.distance);
        PEFTKERN_UNROLL
        for (int k = 0; k < S; k++) {
          T l = Shuffle<C>::run(low, lanes + (k0 + k) * W), h = Shuffle<C>::run(high, lanes + (k0 + k) * W);
          sums[4 * k] += l * g_low;
          sums[4 * k + 1] += h * g_low;
          sums[4 * k + 2] += l * g_high;
          sums[4 * k + 3] += h * g_high;
        }
      }
      PEFTKERN_UNROLL
      for (int k = 0; k < 4 * S; k++) V::store(d + k * W, sums[k]);
    }
  }
}
#endif

// Calls work with b as a constant, for the sizes that windows serve.
template <class Work>
inline void with_block_size(int b, Work work) {
  if (b == 2) work(std::integral_constant<int, 2>());
  if (b == 4) work(std::integral_constant<int, 4>());
  if (b == 8) work(std::integral_constant<int, 8>());
  if (b == 16) work(std::integral_constant<int, 16>());
}

// Tables of one stage: the lanes of its permutations, and the entries of its blocks.
template <class C>
struct WindowTables {
  static constexpr int W = Vec<C>::W;
  WindowTables(const WindowLayout& layout, bool transpose, bool shared) {
    for (int k = 0; k < layout.permutations(); k++)
      for (int l = 0; l < W; l++) lanes[k * W + l] = layout.lane(k, l);
    for (int i = 0; i < layout.vectors(); i++)
      for (int l = 0; l < W; l++) entries[i * W + l] = layout.entry(i, l, transpose, shared);
  }
  typename Shuffle<C>::index lanes[16 * W];
  int entries[32 * W];
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
