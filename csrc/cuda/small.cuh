// Tiles of a few columns, V, P, S and the like, in shared memory: their places, the operands made of them, and their
// product with the r x r core in float64.
#pragma once

#include "cuda/householder.h"
#include "cuda/warp.cuh"

namespace peftkern::cuda {

// Place of (row, column) in a tile of R columns of float32: blocks of eight columns are permuted within a row, so that
// lanes (g, t) meet no bank twice when they read rows 2t, columns g, nor when they read pairs of columns 2t of rows g.
// Rows eight apart are permuted alike.
template <int R>
__device__ inline int place(int row, int column) {
  const int swizzle = (row ^ (row >> 2 & 1)) & 3;
  return row * R + (((column >> 3) ^ swizzle) << 3 | (column & 7));
}

__device__ inline void split_pairs(float2 upper, float2 lower, uint32_t (&a)[2][4]) {
  split_tf32(upper.x, a[0][0], a[1][0]);
  split_tf32(lower.x, a[0][1], a[1][1]);
  split_tf32(upper.y, a[0][2], a[1][2]);
  split_tf32(lower.y, a[0][3], a[1][3]);
}

// total += the product of two left operands and b = (2t, g), (2t + 1, g) of eight columns each; summed in float32
// outside of the tensor core after every sixteen.
template <int kTerms>
__device__ inline void products(float (&total)[4], const uint32_t (&a)[2][kTerms][4], const float (&b)[2][2]) {
  float sum[4] = {};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t high[2], low[2];
    cut_tf32(b[h][0], high[0], low[0]);
    cut_tf32(b[h][1], high[1], low[1]);
    mma_tf32(sum, a[h][0], low);
    if (kTerms == 2) mma_tf32(sum, a[h][kTerms - 1], high);
    mma_tf32(sum, a[h][0], high);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) total[i] += sum[i];
}

// Rows of r floats [begin, begin + n) of `from` [rows, r] into a tile whose columns up to the next multiple of 16 are
// zeros, as are rows beyond `rows`. `wide`: 16 bytes at a time, which needs r % 4 == 0 and an aligned `from`.
template <int R, int kThreads>
__device__ inline void load_tile(float* tile, const float* from, int64_t begin, int n, int64_t rows, int r, bool wide,
                                 int thread) {
  if (wide) {
    constexpr int kPieces = R / 4;
    for (int i = thread; i < n * kPieces; i += kThreads) {
      const int row = i / kPieces, column = i % kPieces * 4;
      if (column >= (r + 15 & ~15)) continue;
      const bool inside = column < r && begin + row < rows;
      copy_async_16(tile + place<R>(row, column), inside ? from + (begin + row) * r + column : from, inside ? 16 : 0);
    }
  } else {
    for (int i = thread; i < n * R; i += kThreads) {
      const int row = i / R, column = i % R;
      if (column >= (r + 15 & ~15)) continue;
      const bool inside = column < r && begin + row < rows;
      copy_async_4(tile + place<R>(row, column), inside ? from + (begin + row) * r + column : from, inside ? 4 : 0);
    }
  }
}

// Eight rows of a warp's tile to `out` [rows, r] from row `begin` on. paired: columns 2a and 2a + 1 hold mean and
// difference of two columns, and the two columns are written.
template <int R>
__device__ inline void store_rows(const float* tile, float* out, int64_t begin, int64_t rows, int r, bool paired,
                                  int lane) {
  for (int row = 0; row < 8 && begin + row < rows; row++) {
    for (int column = lane; column < r; column += 32) {
      float v = tile[place<R>(row, column)];
      if (paired && (column | 1) < r) {
        const float mean = tile[place<R>(row, column & ~1)], difference = tile[place<R>(row, column | 1)];
        v = column & 1 ? mean - difference / 2 : mean + difference / 2;
      }
      out[(begin + row) * r + column] = v;
    }
  }
}

// tile := tile C on eight rows of one warp, in float64. C is block triangular in tiles of eight: a lower core needs
// only columns at and right of the one it writes, so the product is taken in place, from the left (an upper one from
// the right).
template <int R>
__device__ inline void times_core(float* tile, const Core& C, int r, int lane) {
  const int g = lane / 4, t = lane % 4, tiles = (r + 7) / 8;
  for (int step = 0; step < tiles; step++) {
    const int jt = C.lower ? step : tiles - 1 - step;
    const int first = C.lower ? jt : 0, last = C.lower ? tiles - 1 : jt;
    const int j = 8 * jt + g;
    double even[2] = {}, odd[2] = {};
    for (int it = first; it <= last; it++) {
      const int i = 8 * it + 2 * t;
      const float2 v = *reinterpret_cast<const float2*>(tile + place<R>(g, i));
      const double* c = C.at + i * C.row + j * C.column;
      mma_f64(even, v.x, i < r && j < r ? c[0] : 0.0);
      mma_f64(odd, v.y, i + 1 < r && j < r ? c[C.row] : 0.0);
    }
    __syncwarp();
    *reinterpret_cast<float2*>(tile + place<R>(g, 8 * jt + 2 * t)) =
        make_float2(float(even[0] + odd[0]), float(even[1] + odd[1]));
    __syncwarp();
  }
}

}  // namespace peftkern::cuda
