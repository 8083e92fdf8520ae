// Products of rows with V and updates of rows by it, in one launch:
//   P = x V [M, r],  S = P C [M, r] (float64 inside),  z = x + sign S V^T        x, z [M, K], V [K, r], C [r, r]
//   with `given`:  S = given, z = x + sign S V^T (x may be null: an outer product);  with `saved`: saved_out = saved C'
//
// Launch: one block of 4 warps per 64 rows (and per `part_columns` columns, where V or the rows are few). Two sweeps over
// the columns in chunks of 128 bytes: the first multiplies, the second updates, in the opposite order. A ring of chunks
// of x in shared memory feeds the first; the second finds there what the ring still holds (all of x where it fits: one
// read), and fetches the rest from where it was read last, the L2 cache. S stays in shared memory.
//
// Bytes: x and z once each at least, s M K apiece, and P 4 M r. Requested: x a second time beyond the ring's chunks, and
// V (4 K r) once per sweep and block, from L2. A tile of 16 rows would keep all of x for K = 4096 but ask L2 for V four
// times as often: 512 MB for r = 32, 8192 tokens, against 64 MB for reading x again.
// Flops: 4 M K r in tf32 twice (half precision: x is exact in tf32, V has two terms) or three times; S: M r^2 in float64.
// Half precision takes tf32 products since they have float32's range: no scaling of V, two terms instead of three bf16
// ones. float32 takes three tf32 products: 6 times the FFMA rate over 3. Sums of sixteen terms are added
// outside of the tensor core, which cuts towards zero.
//
// Why CUDA C++: Triton has neither a ring that survives from one sweep to the next nor the r x r product in float64
// fragments between them.
#pragma once

#include <algorithm>

#include "cuda/householder.h"
#include "cuda/small.cuh"
#include "cuda/tiles.h"
#include "cuda/warp.cuh"

namespace peftkern::cuda {

template <typename X, int R>
struct RowTile {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kVStages = 3;
  // r = 128 takes half chunks, so that V's stages fit 99 KiB.
  static constexpr int kColumns = (R == 128 ? 64 : 128) / sizeof(X);
  // Rows of a chunk are apart by an odd multiple of 16 bytes (ldmatrix), or by 8 or 24 words of 32 (pairs of float32).
  static constexpr int kStride = kColumns + 8;
  static constexpr int kXBytes = kRows * kStride * sizeof(X), kVFloats = kColumns * R, kSFloats = kRows * R;
  static constexpr int kPieces = kColumns * sizeof(X) / 16, kPiece = 16 / sizeof(X);  // of 16 bytes in a row
  static constexpr int shared(int x_stages) { return (kVStages * kVFloats + kSFloats) * 4 + x_stages * kXBytes; }
};

// Row and first column of the i-th piece of 16 bytes of a chunk, such that eight neighbours meet no bank twice.
template <typename Tile>
__device__ inline void piece_of(int i, int& row, int& column) {
  if constexpr (Tile::kPieces == 8) {
    row = i / 8, column = i % 8 * Tile::kPiece;
  } else if constexpr (Tile::kPiece == 8) {
    row = i / 32 * 8 + i % 8, column = i % 32 / 8 * Tile::kPiece;
  } else {
    row = i / 32 * 8 + i % 4 + i / 8 % 2 * 4, column = (i / 4 % 2 + i / 16 % 2 * 2) * Tile::kPiece;
  }
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
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32) {
    V_ring = reinterpret_cast<float*>(shared);
    S = V_ring + kStages * Tile::kVFloats + warp * 16 * R;
    x_ring = shared + (kStages * Tile::kVFloats + Tile::kSFloats) * 4;
  }

  __device__ void run() {
    const int64_t row = row0 + 16 * warp;
    if (a.saved != nullptr && blockIdx.y == 0) {
      load_small(a.saved);
      times_core<R>(S, a.saved_core, a.r, lane);
      store_rows<R>(S, a.saved_out, row, a.M, a.r, false, lane);
      __syncwarp();
    }
    if (a.given != nullptr) {
      load_small(a.given);
    } else {
      multiply();
      if (a.P != nullptr) {
        store_rows<R>(S, a.P + blockIdx.y * a.M * a.r, row, a.M, a.r, a.paired, lane);
      }
      if (a.core.at == nullptr) return;
      __syncwarp();
      times_core<R>(S, a.core, a.r, lane);
      if (a.S != nullptr) store_rows<R>(S, a.S, row, a.M, a.r, false, lane);
    }
    if (a.z != nullptr) update();
  }

 private:
  const Rows& a;
  const int64_t row0;
  const int column0, columns, chunks, warp, lane;
  float *V_ring, *S;
  char* x_ring;

  __device__ X* x_chunk(int c) const { return reinterpret_cast<X*>(x_ring + c % a.x_stages * Tile::kXBytes); }
  __device__ float* V_chunk(int c) const { return V_ring + c % kStages * Tile::kVFloats; }

  // [M, r] from global memory to the warp's rows of S.
  __device__ void load_small(const float* from) {
    load_tile<R, 32>(S, from, row0 + 16 * warp, 16, a.M, a.r, false, lane);
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
        piece_of<Tile>(i, row, column);
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

  // S := x V on the warp's 16 rows.
  __device__ void multiply() {
    constexpr int kTiles = R / 8;
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
#pragma unroll
      for (int k = 0; k < kColumns; k += 16) {
        uint32_t left[2][Left<X>::kTerms][4];
        Left<X>::template load<kStride>(x, k, lane, left);
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
          if (8 * n >= a.r) break;
          float right[2][2];
#pragma unroll
          for (int i = 0; i < 4; i++) right[i / 2][i % 2] = V[place<R>(k + i / 2 * 8 + 2 * t + i % 2, 8 * n + g)];
          products(total[n], left, right);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      if (n / 2 * 16 >= a.r) break;
      const int column = 8 * n + 2 * t;
      *reinterpret_cast<float2*>(S + place<R>(g, column)) = make_float2(total[n][0], total[n][1]);
      *reinterpret_cast<float2*>(S + place<R>(g + 8, column)) = make_float2(total[n][2], total[n][3]);
    }
    __syncwarp();
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

  __device__ void update_chunk(int c) {
    constexpr int kTiles = kColumns / 8;
    const int g = lane / 4, t = lane % 4;
    const float* V = V_chunk(c);
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
          const float2 v = *reinterpret_cast<const float2*>(V + place<R>(8 * n + g, column + 8 * h));
          right[h][0] = v.x, right[h][1] = v.y;
        }
        products(total[n], left, right);
      }
    }
    X* x = x_chunk(c) + 16 * warp * kStride;
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        X* at = x + (g + 8 * half) * kStride + 8 * n + 2 * t;
        float v[2] = {};
        if (a.x != nullptr) load_pair(at, v);
        store_pair(at, v[0] + a.sign * total[n][2 * half], v[1] + a.sign * total[n][2 * half + 1]);
      }
    __syncwarp();
    store_chunk(x, c);
  }

  // The warp's 16 rows of a chunk to z.
  __device__ void store_chunk(const X* chunk, int c) {
    X* z = static_cast<X*>(a.z);
#pragma unroll
    for (int i = lane; i < 16 * kPieces; i += 32) {
      int row, column;
      piece_of<Tile>(i, row, column);
      const int left = columns - c * kColumns - column;
      if (row0 + 16 * warp + row >= a.M) continue;
      const X* from = chunk + row * kStride + column;
      X* to = z + (row0 + 16 * warp + row) * a.z_stride + column0 + c * kColumns + column;
      if (a.wide_z && left >= kPiece) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int k = 0; k < min(left, kPiece); k++) to[k] = from[k];
      }
    }
  }
};

template <typename X, int R>
__global__ void __launch_bounds__(RowTile<X, R>::kThreads) householder_rows_kernel(const __grid_constant__ Rows args) {
  extern __shared__ __align__(16) char shared[];
  RowBlock<X, R>(args, shared).run();
}

template <typename X, int R>
int launch_rows(Rows args, void* stream) {
  using Tile = RowTile<X, R>;
  const Architecture arch = architecture();
  const auto fitting = [](int bytes) { return (bytes - Tile::shared(0)) / Tile::kXBytes; };
  const int64_t tiles = (args.M + Tile::kRows - 1) / Tile::kRows;
  // An update's columns are independent: blocks share them where the rows alone do not fill a device.
  const int64_t parts = args.given == nullptr ? 1 : std::max<int64_t>(1, std::min(kFill / tiles, int64_t(args.K) / 256));
  args.part_columns = parts == 1 ? args.K : int((args.K + 64 * parts - 1) / (64 * parts) * 64);
  const int chunks = (args.part_columns + Tile::kColumns - 1) / Tile::kColumns;
  // All of x where one block may have it, else a ring that leaves room for a second block.
  const bool both = args.given == nullptr && args.z != nullptr;
  const int most = std::max(fitting(arch.shared_of_two), Tile::kVStages);
  args.x_stages = both && chunks <= fitting(arch.shared) ? std::max(chunks, Tile::kVStages) : Tile::kVStages;
  if (both && chunks > args.x_stages) args.x_stages = most;
  args.wide_x = wide(args.x, args.x_stride, sizeof(X));
  args.wide_z = wide(args.z, args.z_stride, sizeof(X));
  args.wide_V = wide(args.V, args.r, 4);
  const dim3 grid(unsigned(tiles), (args.K + args.part_columns - 1) / args.part_columns);
  return launch(householder_rows_kernel<X, R>, grid, Tile::kThreads, Tile::shared(args.x_stages), stream, args);
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
