// Rows times one dense matrix per group of G columns, up to 64 of them (half precision: 128), in one launch:
//   z = x D          [M, n G]     (times D^T when transposed), half precision or float32, D [n, G, G] float32;
//                                 s x D with one float32 number s of each row, before the rounding
//   dx = dz D^T, dD = x^T dz within groups, summed over a run of rows: partial [chunks, n, G, G] float32
// A block rotation has D = R; the f stages of a butterfly are multiplied into one D by a small launch
// (block_stages.cu).
//
// Launch: blocks of 4 warps, one per panel of 64 columns (groups padded to 8, 16, 32 or 64) and chunk of rows; 64 rows
// at a time come through a ring of asynchronous copies. A warp keeps D of its 32 columns in registers, rotates half of
// the rows and, backward, holds a quarter of the panel's dD. Groups of more than 64 columns are padded to a panel of
// 128 and 8 warps; D and dD together are too much for their registers, so dx and dD are two launches.
//
// Bytes: x once and z once, backward dz and x once and dx once (dz twice beyond 64); D twice per panel and chunk,
// mostly from L1; partial sums 4 n G^2 per chunk, chunks as few as fill a large device.
// Least: 2 s M n G, backward 3 s M n G, and 4 n G^2 for D and dD.
// Flops: 2 M n G P in two terms of half precision or three of tf32; backward as much again for dD, in half precision in
// one term.
// Why CUDA C++: ldmatrix feeds one tile in shared memory to both products, as it lies and transposed, and the blocks
// stay in registers over all rows.
#pragma once

#include "cuda/block_mma.cuh"
#include "cuda/blocks.h"
#include "cuda/tiles.h"

namespace peftkern::cuda {

// A tile of rows of a panel into shared memory by copies of kPiece bytes; what is no number of a group, or beyond
// `end`, is 0.
template <int kPiece, typename X, int P>
__device__ inline void copy_panel(X* to, const void* rows, int64_t stride, int64_t row0, int64_t end, int n, int G) {
  using Tile = BlockTile<X, P>;
  constexpr int kElements = kPiece / int(sizeof(X)), kPieces = Tile::kPanel / kElements;
  constexpr int kRows = Tile::kThreads / kPieces;  // that all threads copy at once
  const int row = threadIdx.x / kPieces, column = threadIdx.x % kPieces * kElements;
  const int group = int(blockIdx.x) * (kPanelOf<P> / P) + column / P, within = column % P;
  const X* base = static_cast<const X*>(rows);
  const X* from = base + (row0 + row) * stride + int64_t(group) * G + within;
  const int left = group < n && within < G ? int(min(end - row0, int64_t(kTileRows))) - row : 0;
  to += row * Tile::kStride + column;
#pragma unroll 4
  for (int i = 0; i < kTileRows; i += kRows, from += kRows * stride, to += kRows * Tile::kStride) {
    const bool inside = i < left;
    if constexpr (kPiece == 16) {
      copy_async_16(to, inside ? from : base, inside ? 16 : 0);
    } else if constexpr (kPiece == 4) {
      copy_async_4(to, inside ? from : base, inside ? 4 : 0);
    } else {
      *to = inside ? *from : X(0.0f);
    }
  }
}

template <typename X, int P>
__device__ inline void copy_panel(X* to, const void* rows, int64_t stride, int piece, int64_t row0, int64_t end,
                                  const BlockRows& a) {
  if (piece == 16) {
    copy_panel<16, X, P>(to, rows, stride, row0, end, a.n, a.G);
  } else if (piece == 4) {
    copy_panel<4, X, P>(to, rows, stride, row0, end, a.n, a.G);
  } else {
    copy_panel<sizeof(X), X, P>(to, rows, stride, row0, end, a.n, a.G);
  }
}

// Lane t of four has number t of eights j = 0 .. 3 in v[j]; afterwards it has numbers 0 .. 3 of eight t.
__device__ inline void exchange(uint32_t (&v)[4], int t) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool upper = t & distance;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int j = distance == 1 ? 2 * i : i;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? v[j] : v[j + distance], distance);
      (upper ? v[j] : v[j + distance]) = got;
    }
  }
}

// One row of a slice, of which lane t has columns 2t and 2t + 1 of each eight; `to` is null for no row.
template <typename X, int P>
__device__ inline void store_row(X* to, const float (&z)[4][2], int first_column, int t, const BlockRows& a) {
  const auto place = [&](int column) {
    const int group = int(blockIdx.x) * (kPanelOf<P> / P) + column / P;
    return to != nullptr && group < a.n && column % P < a.G ? to + int64_t(group) * a.G + column % P : nullptr;
  };
  if constexpr (sizeof(X) == 2) {
    uint32_t v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = pack(z[j][0], z[j][1], X());
    exchange(v, t);
    if (a.G % 8 == 0) {
      if (X* at = place(first_column + 8 * t)) *reinterpret_cast<uint4*>(at) = make_uint4(v[0], v[1], v[2], v[3]);
      return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const uint16_t bits = uint16_t(v[j / 2] >> 16 * (j % 2));
      if (X* at = place(first_column + 8 * t + j)) *reinterpret_cast<uint16_t*>(at) = bits;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const bool odd = t % 2;
      float v[4];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float got = __shfl_xor_sync(~0u, odd ? z[i][j] : z[i + 1][j], 1);
        v[j] = odd ? got : z[i][j];
        v[2 + j] = odd ? z[i + 1][j] : got;
      }
      const int column = first_column + 8 * (i + odd) + 4 * (t / 2);
      if (a.G % 4 == 0) {
        if (X* at = place(column)) *reinterpret_cast<float4*>(at) = make_float4(v[0], v[1], v[2], v[3]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (X* at = place(column + j)) *at = v[j];
        }
      }
    }
  }
}

// Rotates the warp's half of a tile of rows, which begin at row0 of z, and stores it.
template <typename X, int P, bool kScaled = false>
__device__ inline void rotate_tile(const BlockOperand<X, P>& D, const X* rows, int64_t row0, int64_t end,
                                   const BlockRows& a) {
  using Tile = BlockTile<X, P>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slice = warp % Tile::kSlices, half = warp / Tile::kSlices;
  const int64_t width = int64_t(a.n) * a.G;
#pragma unroll 1
  for (int m = 0; m < 2; m++) {
    const int first = 32 * half + 16 * m;
    float z[4][4] = {};
    D.rotate(rows + first * Tile::kStride, slice, lane, z);
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
      const int64_t row = row0 + first + 8 * lower + lane / 4;
      float pairs[4][2];
#pragma unroll
      for (int j = 0; j < 4; j++) pairs[j][0] = z[j][2 * lower], pairs[j][1] = z[j][2 * lower + 1];
      if constexpr (kScaled) {
        const float scale = row < end ? a.row_scale[row] : 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) pairs[j][0] *= scale, pairs[j][1] *= scale;
      }
      X* to = row < end ? static_cast<X*>(a.z) + row * width : nullptr;
      store_row<X, P>(to, pairs, kSlice * slice, lane % 4, a);
      if constexpr (sizeof(X) == 2 && !kScaled) {
        if (a.z_low == nullptr) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float kept[2];
          unpack(pack(pairs[j][0], pairs[j][1], X()), kept, X());
          pairs[j][0] -= kept[0], pairs[j][1] -= kept[1];
        }
        to = row < end ? static_cast<X*>(a.z_low) + row * width : nullptr;
        store_row<X, P>(to, pairs, kSlice * slice, lane % 4, a);
      }
    }
  }
}

template <typename X, int P>
__device__ inline void load_operand(BlockOperand<X, P>& D, const BlockRows& a) {
  const int first = int(blockIdx.x) * (kPanelOf<P> / P);
  D.load(
      [&](int k, int n) {
        const int group = first + n / P, row = k % P, column = n % P;
        float2 v = {0, 0};
        if (group >= a.n || row >= a.G || column >= a.G) return v;
        const float* at = a.D + (a.shared ? 0 : int64_t(group) * a.G * a.G);
        at += a.transpose ? column * a.G + row : row * a.G + column;
        if (a.transpose && a.wide_D) return *reinterpret_cast<const float2*>(at);
        v.x = *at;
        if (row + 1 < a.G) v.y = at[a.transpose ? 1 : a.G];
        return v;
      },
      threadIdx.x / 32 % BlockTile<X, P>::kSlices, threadIdx.x % 32);
}

template <typename X>
constexpr int kForwardStages = sizeof(X) == 2 ? 4 : 3;

template <typename X, int P, bool kScaled>
__device__ inline void rotate_rows(const BlockRows& a) {
  using Tile = BlockTile<X, P>;
  constexpr int kStages = kForwardStages<X>;
  extern __shared__ __align__(16) char shared[];
  X* ring = reinterpret_cast<X*>(shared);
  const int64_t begin = int64_t(blockIdx.y) * a.chunk_rows, end = min(begin + a.chunk_rows, a.M);
  const int steps = int((end - begin + kTileRows - 1) / kTileRows);
  const auto fetch = [&](int step) {
    if (step < steps) {
      copy_panel<X, P>(ring + step % kStages * (kTileRows * Tile::kStride), a.rows, a.stride, a.piece,
                       begin + int64_t(step) * kTileRows, end, a);
    }
    copy_commit();
  };
#pragma unroll 1
  for (int step = 0; step < kStages - 1; step++) fetch(step);
  BlockOperand<X, P> D;
  load_operand(D, a);
  for (int step = 0; step < steps; step++) {
    copy_wait<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);
    rotate_tile<X, P, kScaled>(D, ring + step % kStages * (kTileRows * Tile::kStride),
                               begin + int64_t(step) * kTileRows, end, a);
  }
}

template <typename X, int P>
__global__ void __launch_bounds__(BlockTile<X, P>::kThreads) block_rotate_kernel(const __grid_constant__ BlockRows a) {
  rotate_rows<X, P, false>(a);
}
template <typename X, int P>
__global__ void __launch_bounds__(BlockTile<X, P>::kThreads)
    block_rotate_scaled_kernel(const __grid_constant__ BlockRows a) {
  rotate_rows<X, P, true>(a);
}

template <typename X, int P>
constexpr int kBackwardStages = sizeof(X) == 2 && P <= 64 ? 3 : 2;
template <int P>
constexpr bool kRotates = P <= 64;

template <typename X, int P>
__global__ void __launch_bounds__(BlockTile<X, P>::kThreads)
    block_rotate_backward_kernel(const __grid_constant__ BlockRows a) {
  using Tile = BlockTile<X, P>;
  using Outer = BlockOuter<X, P>;
  constexpr int kStages = kBackwardStages<X, P>, kElements = kTileRows * Tile::kStride;
  extern __shared__ __align__(16) char shared[];
  X* ring = reinterpret_cast<X*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slice = warp % Tile::kSlices, half = warp / Tile::kSlices;
  const int64_t begin = int64_t(blockIdx.y) * a.chunk_rows, end = min(begin + a.chunk_rows, a.M);
  const int steps = int((end - begin + kTileRows - 1) / kTileRows);
  const auto fetch = [&](int step) {
    if (step < steps) {
      const int64_t row0 = begin + int64_t(step) * kTileRows;
      X* to = ring + step % kStages * (2 * kElements);
      copy_panel<X, P>(to, a.rows, a.stride, a.piece, row0, end, a);
      copy_panel<X, P>(to + kElements, a.saved, a.saved_stride, a.saved_piece, row0, end, a);
    }
    copy_commit();
  };
#pragma unroll 1
  for (int step = 0; step < kStages - 1; step++) fetch(step);
  // What D does not leave registers for is another launch.
  BlockOperand<X, kRotates<P> ? P : 8> D;
  if constexpr (kRotates<P>) {
    if (a.z != nullptr) load_operand(D, a);
  }
  Outer sums;
  for (int step = 0; step < steps; step++) {
    copy_wait<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);
    const X *rows = ring + step % kStages * (2 * kElements), *saved = rows + kElements;
    if constexpr (kRotates<P>) {
      if (a.z != nullptr) rotate_tile<X, P>(D, rows, begin + int64_t(step) * kTileRows, end, a);
    }
    sums.add(a.transpose ? saved : rows, a.transpose ? rows : saved, slice, half, lane);
  }
  const int first = int(blockIdx.x) * (kPanelOf<P> / P), g = lane / 4, t = lane % 4;
  float* out = a.partial + int64_t(blockIdx.y) * a.n * a.G * a.G;
#pragma unroll
  for (int m = 0; m < Outer::kM; m++) {
#pragma unroll
    for (int n = 0; n < Outer::kN; n++) {
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        const int row = Outer::row(slice, half, m) + g + 8 * lower, column = Outer::column(slice, half, n) + 2 * t;
        const int group = first + row / P, i = row % P, j = column % P;
        if (row / P != column / P || group >= a.n || i >= a.G || j >= a.G) continue;
        float* to = out + (int64_t(group) * a.G + i) * a.G + j;
        const float even = sums.total[m][n][2 * lower], odd = sums.total[m][n][2 * lower + 1];
        if (a.G % 2 == 0) {
          // An intrinsic, else the compiler merges the two branches into stores of single numbers.
          __stcg(reinterpret_cast<float2*>(to), make_float2(even, odd));
        } else {
          to[0] = even;
          if (j + 1 < a.G) to[1] = odd;
        }
      }
    }
  }
}

template <typename X, int P>
static int launch_block_rows(const BlockRows& a, void* stream) {
  using Tile = BlockTile<X, P>;
  const dim3 grid((a.n * P + Tile::kPanel - 1) / Tile::kPanel, block_chunks(a.M, a.n, a.G));
  const bool backward = a.partial != nullptr;
  if (!backward || (!kRotates<P> && a.z != nullptr)) {
    auto* kernel = a.row_scale != nullptr ? block_rotate_scaled_kernel<X, P> : block_rotate_kernel<X, P>;
    const int status = launch(kernel, grid, Tile::kThreads, kForwardStages<X> * Tile::kBytes, stream, a);
    if (status != cudaSuccess || !backward) return status;
  }
  auto* kernel = block_rotate_backward_kernel<X, P>;
  return launch(kernel, grid, Tile::kThreads, 2 * kBackwardStages<X, P> * Tile::kBytes, stream, a);
}

template <typename X>
static int launch_block_rows(BlockRows a, void* stream) {
  if (a.M == 0 || a.n == 0) return 0;
  const int chunks = block_chunks(a.M, a.n, a.G);
  a.chunk_rows = ((a.M + 63) / 64 + chunks - 1) / chunks * 64;
  const auto piece = [&](const void* p, int64_t stride) {
    for (int bytes : {16, 4}) {
      const uintptr_t all = reinterpret_cast<uintptr_t>(p) | uint64_t(stride) * sizeof(X) | a.G * sizeof(X);
      if (all % bytes == 0) return bytes;
    }
    return int(sizeof(X));
  };
  a.wide_D = a.G % 2 == 0 && reinterpret_cast<uintptr_t>(a.D) % 8 == 0;
  a.piece = piece(a.rows, a.stride);
  a.saved_piece = piece(a.saved, a.saved_stride);
  switch (padded_group(a.G)) {
    case 8:
      return launch_block_rows<X, 8>(a, stream);
    case 16:
      return launch_block_rows<X, 16>(a, stream);
    case 32:
      return launch_block_rows<X, 32>(a, stream);
    case 64:
      return launch_block_rows<X, 64>(a, stream);
    default:
      // In float32 a matrix of 128 x 128 and its split do not fit the registers.
      if constexpr (sizeof(X) == 2) return launch_block_rows<X, 128>(a, stream);
      return cudaErrorInvalidValue;
  }
}

}  // namespace peftkern::cuda
