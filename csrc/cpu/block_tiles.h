// Register-blocked products of a tile of rows with one small block: z = a P and D += a^T g.
// Compiled once per instruction set; P [b][bp] and D [b][bp] have rows padded to bp = whole vectors of zeros, so every
// store is a whole vector: it may spill zeros into the columns behind a block, which the next block overwrites.
#pragma once

#include <type_traits>

#include "blocks.h"
#include "tiles.h"

// Sums live in registers only if the loops over them are unrolled before the compiler looks at the array.
#define PEFTKERN_UNROLL _Pragma("GCC unroll 16")

namespace peftkern {
namespace PEFTKERN_ISA {

// The b columns of a block in a tile: `half` of them at first, the others at second (all at first: half = b).
template <class C>
struct Columns {
  C *first, *second;
  int64_t ld;
  int half;
};

template <class C, int MR, int NV>
inline void multiply_kernel(Columns<const C> a, int row, int b, const C* P, int64_t bp, C* out, int64_t out_ld) {
  using V = Vec<C>;
  typename V::type acc[MR][NV];
  PEFTKERN_UNROLL
  for (int i = 0; i < MR; i++) PEFTKERN_UNROLL
  for (int v = 0; v < NV; v++) acc[i][v] = typename V::type{};
  const C* column = a.first + row * a.ld;
  int64_t gap = a.second - a.first - a.half;
  for (int k = 0; k < b; k++, column++, P += bp) {
    if (k == a.half) column += gap;
    typename V::type p[NV];
    PEFTKERN_UNROLL
    for (int v = 0; v < NV; v++) p[v] = V::load(P + v * V::W);
    PEFTKERN_UNROLL
    for (int i = 0; i < MR; i++) {
      typename V::type s = V::splat(column[i * a.ld]);
      PEFTKERN_UNROLL
      for (int v = 0; v < NV; v++) acc[i][v] += s * p[v];
    }
  }
  out += row * out_ld;
  PEFTKERN_UNROLL
  for (int i = 0; i < MR; i++) PEFTKERN_UNROLL
  for (int v = 0; v < NV; v++) V::store(out + i * out_ld + v * V::W, acc[i][v]);
}

template <class C, int NV>
void multiply_columns(Columns<const C> a, int rows, int b, const C* P, int64_t bp, C* out, int64_t out_ld) {
  constexpr int MR = kAccumulators / NV > 1 ? kAccumulators / NV : 1, few = MR > 4 ? 4 : 1;
  int i = 0;
  for (; i + MR <= rows; i += MR) multiply_kernel<C, MR, NV>(a, i, b, P, bp, out, out_ld);
  for (; i + few <= rows; i += few) multiply_kernel<C, few, NV>(a, i, b, P, bp, out, out_ld);
  for (; i < rows; i++) multiply_kernel<C, 1, NV>(a, i, b, P, bp, out, out_ld);
}

// out [rows][bp] = a P.
template <class C>
void multiply_block(Columns<const C> a, int rows, int b, const C* P, int64_t bp, C* out, int64_t out_ld) {
  constexpr int W = Vec<C>::W;
  int64_t c = 0;
  for (; c + 4 * W <= bp; c += 4 * W) multiply_columns<C, 4>(a, rows, b, P + c, bp, out + c, out_ld);
  if (c + 2 * W <= bp) {
    multiply_columns<C, 2>(a, rows, b, P + c, bp, out + c, out_ld);
    c += 2 * W;
  }
  if (c < bp) multiply_columns<C, 1>(a, rows, b, P + c, bp, out + c, out_ld);
}

// UR rows at a time have sums of their own, where a few sums would wait for each other's additions.
template <class C, int KR, int NV, int UR>
inline void outer_block_kernel(const C* a, int64_t ld, const C* g, int64_t g_ld, int rows, C* D, int64_t bp) {
  using V = Vec<C>;
  typename V::type acc[UR][KR][NV];
  PEFTKERN_UNROLL
  for (int u = 0; u < UR; u++) PEFTKERN_UNROLL
  for (int k = 0; k < KR; k++) PEFTKERN_UNROLL
  for (int v = 0; v < NV; v++) acc[u][k][v] = typename V::type{};
  int i = 0;
  for (; i + UR <= rows; i += UR) PEFTKERN_UNROLL
  for (int u = 0; u < UR; u++) {
    typename V::type gv[NV];
    PEFTKERN_UNROLL
    for (int v = 0; v < NV; v++) gv[v] = V::load(g + (i + u) * g_ld + v * V::W);
    PEFTKERN_UNROLL
    for (int k = 0; k < KR; k++) {
      typename V::type s = V::splat(a[(i + u) * ld + k]);
      PEFTKERN_UNROLL
      for (int v = 0; v < NV; v++) acc[u][k][v] += s * gv[v];
    }
  }
  for (; i < rows; i++) PEFTKERN_UNROLL
  for (int v = 0; v < NV; v++) {
    typename V::type gv = V::load(g + i * g_ld + v * V::W);
    PEFTKERN_UNROLL
    for (int k = 0; k < KR; k++) acc[0][k][v] += V::splat(a[i * ld + k]) * gv;
  }
  PEFTKERN_UNROLL
  for (int k = 0; k < KR; k++) PEFTKERN_UNROLL
  for (int v = 0; v < NV; v++) {
    typename V::type sum = V::load(D + k * bp + v * V::W);
    PEFTKERN_UNROLL
    for (int u = 0; u < UR; u++) sum += acc[u][k][v];
    V::store(D + k * bp + v * V::W, sum);
  }
}

template <class C, int NV>
void outer_block_columns(const C* a, int64_t ld, int count, const C* g, int64_t g_ld, int rows, C* D, int64_t bp) {
  constexpr int KR = kAccumulators / NV > 1 ? kAccumulators / NV : 1;
  int k = 0;
  for (; k + KR <= count; k += KR) outer_block_kernel<C, KR, NV, 1>(a + k, ld, g, g_ld, rows, D + k * bp, bp);
  if constexpr (KR > 8)
    for (; k + 8 <= count; k += 8) outer_block_kernel<C, 8, NV, 1>(a + k, ld, g, g_ld, rows, D + k * bp, bp);
  if constexpr (KR > 4)
    for (; k + 4 <= count; k += 4) outer_block_kernel<C, 4, NV, 2>(a + k, ld, g, g_ld, rows, D + k * bp, bp);
  if constexpr (KR > 2)
    for (; k + 2 <= count; k += 2) outer_block_kernel<C, 2, NV, 4>(a + k, ld, g, g_ld, rows, D + k * bp, bp);
  for (; k < count; k++) outer_block_kernel<C, 1, NV, 4>(a + k, ld, g, g_ld, rows, D + k * bp, bp);
}

// D [b][bp] += a^T g; g [rows][bp], of which the columns from b on may hold anything.
template <class C>
void outer_block(Columns<const C> a, int rows, int b, const C* g, int64_t g_ld, C* D, int64_t bp) {
  constexpr int W = Vec<C>::W;
  auto half = [&](const C* columns, int count, C* sums) {
    int64_t c = 0;
    for (; c + 2 * W <= bp; c += 2 * W)
      outer_block_columns<C, 2>(columns, a.ld, count, g + c, g_ld, rows, sums + c, bp);
    if (c < bp) outer_block_columns<C, 1>(columns, a.ld, count, g + c, g_ld, rows, sums + c, bp);
  };
  half(a.first, a.half, D);
  half(a.second, b - a.half, D + a.half * bp);
}

// By size: a copy of a length that the compiler knows is one or two moves.
template <class Work>
inline void with_constant(int half, Work work) {
  switch (half) {
    case 1:
      return work(std::integral_constant<int, 1>());
    case 2:
      return work(std::integral_constant<int, 2>());
    case 4:
      return work(std::integral_constant<int, 4>());
    case 8:
      return work(std::integral_constant<int, 8>());
    case 16:
      return work(std::integral_constant<int, 16>());
    default:
      return work(half);
  }
}

// block [rows][bp] from two runs of `half` columns of a tile.
template <class C>
void gather_units(C* block, int64_t bp, const C* first, const C* second, int64_t ld, int rows, int half) {
  with_constant(half, [=](auto h) {
    for (int i = 0; i < rows; i++) {
      memcpy(block + i * bp, first + i * ld, int(h) * sizeof(C));
      memcpy(block + i * bp + int(h), second + i * ld, int(h) * sizeof(C));
    }
  });
}

// The way back.
template <class C>
void scatter_units(const C* block, int64_t bp, C* first, C* second, int64_t ld, int rows, int half) {
  with_constant(half, [=](auto h) {
    for (int i = 0; i < rows; i++) {
      memcpy(first + i * ld, block + i * bp, int(h) * sizeof(C));
      memcpy(second + i * ld, block + i * bp + int(h), int(h) * sizeof(C));
    }
  });
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
