// Gradients that contract over rows, in two launches:
//   dV = sign (x1^T S1 + x2^T S2) [K, r]   x [M, K] half precision or float32, S [M, r] float32
//   D = sign A^T B [r, r] float64          A, B [M, r] float32: the gradient of T
//
// Launch: blocks of 4 warps, one per 64 columns of x and chunk of rows of one pair (x, S), then blocks that take 128
// rows of A and B and one 32 x 32 tile of D. Rows come 32 at a time through a ring of three stages (two for r = 128); a
// warp holds 16 columns x r in registers. Every block leaves its sum in a buffer of its own; the second launch adds the
// buffers in a fixed order. No atomics: two runs give the same bits.
//
// Bytes: x once, s M K; S once per 64 columns, 4 M r K / 64 (from L2: as much as x for r = 32); the partial sums,
// 4 K r per chunk, written and read; chunks are as few as fill a large device. Least: s M K + 4 M r + 4 K r.
// Flops: 2 M K r, in tf32 twice (half precision) or three times (float32), as in householder_rows.cuh.
// Why CUDA C++: ldmatrix transposes x between memory and operand for free, S is split into its tf32 terms in registers,
// and the blocks of D, in float64, share the launch.

#include "cuda/gram.cuh"
#include "cuda/householder.h"
#include "cuda/small.cuh"
#include "cuda/tiles.h"

namespace peftkern::cuda {

constexpr int kOuterWarps = 4, kOuterThreads = 32 * kOuterWarps;
constexpr int kOuterColumns = 64, kOuterRows = 32;
constexpr int kCoreRows = 128;  // of A and B per block

template <typename X, int R>
struct OuterTile {
  static constexpr int kStages = R == 128 ? 2 : 3;
  // 16 bytes more than 64 columns: for ldmatrix, and for lanes that read rows 2t and columns g of float32.
  static constexpr int kStride = kOuterColumns + 16 / sizeof(X);
  static constexpr int kXBytes = kOuterRows * kStride * sizeof(X), kSFloats = kOuterRows * R;
  static constexpr int kShared = kStages * (kXBytes + kSFloats * 4);
  static constexpr int kPiece = 16 / sizeof(X), kPieces = kOuterColumns / kPiece;
};

// Operands of x^T for 16 columns, and the rows 2t, 2t + 1 of two eights.
template <int kStride, typename X>
__device__ inline void load_transposed(const X* at, int lane, uint32_t (&a)[2][1][4]) {
  uint32_t m[4];
  load_matrices_transposed(m, at + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float left[2], right[2];
    unpack(m[2 * h], left, X());
    unpack(m[2 * h + 1], right, X());
    a[h][0][0] = __float_as_uint(left[0]), a[h][0][2] = __float_as_uint(left[1]);
    a[h][0][1] = __float_as_uint(right[0]), a[h][0][3] = __float_as_uint(right[1]);
  }
}
template <int kStride>
__device__ inline void load_transposed(const float* at, int lane, uint32_t (&a)[2][2][4]) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float* row = at + (8 * h + 2 * t) * kStride + g;
    split_pairs(make_float2(row[0], row[kStride]), make_float2(row[8], row[kStride + 8]), a[h]);
  }
}

template <typename X, int R>
__device__ void outer_block(const Outer& a, char* shared) {
  using Tile = OuterTile<X, R>;
  constexpr int kTiles = R / 8, kTerms = sizeof(X) == 4 ? 2 : 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int columns = (a.K + kOuterColumns - 1) / kOuterColumns;
  const int column0 = blockIdx.x % columns * kOuterColumns;
  const int chunk = blockIdx.x / columns;
  const bool second = chunk >= a.pairs[0].chunks;
  const OuterPair& pair = a.pairs[second];
  const int64_t begin = int64_t(second ? chunk - a.pairs[0].chunks : chunk) * pair.chunk_rows;
  const int64_t end = min(begin + pair.chunk_rows, pair.rows);
  const int steps = int((end - begin + kOuterRows - 1) / kOuterRows);
  float* S_ring = reinterpret_cast<float*>(shared);
  X* x_ring = reinterpret_cast<X*>(S_ring + Tile::kStages * Tile::kSFloats);

  const auto fetch = [&](int step) {
    if (step < steps) {
      const int64_t row0 = begin + int64_t(step) * kOuterRows;
      X* to = x_ring + step % Tile::kStages * (kOuterRows * Tile::kStride);
      const X* x = static_cast<const X*>(pair.x);
      if (a.wide[second]) {
#pragma unroll
        for (int i = threadIdx.x; i < kOuterRows * Tile::kPieces; i += kOuterThreads) {
          const int row = i / Tile::kPieces, column = i % Tile::kPieces * Tile::kPiece;
          const int left = row0 + row < end ? a.K - column0 - column : 0;
          const int bytes = max(0, min(left, Tile::kPiece)) * int(sizeof(X));
          const X* from = x + (row0 + row) * pair.x_stride + column0 + column;
          copy_async_16(to + row * Tile::kStride + column, bytes > 0 ? from : x, bytes);
        }
      } else {
        for (int i = threadIdx.x; i < kOuterRows * kOuterColumns; i += kOuterThreads) {
          const int row = i / kOuterColumns, column = i % kOuterColumns;
          const bool inside = row0 + row < end && column0 + column < a.K;
          const X* from = x + (row0 + row) * pair.x_stride + column0 + column;
          to[row * Tile::kStride + column] = inside ? *from : X(0.0f);
        }
      }
      load_tile<R, kOuterThreads>(S_ring + step % Tile::kStages * Tile::kSFloats, pair.S, row0, kOuterRows, end, a.r,
                                  a.wide_S[second], threadIdx.x);
    }
    copy_commit();
  };

  float total[kTiles][4] = {};
  for (int step = 0; step < Tile::kStages - 1; step++) fetch(step);
  for (int step = 0; step < steps; step++) {
    copy_wait<Tile::kStages - 2>();
    __syncthreads();
    fetch(step + Tile::kStages - 1);
    const X* x = x_ring + step % Tile::kStages * (kOuterRows * Tile::kStride) + 16 * warp;
    const float* S = S_ring + step % Tile::kStages * Tile::kSFloats;
#pragma unroll
    for (int m = 0; m < kOuterRows; m += 16) {
      uint32_t left[2][kTerms][4];
      load_transposed<Tile::kStride>(x + m * Tile::kStride, lane, left);
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        if (8 * n >= a.r) break;
        float right[2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) right[i / 2][i % 2] = S[place<R>(m + i / 2 * 8 + 2 * t + i % 2, 8 * n + g)];
        products(total[n], left, right);
      }
    }
  }
  float* out = a.partial + int64_t(chunk) * a.K * a.r;
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
      const int row = column0 + 16 * warp + g + 8 * lower, column = 8 * n + 2 * t;
      if (row >= a.K || column >= a.r) continue;
      float* to = out + int64_t(row) * a.r + column;
      if (a.r % 2 == 0) {
        *reinterpret_cast<float2*>(to) = make_float2(total[n][2 * lower], total[n][2 * lower + 1]);
      } else {
        to[0] = total[n][2 * lower];
        if (column + 1 < a.r) to[1] = total[n][2 * lower + 1];
      }
    }
  }
}

// Block `index` of those that make D.
__device__ inline void core_block(const Outer& a, int index, double* shared) {
  const int tiles = (a.r + 31) / 32, tile = index % (tiles * tiles);
  const int64_t begin = int64_t(index / (tiles * tiles)) * kCoreRows + threadIdx.x / 32 * (kCoreRows / kOuterWarps);
  double sum[4][4][2] = {};
  gram(a.A, a.B, tile / tiles * 32, tile % tiles * 32, begin, min(begin + kCoreRows / kOuterWarps, a.core_rows), a.r,
       a.wide_core, threadIdx.x % 32, sum);
  add_warps<kOuterWarps>(sum, shared, a.core_partial + int64_t(index) * kGramTile);
}

template <typename X, int R>
__global__ void __launch_bounds__(kOuterThreads) householder_outer_kernel(const __grid_constant__ Outer a) {
  extern __shared__ __align__(16) char shared[];
  const int blocks = (a.K + kOuterColumns - 1) / kOuterColumns * (a.pairs[0].chunks + a.pairs[1].chunks);
  if (blockIdx.x < blocks) {
    outer_block<X, R>(a, shared);
  } else {
    core_block(a, blockIdx.x - blocks, reinterpret_cast<double*>(shared));
  }
}

__global__ void __launch_bounds__(256) householder_outer_sum_kernel(const __grid_constant__ Outer a) {
  const int64_t count = int64_t(a.K) * a.r, i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  const int64_t dV_threads = (count + 1023) / 1024 * 256;
  if (i < dV_threads) {
    const int chunks = a.pairs[0].chunks + a.pairs[1].chunks;
    if (a.wide_sum && 4 * i < count) {
      float4 total = {0, 0, 0, 0};
      for (int c = 0; c < chunks; c++) {
        const float4 v = *reinterpret_cast<const float4*>(a.partial + c * count + 4 * i);
        total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
      }
      *reinterpret_cast<float4*>(a.dV + 4 * i) =
          make_float4(a.sign * total.x, a.sign * total.y, a.sign * total.z, a.sign * total.w);
    } else {
      for (int64_t e = 4 * i; e < min(4 * i + 4, count); e++) {
        float total = 0;
        for (int c = 0; c < chunks; c++) total += a.partial[c * count + e];
        a.dV[e] = a.sign * total;
      }
    }
  } else if (a.D != nullptr) {
    const int tiles = (a.r + 31) / 32;
    const int64_t item = i - dV_threads;
    if (item >= tiles * tiles * kGramTile) return;
    const int tile = item / kGramTile, place = item % kGramTile;
    const int row = tile / tiles * 32 + gram_row(place), column = tile % tiles * 32 + gram_column(place);
    if (row >= a.r || column >= a.r) return;
    double total = 0;
    for (int64_t c = 0; c < a.core_chunks; c++) {
      total += a.core_partial[c * tiles * tiles * kGramTile + item];
    }
    a.D[row * a.r + column] = a.sign * total;
  }
}

int outer_chunks(int64_t rows, int K) {
  // As many as fill a large device, but none of fewer than 128 rows.
  const int64_t columns = (K + kOuterColumns - 1) / kOuterColumns, fill = (kFill + columns - 1) / columns;
  const int64_t most = (rows + 127) / 128;
  return int(most < fill ? most : fill);
}

int core_partials(int64_t rows, int r) {
  const int tiles = (r + 31) / 32;
  return int((rows + kCoreRows - 1) / kCoreRows) * tiles * tiles;
}

template <typename X, int R>
static int launch_outer(const Outer& a, int core_blocks, void* stream) {
  static_assert(OuterTile<X, R>::kShared <= kLeastShared);
  const int columns = (a.K + kOuterColumns - 1) / kOuterColumns;
  const int blocks = columns * (a.pairs[0].chunks + a.pairs[1].chunks) + core_blocks;
  const int core = kOuterWarps * kGramTile * 8, tile = OuterTile<X, R>::kShared;
  const int shared = core_blocks > 0 && core > tile ? core : tile;
  return blocks == 0 ? 0 : launch(householder_outer_kernel<X, R>, dim3(blocks), kOuterThreads, shared, stream, a);
}

template <typename X>
static int launch_outer(const Outer& a, int core_blocks, void* stream) {
  switch (padded_rank(a.r)) {
    case 32:
      return launch_outer<X, 32>(a, core_blocks, stream);
    case 64:
      return launch_outer<X, 64>(a, core_blocks, stream);
    default:
      return launch_outer<X, 128>(a, core_blocks, stream);
  }
}

int outer(Dtype dtype, Outer a, void* stream) {
  const int size = int(dtype_size(dtype));
  for (int p = 0; p < 2; p++) {
    OuterPair& pair = a.pairs[p];
    pair.chunks = pair.rows == 0 ? 0 : outer_chunks(pair.rows, a.K);
    // Whole steps, so that only the last chunk has rows beyond its end.
    if (pair.chunks > 0) {
      const int64_t steps = (pair.rows + kOuterRows - 1) / kOuterRows;
      pair.chunk_rows = (steps + pair.chunks - 1) / pair.chunks * kOuterRows;
    }
    a.wide[p] = wide(pair.x, pair.x_stride, size);
    a.wide_S[p] = wide(pair.S, a.r, 4);
  }
  a.wide_core = wide(a.A, a.r, 4) && wide(a.B, a.r, 4);
  a.wide_sum = wide(a.partial, 0, 4) && wide(a.dV, 0, 4) && int64_t(a.K) * a.r % 4 == 0;
  const int tiles = (a.r + 31) / 32, core_blocks = a.D == nullptr ? 0 : core_partials(a.core_rows, a.r);
  a.core_chunks = core_blocks / (tiles * tiles);
  int status = dtype == kFloat32    ? launch_outer<float>(a, core_blocks, stream)
               : dtype == kBFloat16 ? launch_outer<bf16>(a, core_blocks, stream)
                                    : launch_outer<fp16>(a, core_blocks, stream);
  if (status != cudaSuccess) return status;
  const int64_t threads = (int64_t(a.K) * a.r + 1023) / 1024 * 256 + (a.D == nullptr ? 0 : tiles * tiles * kGramTile);
  return launch(householder_outer_sum_kernel, dim3(unsigned((threads + 255) / 256)), 256, 0, stream, a);
}

}  // namespace peftkern::cuda
