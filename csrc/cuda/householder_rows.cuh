// Products of rows with V and updates of rows by it, in one launch:
//   P = x V [M, r],  S = P C [M, r] (float64 inside),  z = x + sign S V^T        x, z [M, K], V [K, r], C [r, r]
//   with `given`:  S = given, z = x + sign S V^T (x may be null: an outer product);  with `saved`: saved_out = saved C'
//
// Launch: one block of 8 warps per 64 rows. Two sweeps over the columns in chunks of 128 bytes: the first multiplies,
// the second updates, in the opposite order. A ring of chunks of x in shared memory feeds the first; the second finds
// there what the ring still holds (all of x where it fits: one read), and fetches the rest from where it was read last,
// the L2 cache. S stays in shared memory. Two warps share 16 rows: in the first sweep they take turns with the columns
// of V, in the second each has half of a chunk. Few rows do not fill a device: then blocks share the columns as well,
// the first sweep leaves partial sums, a kernel of one warp per 8 rows adds them and takes P C, and a third launch
// updates.
//
// Bytes: x and z once each at least, s M K apiece, and P 4 M r. Requested: x a second time beyond the ring's chunks,
// and V (4 K r) once per sweep and block, from L2. A tile of 16 rows would keep all of x for K = 4096 but ask L2 for V
// four times as often: 512 MB for r = 32, 8192 tokens, against 64 MB for reading x again.
//
// Flops: 2 M K r in tf32 per sweep, in the first twice for half precision (exact in tf32, V has two terms) and three
// times for float32, in the second three times; S: M r^2 in float64. tf32 has float32's range, so V needs no scaling;
// three tf32 products take less than half the time of FFMA. Sums of sixteen terms are added outside of the tensor core,
// which cuts towards zero.
//
// Why CUDA C++: a ring of chunks that survives from one sweep to the next, and a tile S that is multiplied in place
// between them, cannot be said in Triton.
#pragma once

#include <algorithm>

#include "cuda/householder.h"
#include "cuda/small.cuh"
#include "cuda/tiles.h"
#include "cuda/warp.cuh"

namespace peftkern::cuda {

template <typename X, int R>
struct RowTile {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kRows = 8 * kWarps;
  static constexpr int kVStages = 3;
  static constexpr int kBlocks = R == 128 ? 1 : 2;  // on one multiprocessor, by registers
  // r = 128 takes half chunks, so that V's stages fit 99 KiB.
  static constexpr int kColumns = (R == 128 ? 64 : 128) / sizeof(X);
  // Rows of a chunk are apart by an odd multiple of 16 bytes (ldmatrix), or by 8 or 24 words of 32 (pairs of float32).
  static constexpr int kStride = kColumns + 8;
  static constexpr int kXBytes = kRows * kStride * sizeof(X), kVFloats = kColumns * R, kSFloats = kRows * R;
  static constexpr int kPieces = kColumns * sizeof(X) / 16, kPiece = 16 / sizeof(X);  // of 16 bytes in a row
  static constexpr int shared(int x_stages) { return (kVStages * kVFloats + kSFloats) * 4 + x_stages * kXBytes; }
};

// Row and first column of the i-th piece of 16 bytes of rows that have kPieces, such that eight neighbours meet no bank
// twice: they take one row of 128 bytes, else eight rows of half precision, or four rows of float32 and two pieces.
template <typename Tile, int kPieces>
__device__ inline void piece_of(int i, int& row, int& column) {
  constexpr int kTall = kPieces == 8 ? 1 : Tile::kPiece, kAcross = kPieces * kTall / 8;
  row = i / 8 / kAcross * kTall + i % kTall;
  column = (i / 8 % kAcross * (8 / kTall) + i % 8 / kTall) * Tile::kPiece;
}

// Operand a of the products for 8 columns from `column` on, in the order 2t, 2t + 1 of every lane.
template <typename X>
struct Left {
  static constexpr int kTerms = 1;
  // Half precision: 16 columns per ldmatrix, two operands of one term.
  template <int kStride>
  __device__ static void load(const X* rows, int column, int lane, uint32_t (&a)[2][kTerms][4]) {
    uint32_t m[4];
    load_matrices(m, rows + (lane % 16) * kStride + column + lane / 16 * 8);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float upper[2], lower[2];
      unpack(m[2 * h], upper, X());
      unpack(m[2 * h + 1], lower, X());
      a[h][0][0] = __float_as_uint(upper[0]), a[h][0][2] = __float_as_uint(upper[1]);
      a[h][0][1] = __float_as_uint(lower[0]), a[h][0][3] = __float_as_uint(lower[1]);
    }
  }
};

template <>
struct Left<float> {
  static constexpr int kTerms = 2;
  template <int kStride>
  __device__ static void load(const float* rows, int column, int lane, uint32_t (&a)[2][kTerms][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float* at = rows + g * kStride + column + 8 * h + 2 * t;
      split_pairs(*reinterpret_cast<const float2*>(at), *reinterpret_cast<const float2*>(at + 8 * kStride), a[h]);
    }
  }
};

template <typename X>
__device__ inline void load_pair(const X* at, float (&v)[2]) {
  unpack(*reinterpret_cast<const uint32_t*>(at), v, X());
}
__device__ inline void load_pair(const float* at, float (&v)[2]) {
  const float2 both = *reinterpret_cast<const float2*>(at);
  v[0] = both.x, v[1] = both.y;
}
template <typename X>
__device__ inline void store_pair(X* at, float low, float high) {
  *reinterpret_cast<uint32_t*>(at) = pack(low, high, X());
}
__device__ inline void store_pair(float* at, float low, float high) {
  *reinterpret_cast<float2*>(at) = make_float2(low, high);
}

template <typename X, int R>
class RowBlock {
  using Tile = RowTile<X, R>;
  static constexpr int kColumns = Tile::kColumns, kStride = Tile::kStride, kStages = Tile::kVStages;
  static constexpr int kPieces = Tile::kPieces, kPiece = Tile::kPiece;

 public:
  __device__ RowBlock(const Rows& args, char* shared)
      : a(args),
        row0(int64_t(blockIdx.x) * Tile::kRows),
        column0(blockIdx.y * args.part_columns),
        columns(min(args.K - column0, args.part_columns)),
        chunks((columns + kColumns - 1) / kColumns),
        warp(threadIdx.x / 64),
        half(threadIdx.x / 32 % 2),
        lane(threadIdx.x % 32) {
    V_ring = reinterpret_cast<float*>(shared);
    S = V_ring + kStages * Tile::kVFloats + warp * 16 * R;
    x_ring = shared + (kStages * Tile::kVFloats + Tile::kSFloats) * 4;
  }

  __device__ void run() {
    // Of S, a warp owns 8 rows where rows are taken one by one.
    float* own = S + 8 * half * R;
    const int64_t row = row0 + 16 * warp + 8 * half;
    if (a.saved != nullptr && blockIdx.y == 0) {
      load_small(own, a.saved, row);
      times_core<R>(own, a.saved_core, a.r, lane);
      store_rows<R>(own, a.saved_out, row, a.M, a.r, false, lane);
      __syncthreads();
    }
    if (a.given != nullptr) {
      load_small(own, a.given, row);
    } else {
      multiply();
      if (a.P != nullptr) store_rows<R>(own, a.P + blockIdx.y * a.M * a.r, row, a.M, a.r, a.paired, lane);
      if (a.core.at == nullptr) return;
      __syncwarp();
      times_core<R>(own, a.core, a.r, lane);
      if (a.S != nullptr) store_rows<R>(own, a.S, row, a.M, a.r, false, lane);
    }
    if (a.z != nullptr) update();
  }

 private:
  const Rows& a;
  const int64_t row0;
  const int column0, columns, chunks, warp, half, lane;  // warp: of the 16 rows that two share
  float *V_ring, *S;
  char* x_ring;

  __device__ X* x_chunk(int c) const { return reinterpret_cast<X*>(x_ring + c % a.x_stages * Tile::kXBytes); }
  __device__ float* V_chunk(int c) const { return V_ring + c % kStages * Tile::kVFloats; }

  // Eight rows of [M, r] from global memory to the warp's rows of S.
  __device__ void load_small(float* own, const float* from, int64_t row) {
    load_tile<R, 32>(own, from, row, 8, a.M, a.r, false, lane);
    copy_commit();
    copy_wait<0>();
    __syncwarp();
  }

  __device__ void load_V(int c) {
    const int64_t begin = column0 + c * kColumns;
    load_tile<R, Tile::kThreads>(V_chunk(c), a.V, begin, kColumns, min(a.K, column0 + columns), a.r, a.wide_V,
                                 threadIdx.x);
  }

  __device__ void load_x(int c) {
    const X* x = static_cast<const X*>(a.x);
    X* chunk = x_chunk(c);
    if (a.wide_x) {
#pragma unroll
      for (int i = threadIdx.x; i < Tile::kRows * kPieces; i += Tile::kThreads) {
        int row, column;
        piece_of<Tile, kPieces>(i, row, column);
        const int left = columns - c * kColumns - column;
        const int bytes = row0 + row < a.M ? max(0, min(left, kPiece)) * int(sizeof(X)) : 0;
        const X* from = x + (row0 + row) * a.x_stride + column0 + c * kColumns + column;
        copy_async_16(chunk + row * kStride + column, bytes > 0 ? from : x, bytes);
      }
    } else {
      for (int i = threadIdx.x; i < Tile::kRows * kColumns; i += Tile::kThreads) {
        const int row = i / kColumns, column = i % kColumns;
        const bool inside = row0 + row < a.M && c * kColumns + column < columns;
        const X* from = x + (row0 + row) * a.x_stride + column0 + c * kColumns + column;
        chunk[row * kStride + column] = inside ? *from : X(0.0f);
      }
    }
  }

  // S := x V; of every two tiles of eight columns the warp takes one.
  __device__ void multiply() {
    constexpr int kTiles = R / 16;
    const int g = lane / 4, t = lane % 4;
    float total[kTiles][4] = {};
    for (int c = 0; c < kStages - 1; c++) {
      if (c < chunks) load_x(c), load_V(c);
      copy_commit();
    }
    for (int c = 0; c < chunks; c++) {
      copy_wait<kStages - 2>();
      __syncthreads();
      if (c + kStages - 1 < chunks) load_x(c + kStages - 1), load_V(c + kStages - 1);
      copy_commit();
      const X* x = x_chunk(c) + 16 * warp * kStride;
      const float* V = V_chunk(c);
#pragma unroll 1
      for (int k = 0; k < kColumns; k += 16) {
        uint32_t left[2][Left<X>::kTerms][4];
        Left<X>::template load<kStride>(x, k, lane, left);
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
          const int column = 16 * n + 8 * half + g;
          if (16 * n + 8 * half >= a.r) break;
          float right[2][2];
#pragma unroll
          for (int i = 0; i < 4; i++) right[i / 2][i % 2] = V[place<R>(k + i / 2 * 8 + 2 * t + i % 2, column)];
          products(total[n], left, right);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      if (16 * n >= a.r) break;
      const int column = 16 * n + 8 * half + 2 * t;
      *reinterpret_cast<float2*>(S + place<R>(g, column)) = make_float2(total[n][0], total[n][1]);
      *reinterpret_cast<float2*>(S + place<R>(g + 8, column)) = make_float2(total[n][2], total[n][3]);
    }
    __syncthreads();
  }

  // z = x + sign S V^T, from the last chunk to the first.
  __device__ void update() {
    const int kept_x = a.given ? 0 : a.x_stages, kept_V = a.given ? 0 : kStages;
    const auto fetch = [&](int c) {
      if (c >= 0) {
        if (c < chunks - kept_V) load_V(c);
        if (c < chunks - kept_x && a.x != nullptr) load_x(c);
      }
      copy_commit();
    };
    if (a.given) {
      for (int i = 0; i < kStages - 1; i++) fetch(chunks - 1 - i);
    }
    for (int c = chunks - 1; c >= 0; c--) {
      copy_wait<kStages - 2>();
      __syncthreads();
      fetch(c - (kStages - 1));
      update_chunk(c);
    }
  }

  // The warp's half of a chunk.
  __device__ void update_chunk(int c) {
    constexpr int kTiles = kColumns / 16;
    const int g = lane / 4, t = lane % 4;
    const float* V = V_chunk(c);
    const int first = half * (kColumns / 2) + g;
    float total[kTiles][4] = {};
#pragma unroll 1
    for (int j = 0; j < a.r; j += 16) {
      uint32_t left[2][2][4];
      const int column = j + 2 * t;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        split_pairs(*reinterpret_cast<const float2*>(S + place<R>(g, column + 8 * h)),
                    *reinterpret_cast<const float2*>(S + place<R>(g + 8, column + 8 * h)), left[h]);
      }
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        float right[2][2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float2 v = *reinterpret_cast<const float2*>(V + place<R>(first + 8 * n, column + 8 * h));
          right[h][0] = v.x, right[h][1] = v.y;
        }
        products(total[n], left, right);
      }
    }
    X* x = x_chunk(c) + 16 * warp * kStride + first - g;
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        X* at = x + (g + 8 * lower) * kStride + 8 * n + 2 * t;
        float v[2] = {};
        if (a.x != nullptr) load_pair(at, v);
        store_pair(at, v[0] + a.sign * total[n][2 * lower], v[1] + a.sign * total[n][2 * lower + 1]);
      }
    __syncwarp();
    store_chunk(x, c);
  }

  // 16 rows of half a chunk to z.
  __device__ void store_chunk(const X* chunk, int c) {
    X* z = static_cast<X*>(a.z);
    const int begin = c * kColumns + half * (kColumns / 2);
#pragma unroll
    for (int i = lane; i < 16 * kPieces / 2; i += 32) {
      int row, column;
      piece_of<Tile, kPieces / 2>(i, row, column);
      const int left = columns - begin - column;
      if (row0 + 16 * warp + row >= a.M) continue;
      const X* from = chunk + row * kStride + column;
      X* to = z + (row0 + 16 * warp + row) * a.z_stride + column0 + begin + column;
      if (a.wide_z && left >= kPiece) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int k = 0; k < min(left, kPiece); k++) to[k] = from[k];
      }
    }
  }
};

template <typename X, int R>
__global__ void __launch_bounds__(RowTile<X, R>::kThreads, RowTile<X, R>::kBlocks)
    householder_rows_kernel(const __grid_constant__ Rows args) {
  extern __shared__ __align__(16) char shared[];
  RowBlock<X, R>(args, shared).run();
}

template <typename X, int R>
int launch_sweeps(Rows args, int parts, void* stream) {
  using Tile = RowTile<X, R>;
  static_assert(Tile::shared(Tile::kVStages) <= kLeastShared);
  const Architecture arch = architecture();
  const auto fitting = [](int bytes) { return (bytes - Tile::shared(0)) / Tile::kXBytes; };
  args.part_columns = parts == 1 ? args.K : row_part_columns(args.M, args.K);
  const int chunks = (args.part_columns + Tile::kColumns - 1) / Tile::kColumns;
  // All of x where one block may have it, else a ring that leaves room for a second block.
  const bool both = args.given == nullptr && args.z != nullptr;
  const int most = std::max(fitting(arch.shared_of_two), Tile::kVStages);
  args.x_stages = both && chunks <= fitting(arch.shared) ? std::max(chunks, Tile::kVStages) : Tile::kVStages;
  if (both && chunks > args.x_stages) args.x_stages = most;
  args.wide_x = wide(args.x, args.x_stride, sizeof(X));
  args.wide_z = wide(args.z, args.z_stride, sizeof(X));
  args.wide_V = wide(args.V, args.r, 4);
  const dim3 grid(row_tiles(args.M), (args.K + args.part_columns - 1) / args.part_columns);
  return launch(householder_rows_kernel<X, R>, grid, Tile::kThreads, Tile::shared(args.x_stages), stream, args);
}

template <typename X, int R>
int launch_rows(const Rows& args, void* stream) {
  const int parts = row_parts(args.M, args.K);
  if (args.given != nullptr) return launch_sweeps<X, R>(args, parts, stream);
  if (parts == 1) return launch_sweeps<X, R>(args, 1, stream);
  Rows first = args;
  first.P = args.split, first.z = nullptr, first.S = nullptr, first.saved = nullptr, first.core.at = nullptr;
  first.paired = false;
  if (const int status = launch_sweeps<X, R>(first, parts, stream)) return status;
  if (const int status = finish_parts(args, parts, stream)) return status;
  if (args.z == nullptr) return 0;
  Rows second = args;
  second.given = args.S, second.saved = nullptr;
  return launch_sweeps<X, R>(second, parts, stream);
}

template <typename X>
int launch_rows(const Rows& args, void* stream) {
  switch (padded_rank(args.r)) {
    case 32:
      return launch_rows<X, 32>(args, stream);
    case 64:
      return launch_rows<X, 64>(args, stream);
    default:
      return launch_rows<X, 128>(args, stream);
  }
}

}  // namespace peftkern::cuda
