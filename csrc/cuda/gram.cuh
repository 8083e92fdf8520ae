// Tiles of a product over many rows, X^T Y of 32 columns each, in float64 fragments: Gram matrices, gradients of T.
// A lane takes four neighbouring columns at once, 16 bytes of float32, so fragments hold every fourth column.
#pragma once

#include "cuda/warp.cuh"

namespace peftkern::cuda {

constexpr int kGramTile = 32 * 32;

// Four neighbours of a row of V in float64; columns at and beyond r are zeros.
__device__ inline void load_four(const float* row, int column, int r, bool wide, double (&v)[4]) {
  if (wide) {
    const float4 f = column < r ? __ldg(reinterpret_cast<const float4*>(row + column)) : float4{0, 0, 0, 0};
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = column + i < r ? row[column + i] : 0.0f;
  }
}
__device__ inline void load_four(const double* row, int column, int r, bool, double (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = column + i < r ? row[column + i] : 0.0;
}

// sum [a, b] += the tile of X^T Y whose fragments a, b hold the columns 4 g + a of the 32 of X from `left` on, and
// 4 g + b of those of Y from `right` on, over the rows [begin, end) of both, which are r apart.
template <typename V>
__device__ inline void gram(const V* X, const V* Y, int left, int right, int64_t begin, int64_t end, int r, bool wide,
                            int lane, double (&sum)[4][4][2]) {
  const bool same = X == Y && left == right;
  const int g = lane / 4, t = lane % 4;
#pragma unroll 2
  for (int64_t k = begin; k < end; k += 4) {
    double x[4] = {}, y[4] = {};
    if (k + t < end) {
      load_four(X + (k + t) * r, left + 4 * g, r, wide, x);
      if (!same) load_four(Y + (k + t) * r, right + 4 * g, r, wide, y);
    }
#pragma unroll
    for (int a = 0; a < 4; a++)
#pragma unroll
      for (int b = 0; b < 4; b++) mma_f64(sum[a][b], x[a], same ? x[b] : y[b]);
  }
}

// The tile's place of a number in the order in which warps leave it: fragments (a, b), their halves, lanes.
__device__ inline int gram_row(int place) { return 4 * (place % 32 / 4) + place / 256; }
__device__ inline int gram_column(int place) { return 4 * (2 * (place % 4) + place / 32 % 2) + place / 64 % 4; }

// The sum of all warps' tiles, in their order, to `out`; `shared` holds one tile per warp.
template <int kWarps>
__device__ inline void add_warps(const double (&sum)[4][4][2], double* shared, double* out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int a = 0; a < 4; a++)
#pragma unroll
    for (int b = 0; b < 4; b++)
#pragma unroll
      for (int e = 0; e < 2; e++) shared[warp * kGramTile + ((a * 4 + b) * 2 + e) * 32 + lane] = sum[a][b][e];
  __syncthreads();
  for (int i = threadIdx.x; i < kGramTile; i += 32 * kWarps) {
    double total = 0;
    for (int w = 0; w < kWarps; w++) total += shared[w * kGramTile + i];
    out[i] = total;
  }
}

}  // namespace peftkern::cuda
