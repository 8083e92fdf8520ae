// Gram-Schmidt on the columns of V [K, r], in float64:
//   Q = V B,  B = D L^-T,  L L^T = D G D,  G = V^T V,  D = diag(1 / |v|),  T = 2 I    (a dependent column: 0 in all
//   three) dV = (dQ - 2 Q (dT + dT^T)) B^T
//
// Forward, three launches of up to 32 blocks of 8 warps, each with its share of the rows:
//   gram      each block leaves its share of G, a packed upper triangle.
//   factor    each block adds the shares in order and factors G by itself, in shared memory, then writes its rows of Q.
//             Where once is not enough (README.md, "Twice is enough"), it also leaves its share of Q^T Q.
//   again     returns at once where once was enough; else factors Q^T Q = L L^T and multiplies Q and B by L^-T.
// Backward: one launch, blocks of 32 rows (16 for r > 64).
//
// Bytes: 4 K r read twice and written once, partial sums of 4 r^2 per block, read by every block (from L2: 135 KB each
// for r = 32 and K = 4096); least: 8 K r + 16 r^2. Backward: 12 K r, and 24 r^2 per block (from L2). Flops: K r^2 for
// G, K r^2 for Q, 2/3 r^3 per block; backward 3 K r^2. Latency bounds them: r eliminations of two barriers each. Why
// CUDA C++: the r x r algebra inside one block. That every block repeats it costs no time, since each would wait for
// the one that does, and saves a launch; Triton takes one for each step.

#include "cuda/gram_schmidt.h"
#include "cuda/householder.h"
#include "cuda/tiles.h"
#include "cuda/warp.cuh"

namespace peftkern::cuda {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMostBlocks = 32;

// Rows of a tile in shared memory, and of one of its columns' 8 x 8 products that a warp takes at once.
__host__ __device__ constexpr int tile_rows(int r) { return r <= 64 ? 32 : 16; }
// 4 beyond a multiple of 8: neither lanes (g, t) that read rows g nor such that read rows t meet a bank twice.
__host__ __device__ constexpr int tile_stride(int r) { return (r + 7) / 8 * 8 + 4; }
__host__ __device__ constexpr int packed(int r) { return r * (r + 1) / 2; }
// Row i of a packed upper triangle, less its i absent columns: element (i, j) is at row_of(i, r) + j.
__device__ inline int row_of(int i, int r) { return i * r - i * (i + 1) / 2; }

// The vectors of one elimination.
struct Vectors {
  double scale[kMaxRank], multiplier[kMaxRank], row[kMaxRank], root[kMaxRank];
};

// Rows [begin, begin + kRows) of the columns as float64; zeros beyond `end` and beyond r.
template <int kRows, typename C>
__device__ inline void load_rows(double* tile, const Columns& from, int begin, int end, int r, bool wide) {
  const C* data = static_cast<const C*>(from.at);
  const int width = (r + 7) / 8 * 8, ld = tile_stride(r);
  if (wide) {
    constexpr int kPiece = 16 / sizeof(C);
    for (int item = threadIdx.x; item < kRows * width / kPiece; item += kThreads) {
      const int row = item * kPiece / width, column = item * kPiece % width;
      C piece[kPiece] = {};
      if (begin + row < end && column < r)
        *reinterpret_cast<uint4*>(piece) =
            *reinterpret_cast<const uint4*>(data + (begin + row) * from.stride_k + column);
      // Half of every eight lanes start at the second pair, so that eight lanes meet all banks once.
      double* to = tile + row * ld + column;
      const int first = kPiece == 4 ? threadIdx.x / 2 & 2 : 0;
      *reinterpret_cast<double2*>(to + first) =
          first ? make_double2(piece[kPiece - 2], piece[kPiece - 1]) : make_double2(piece[0], piece[1]);
      if (kPiece == 4)
        *reinterpret_cast<double2*>(to + 2 - first) =
            first ? make_double2(piece[0], piece[1]) : make_double2(piece[kPiece - 2], piece[kPiece - 1]);
    }
  } else {
    for (int item = threadIdx.x; item < kRows * width; item += kThreads) {
      const int row = item / width, column = item % width;
      const bool inside = begin + row < end && column < r;
      tile[row * ld + column] = inside ? double(data[(begin + row) * from.stride_k + column * from.stride_r]) : 0.0;
    }
  }
}

// The 8 x 8 tiles of a Gram matrix that meet the upper triangle, dealt out to the warps.
template <int R>
struct Gram {
  static constexpr int kTiles = (packed(R / 8) + kWarps - 1) / kWarps;
  double sum[kTiles][2] = {};

  static __device__ bool tile(int n, int r, int& i, int& j) {
    i = n * kWarps + threadIdx.x / 32, j = 0;
    if (i >= packed((r + 7) / 8)) return false;
    while (i > j) i -= ++j;
    return true;
  }

  template <int kRows>
  __device__ void add(const double* rows, int r) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, ld = tile_stride(r);
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      int i, j;
      if (!tile(n, r, i, j)) continue;
#pragma unroll
      for (int k = 0; k < kRows; k += 4)
        mma_f64(sum[n], rows[(k + t) * ld + 8 * i + g], rows[(k + t) * ld + 8 * j + g]);
    }
  }

  __device__ void store(double* out, int r) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      int i, j;
      if (!tile(n, r, i, j)) continue;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int row = 8 * i + g, column = 8 * j + 2 * t + e;
        if (row <= column && column < r) out[row_of(row, r) + column] = sum[n][e];
      }
    }
  }
};

// U := the packed upper triangle of D L^-T for G = the sum of the partial ones. Returns |L^-1|^2.
// Row j of the cosines gives pivot j and the multipliers of the later rows; the column j of L^-1 that they make takes
// its place, so that nothing but the triangle is stored.
static __device__ double eliminate(const double* partial, int blocks, int r, double rounding, double* U, Vectors& v) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  for (int item = thread; item < packed(r); item += kThreads) {
    double sum = 0;
    // Sixteen loads in flight, added in order.
    for (int first = 0; first < blocks; first += 16) {
      double share[16];
#pragma unroll
      for (int b = 0; b < 16; b++) share[b] = first + b < blocks ? partial[int64_t(first + b) * packed(r) + item] : 0.0;
#pragma unroll
      for (int b = 0; b < 16; b++) sum += share[b];
    }
    U[item] = sum;
  }
  __syncthreads();
  if (thread < r) {
    const double square = U[row_of(thread, r) + thread];
    v.scale[thread] = square == 0 ? 0 : 1 / sqrt(square);
  }
  __syncthreads();
  for (int m = warp; m < r; m += kWarps)
    for (int i = m + lane; i < r; i += 32) U[row_of(m, r) + i] *= v.scale[m] * v.scale[i];
  __syncthreads();
  for (int j = 0; j < r; j++) {
    const double pivot = U[row_of(j, r) + j];
    // Negative answers keep a pivot that is no number, so that it shows.
    const bool dropped = pivot <= rounding;
    const double inverse = 1 / pivot;
    if (thread < r) {
      const double u = thread < j ? U[row_of(thread, r) + j] : thread == j ? 1.0 : U[row_of(j, r) + thread];
      v.row[thread] = u;
      v.multiplier[thread] = dropped ? 0 : u * inverse;
    }
    if (thread == j) v.root[j] = dropped ? 0 : sqrt(inverse);
    __syncthreads();
    for (int m = warp; m < r; m += kWarps) {
      const double c = v.row[m];
      double* row = U + row_of(m, r);
      for (int i = (m > j ? m : j + 1) + lane; i < r; i += 32)
        row[i] = m == j ? -v.multiplier[i] : row[i] - v.multiplier[i] * c;
    }
    __syncthreads();
  }
  if (thread < r) {
    double sum = v.root[thread] * v.root[thread];
    for (int i = thread + 1; i < r; i++) {
      const double x = U[row_of(thread, r) + i] * v.root[i];
      sum += x * x;
    }
    v.row[thread] = sum;
  }
  __syncthreads();
  double norm = 0;
  for (int j = 0; j < r; j++) norm += v.row[j];
  for (int m = warp; m < r; m += kWarps)
    for (int i = m + lane; i < r; i += 32) {
      double& u = U[row_of(m, r) + i];
      u = (i == m ? v.scale[m] : u * v.scale[m]) * v.root[i];
    }
  __syncthreads();
  return norm;
}

// A tile times the packed triangle U, for pairs of 8 rows by 8 columns; put(row, column, value, value of the next
// column).
template <int kRows, int R>
struct Multiply {
  static constexpr int kPairs = kRows / 16, kItems = (R / 8 * kPairs + kWarps - 1) / kWarps;
  double sum[kItems][2][2];

  __device__ void operator()(const double* tile, const double* U, int r) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, ld = tile_stride(r);
#pragma unroll
    for (int n = 0; n < kItems; n++) {
      const int item = n * kWarps + threadIdx.x / 32, column = item / kPairs * 8 + g;
      const double* rows = tile + (item % kPairs * 16 + g) * ld + t;
      sum[n][0][0] = sum[n][0][1] = sum[n][1][0] = sum[n][1][1] = 0;
      if (item / kPairs * 8 >= r) continue;
      for (int k = 0; k <= item / kPairs * 8 + 4; k += 4) {
        const double u = k + t <= column && column < r ? U[row_of(k + t, r) + column] : 0.0;
        mma_f64(sum[n][0], rows[k], u);
        mma_f64(sum[n][1], rows[8 * ld + k], u);
      }
    }
  }

  template <typename Put>
  __device__ void put(int r, Put&& out) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kItems; n++) {
      const int item = n * kWarps + threadIdx.x / 32;
      if (item / kPairs * 8 >= r) continue;
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int e = 0; e < 2; e++) out(item % kPairs * 16 + 8 * h + g, item / kPairs * 8 + 2 * t + e, sum[n][h][e]);
    }
  }
};

__device__ inline double* partials(const OrthonormalFactor& f, bool second) {
  return f.workspace + (second ? int64_t(f.blocks) * packed(f.r) : 0);
}
__device__ inline double* again_flag(const OrthonormalFactor& f) {
  return f.workspace + 2 * int64_t(f.blocks) * packed(f.r);
}
__device__ inline double rounding_of(const OrthonormalFactor& f) { return 8 * double(f.K) * 0x1p-52; }

template <typename C, int R>
__global__ void __launch_bounds__(kThreads, 1) gram_schmidt_gram_kernel(const __grid_constant__ OrthonormalFactor f) {
  constexpr int kRows = tile_rows(R);
  extern __shared__ __align__(16) double tile[];
  Gram<R> gram;
  const int begin = blockIdx.x * f.rows_per_block, end = min(begin + f.rows_per_block, f.K);
  for (int k = begin; k < end; k += kRows) {
    load_rows<kRows, C>(tile, f.V, k, end, f.r, f.wide);
    __syncthreads();
    gram.template add<kRows>(tile, f.r);
    __syncthreads();
  }
  gram.store(partials(f, false) + int64_t(blockIdx.x) * packed(f.r), f.r);
}

static __device__ void store_twos(double* T, const double* U, int r) {
  for (int item = threadIdx.x; item < r * r; item += kThreads) {
    const int i = item / r, j = item % r;
    T[item] = i == j && U[row_of(i, r) + i] != 0 ? 2.0 : 0.0;
  }
}

template <typename C, int R>
__global__ void __launch_bounds__(kThreads, 1) gram_schmidt_factor_kernel(const __grid_constant__ OrthonormalFactor f) {
  constexpr int kRows = tile_rows(R);
  extern __shared__ __align__(16) double tile[];
  __shared__ Vectors vectors;
  const int r = f.r, ld = tile_stride(r);
  double* U = tile + kRows * ld;
  const double rounding = rounding_of(f), norm = eliminate(partials(f, false), f.blocks, r, rounding, U, vectors);
  // Negated, so that what is no number goes on.
  const bool again = f.is_double || !(norm * rounding <= 0x1p-27);
  if (blockIdx.x == 0) {
    for (int item = threadIdx.x; item < r * r; item += kThreads) {
      const int i = item / r, j = item % r;
      f.B[item] = i <= j ? U[row_of(i, r) + j] : 0.0;
    }
    store_twos(f.T, U, r);
    if (threadIdx.x == 0) *again_flag(f) = again;
  }
  Gram<R> gram;
  C* Q = static_cast<C*>(f.Q);
  const int begin = blockIdx.x * f.rows_per_block, end = min(begin + f.rows_per_block, f.K);
  for (int k = begin; k < end; k += kRows) {
    load_rows<kRows, C>(tile, f.V, k, end, r, f.wide);
    __syncthreads();
    Multiply<kRows, R> product;
    product(tile, U, r);
    __syncthreads();
    product.put(r, [&](int row, int column, double value) {
      if (k + row < end && column < r) Q[int64_t(k + row) * r + column] = C(value);
      if (again) tile[row * ld + column] = C(value);
    });
    if (again) {
      __syncthreads();
      gram.template add<kRows>(tile, r);
      __syncthreads();
    }
  }
  if (again) gram.store(partials(f, true) + int64_t(blockIdx.x) * packed(r), r);
}

// rows [begin, end) of `data` [.., r] times U, in place.
template <typename C, int R>
__device__ inline void multiply_in_place(C* data, int begin, int end, int r, double* tile, const double* U) {
  constexpr int kRows = tile_rows(R);
  for (int k = begin; k < end; k += kRows) {
    load_rows<kRows, C>(tile, {data, r, 1}, k, end, r, false);
    __syncthreads();
    Multiply<kRows, R> product;
    product(tile, U, r);
    __syncthreads();
    product.put(r, [&](int row, int column, double value) {
      if (k + row < end && column < r) data[int64_t(k + row) * r + column] = C(value);
    });
  }
}

// Blocks beyond f.blocks take kRows rows of B each.
template <typename C, int R>
__global__ void __launch_bounds__(kThreads, 1) gram_schmidt_again_kernel(const __grid_constant__ OrthonormalFactor f) {
  constexpr int kRows = tile_rows(R);
  extern __shared__ __align__(16) double tile[];
  __shared__ Vectors vectors;
  if (*again_flag(f) == 0) return;
  double* U = tile + kRows * tile_stride(f.r);
  eliminate(partials(f, true), f.blocks, f.r, rounding_of(f), U, vectors);
  if (blockIdx.x == 0) store_twos(f.T, U, f.r);
  if (blockIdx.x < f.blocks) {
    const int begin = blockIdx.x * f.rows_per_block;
    multiply_in_place<C, R>(static_cast<C*>(f.Q), begin, min(begin + f.rows_per_block, f.K), f.r, tile, U);
  } else {
    const int begin = (blockIdx.x - f.blocks) * kRows;
    multiply_in_place<double, R>(f.B, begin, min(begin + kRows, f.r), f.r, tile, U);
  }
}

template <typename C, int R>
__global__ void __launch_bounds__(kThreads, 1)
    gram_schmidt_backward_kernel(const __grid_constant__ OrthonormalFactorBackward f) {
  constexpr int kRows = tile_rows(R), kPairs = kRows / 16, kItems = (R / 8 * kPairs + kWarps - 1) / kWarps;
  extern __shared__ __align__(16) double tile[];
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, r = f.r, ld = tile_stride(r);
  double* Q = tile + kRows * ld;
  const int begin = blockIdx.x * kRows, end = min(begin + kRows, f.K);
  load_rows<kRows, C>(Q, f.Q, begin, end, r, f.wide);
  __syncthreads();
  const C* dQ = static_cast<const C*>(f.dQ.at);
  // tile := Y = dQ - 2 Q (dT + dT^T).
#pragma unroll
  for (int n = 0; n < kItems; n++) {
    const int item = n * kWarps + threadIdx.x / 32, left = item / kPairs * 8, row = item % kPairs * 16 + g;
    if (left >= r) continue;
    double sum[2][2];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int k = begin + row + 8 * h, column = left + 2 * t + e;
        sum[h][e] = k < end && column < r ? double(dQ[k * f.dQ.stride_k + column * f.dQ.stride_r]) : 0.0;
      }
#pragma unroll 4
    for (int k = 0; k < r; k += 4) {
      const int i = k + t, j = left + g;
      const double s = i < r && j < r ? -2 * (f.dT[i * r + j] + f.dT[j * r + i]) : 0.0;
      mma_f64(sum[0], Q[row * ld + i], s);
      mma_f64(sum[1], Q[(row + 8) * ld + i], s);
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
      *reinterpret_cast<double2*>(tile + (row + 8 * h) * ld + left + 2 * t) = make_double2(sum[h][0], sum[h][1]);
  }
  __syncthreads();
  C* dV = static_cast<C*>(f.dV);
#pragma unroll
  for (int n = 0; n < kItems; n++) {
    const int item = n * kWarps + threadIdx.x / 32, left = item / kPairs * 8, row = item % kPairs * 16 + g;
    if (left >= r) continue;
    double sum[2][2] = {};
#pragma unroll 4
    for (int k = left; k < r; k += 4) {
      const int i = k + t, j = left + g;
      const double b = i < r && j < r ? f.B[j * r + i] : 0.0;
      mma_f64(sum[0], tile[row * ld + i], b);
      mma_f64(sum[1], tile[(row + 8) * ld + i], b);
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int k = begin + row + 8 * h, column = left + 2 * t + e;
        if (k < end && column < r) dV[int64_t(k) * r + column] = C(sum[h][e]);
      }
  }
}

static bool is_wide(const Columns& V, int r, int size) {
  return V.stride_r == 1 && r * size % 16 == 0 && V.stride_k * size % 16 == 0 &&
         reinterpret_cast<uintptr_t>(V.at) % 16 == 0;
}

static int blocks_of(int K, int r, int& rows_per_block) {
  const int rows = tile_rows(r), tiles = (K + rows - 1) / rows;
  rows_per_block = (tiles + kMostBlocks - 1) / kMostBlocks * rows;
  return (K + rows_per_block - 1) / rows_per_block;
}

int64_t orthonormal_workspace(int K, int r) {
  int rows_per_block;
  return 2 * int64_t(blocks_of(K, r, rows_per_block)) * packed(r) + 1;
}

template <typename C, int R>
static int run(const OrthonormalFactor& f, void* stream) {
  constexpr int kRows = tile_rows(R);
  const int tile = kRows * tile_stride(f.r) * 8, whole = tile + packed(f.r) * 8;
  int status = launch(gram_schmidt_gram_kernel<C, R>, dim3(f.blocks), kThreads, tile, stream, f);
  if (status == cudaSuccess)
    status = launch(gram_schmidt_factor_kernel<C, R>, dim3(f.blocks), kThreads, whole, stream, f);
  if (status != cudaSuccess) return status;
  const int more = (f.r + kRows - 1) / kRows;
  return launch(gram_schmidt_again_kernel<C, R>, dim3(f.blocks + more), kThreads, whole, stream, f);
}

template <typename C, int R>
static int run(const OrthonormalFactorBackward& f, void* stream) {
  constexpr int kRows = tile_rows(R);
  const int shared = 2 * kRows * tile_stride(f.r) * 8;
  return launch(gram_schmidt_backward_kernel<C, R>, dim3((f.K + kRows - 1) / kRows), kThreads, shared, stream, f);
}

template <typename Args>
static int run_any(const Args& f, void* stream) {
  switch (padded_rank(f.r)) {
    case 32:
      return f.is_double ? run<double, 32>(f, stream) : run<float, 32>(f, stream);
    case 64:
      return f.is_double ? run<double, 64>(f, stream) : run<float, 64>(f, stream);
    default:
      return f.is_double ? run<double, 128>(f, stream) : run<float, 128>(f, stream);
  }
}

int orthonormal_factor(OrthonormalFactor f, void* stream) {
  f.blocks = blocks_of(f.K, f.r, f.rows_per_block);
  f.wide = is_wide(f.V, f.r, f.is_double ? 8 : 4);
  return run_any(f, stream);
}

int orthonormal_factor_backward(OrthonormalFactorBackward f, void* stream) {
  f.wide = is_wide(f.Q, f.r, f.is_double ? 8 : 4);
  return run_any(f, stream);
}

}  // namespace peftkern::cuda
