// Rows times a dense block-diagonal matrix on tensor cores: operands of a tile of rows in shared memory and of the
// blocks, and their products.
//
// A panel is 64 or 128 columns of shared memory, blocks padded with zeros to P of them; a slice is 32. Each warp makes
// one slice of z, so it needs only blocks that touch it, as the right operand, in registers. Half-precision rows are
// exact in one term, blocks are two: high high + high low, to 2^-17 (bfloat16) or 2^-22. In float32 both are two terms
// of tf32, and every sum leaves the tensor core, which cuts its sums towards zero, after 16 terms.
#pragma once

#include "cuda/warp.cuh"

namespace peftkern::cuda {

// c [16, 8] += a [16, 16] b [16, 8]: pairs of columns 2t of rows g and g + 8, then 8 columns on; pairs of rows 2t of
// column g, then 8 rows on.
__device__ inline void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], fp16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same for a [16, 8] b [8, 8].
__device__ inline void mma_half(float (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], bf16) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
__device__ inline void mma_half(float (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], fp16) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// sum += a b of two float32 operands in two tf32 terms each.
__device__ inline void mma_split(float (&sum)[4], const uint32_t (&high)[4], const uint32_t (&low)[4], float b0,
                                 float b1) {
  uint32_t b_high[2], b_low[2];
  cut_tf32(b0, b_high[0], b_low[0]);
  cut_tf32(b1, b_high[1], b_low[1]);
  mma_tf32(sum, high, b_low);
  mma_tf32(sum, low, b_high);
  mma_tf32(sum, high, b_high);
}

constexpr int kSlice = 32, kTileRows = 64;
template <int P>
constexpr int kPanelOf = P > 64 ? P : 64;

template <typename X, int P>
struct BlockTile {
  static constexpr bool kHalf = sizeof(X) == 2;
  static constexpr int kPanel = kPanelOf<P>, kSlices = kPanel / kSlice, kThreads = 64 * kSlices;
  // Eight more than a panel: lanes meet no bank twice in ldmatrix, nor in pairs of float32 columns 2t of rows g, nor in
  // columns g of rows t.
  static constexpr int kStride = kPanel + 8;
  static constexpr int kBytes = kTileRows * kStride * int(sizeof(X));
  static constexpr int kDepth = kHalf && P > 8 ? 16 : 8;  // columns that one instruction contracts
  static constexpr int kSteps = (P > kSlice ? P : kSlice) / kDepth;
  static constexpr int kTiles = (P < kSlice ? P : kSlice) / 8;  // eights of output columns that one step feeds
  static constexpr int kTerms = kHalf ? 2 : 1, kRegisters = kHalf ? kDepth / 8 : 2;

  // Of a step: its first column in the panel, and its first eight of output columns in the slice.
  __device__ static constexpr int column(int slice, int step) {
    return (P > kSlice ? 0 : kSlice * slice) + step * kDepth;
  }
  __device__ static constexpr int tile(int step) { return P >= kSlice ? 0 : step * kDepth / P * kTiles; }
};

// Blocks of a slice as right operands; float32 is kept whole and split where it is used.
template <typename X, int P>
struct BlockOperand {
  using Tile = BlockTile<X, P>;
  uint32_t at[Tile::kSteps][Tile::kTiles][Tile::kTerms][Tile::kRegisters];

  // pair(even column k of the panel that is contracted, output column): the numbers of D at k and k + 1, 0 outside.
  template <typename Pair>
  __device__ void load(const Pair& pair, int slice, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int step = 0; step < Tile::kSteps; step++) {
#pragma unroll
      for (int i = 0; i < Tile::kTiles; i++) {
        const int n = kSlice * slice + 8 * (Tile::tile(step) + i) + g;
#pragma unroll
        for (int r = 0; r < (Tile::kHalf ? Tile::kRegisters : 1); r++) {
          const int k = Tile::column(slice, step) + 8 * r + 2 * t;
          const float2 v = pair(k, n);
          if constexpr (Tile::kHalf) {
            float kept[2];
            at[step][i][0][r] = pack(v.x, v.y, X());
            unpack(at[step][i][0][r], kept, X());
            at[step][i][1][r] = pack(v.x - kept[0], v.y - kept[1], X());
          } else {
            at[step][i][0][0] = __float_as_uint(v.x);
            at[step][i][0][1] = __float_as_uint(v.y);
          }
        }
      }
    }
  }

  // z [16, 32] = 16 rows of a tile times the blocks; eights of columns as the tensor core has them.
  __device__ void rotate(const X* rows, int slice, int lane, float (&z)[4][4]) const {
    if constexpr (Tile::kHalf) {
      const X* from = rows + lane % 16 * Tile::kStride + lane / 16 * 8;
#pragma unroll
      for (int first = 0; first < Tile::kSteps * Tile::kDepth; first += 16) {
        uint32_t a[4];
        load_matrices(a, from + Tile::column(slice, first / Tile::kDepth));
#pragma unroll
        for (int step = first / Tile::kDepth; step < (first + 16) / Tile::kDepth; step++) {
#pragma unroll
          for (int i = 0; i < Tile::kTiles; i++) {
            float (&sum)[4] = z[Tile::tile(step) + i];
            if constexpr (Tile::kDepth == 16) {
              mma_half(sum, a, at[step][i][1], X());
              mma_half(sum, a, at[step][i][0], X());
            } else {
              const uint32_t eight[2] = {a[2 * (step % 2)], a[2 * (step % 2) + 1]};
              mma_half(sum, eight, at[step][i][1], X());
              mma_half(sum, eight, at[step][i][0], X());
            }
          }
        }
      }
    } else {
      constexpr int kRun = P == 8 ? 1 : 2;  // steps of eight between sums outside of the tensor core
      const float* from = rows + lane / 4 * Tile::kStride + lane % 4 * 2;
#pragma unroll
      for (int first = 0; first < Tile::kSteps; first += kRun) {
        uint32_t high[kRun][4], low[kRun][4];
#pragma unroll
        for (int h = 0; h < kRun; h++) {
          const float* pair = from + Tile::column(slice, first + h);
          const float2 upper = *reinterpret_cast<const float2*>(pair);
          const float2 lower = *reinterpret_cast<const float2*>(pair + 8 * Tile::kStride);
          cut_tf32(upper.x, high[h][0], low[h][0]);
          cut_tf32(lower.x, high[h][1], low[h][1]);
          cut_tf32(upper.y, high[h][2], low[h][2]);
          cut_tf32(lower.y, high[h][3], low[h][3]);
        }
#pragma unroll
        for (int i = 0; i < Tile::kTiles; i++) {
          float sum[4] = {};
#pragma unroll
          for (int h = 0; h < kRun; h++) {
            float b0 = __uint_as_float(at[first + h][i][0][0]), b1 = __uint_as_float(at[first + h][i][0][1]);
            // Else both terms of every number would be made before the loop over rows, and not fit the registers.
            asm volatile("" : "+f"(b0), "+f"(b1));
            mma_split(sum, high[h], low[h], b0, b1);
          }
#pragma unroll
          for (int j = 0; j < 4; j++) z[Tile::tile(first) + i][j] += sum[j];
        }
      }
    }
  }
};

// Sums over rows of left^T right within blocks, for one warp (slice, half): rows `row(m)` of D in sixteens,
// columns `column(n)` in eights.
template <typename X, int P>
struct BlockOuter {
  using Tile = BlockTile<X, P>;
  static constexpr int kM = P > kSlice ? P / kSlice : 1, kN = P >= kSlice ? 4 : 2;
  float total[kM][kN][4] = {};

  __device__ static int row(int slice, int half, int m) {
    return P > kSlice ? P / 2 * half + 16 * m : kSlice * slice + 16 * half;
  }
  __device__ static int column(int slice, int half, int n) {
    return kSlice * slice + (P >= kSlice ? 0 : 16 * half) + 8 * n;
  }

  // Adds the rows of a tile, 32 (float32: 16) of them between sums outside of the tensor core.
  __device__ void add(const X* left, const X* right, int slice, int half, int lane) {
    left += row(slice, half, 0);
    right += column(slice, half, 0);
    if constexpr (Tile::kHalf) {
      left += (lane % 8 + lane / 16 * 8) * Tile::kStride + lane / 8 % 2 * 8;
      right += lane % 16 * Tile::kStride + lane / 16 * 8;
#pragma unroll 1
      for (int begin = 0; begin < kTileRows; begin += 32) {
        uint32_t a[kM][2][4], b[kN / 2][2][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
          for (int m = 0; m < kM; m++) {
            load_matrices_transposed(a[m][h], left + (begin + 16 * h) * Tile::kStride + 16 * m);
          }
#pragma unroll
          for (int n = 0; n < kN / 2; n++) {
            load_matrices_transposed(b[n][h], right + (begin + 16 * h) * Tile::kStride + 16 * n);
          }
        }
#pragma unroll
        for (int m = 0; m < kM; m++) {
#pragma unroll
          for (int n = 0; n < kN; n++) {
            float sum[4] = {};
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const uint32_t pair[2] = {b[n / 2][h][2 * (n % 2)], b[n / 2][h][2 * (n % 2) + 1]};
              mma_half(sum, a[m][h], pair, X());
            }
#pragma unroll
            for (int i = 0; i < 4; i++) total[m][n][i] += sum[i];
          }
        }
      }
    } else {
      left += lane % 4 * Tile::kStride + lane / 4;
      right += lane % 4 * Tile::kStride + lane / 4;
#pragma unroll 1
      for (int begin = 0; begin < kTileRows; begin += 16) {
        uint32_t high[kM][2][4], low[kM][2][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
          for (int m = 0; m < kM; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
              cut_tf32(left[(begin + 8 * h + i / 2 * 4) * Tile::kStride + 16 * m + i % 2 * 8], high[m][h][i],
                       low[m][h][i]);
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kN; n++) {
          float b[2][2];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            b[i / 2][i % 2] = right[(begin + 8 * (i / 2) + i % 2 * 4) * Tile::kStride + 8 * n];
          }
#pragma unroll
          for (int m = 0; m < kM; m++) {
            float sum[4] = {};
#pragma unroll
            for (int h = 0; h < 2; h++) mma_split(sum, high[m][h], low[m][h], b[h][0], b[h][1]);
#pragma unroll
            for (int i = 0; i < 4; i++) total[m][n][i] += sum[i];
          }
        }
      }
    }
  }
};

}  // namespace peftkern::cuda
