// The r x r algebra of a chain of reflections, in float64, each in one launch:
//   T = A^-1,  A = striu(G) + diag(G) / 2,  G = V^T V                                          V [K, r], T [r, r]
//   dV = V (U + U^T + diag(dA)),  dA = -triu(T^T dT T^T),  U = striu(dA)
//   f = sum_{i != j} G_ij^2 / (G_ii G_jj) and the core M of its gradient dV = V M
//
// Launch of the first and third: blocks of 8 warps; each takes a 32 x 32 tile of G over 256 rows of V, 32 rows a warp,
// with DMMA, and leaves its sum in a buffer. The block that finishes last adds the buffers in a fixed order and goes on
// alone: 16 x 16 diagonal blocks by substitution, a half-warp each, then pairs of inverted blocks of s = 16, 32, 64 are
// merged, T12 = -T11 A12 T22. Grid y is a list of layers: all adapters of a model in one launch.
// Launch of the second: blocks of 32 rows of V (16 in float64). Each computes dA by itself, r^3 / 3 multiply-adds in 8
// x 8 tiles of which only the upper ones are kept (70 KB for r = 128), then its rows of dV.
//
// Bytes: V, 4 K r, once for every 32 columns; 8 KB of partial sums per tile and 256 rows, written and read; 8 r^2 for
// T. Least: 4 K r + 8 r^2. Backward: V and dV, 8 K r, and per block what it needs of T and dT, up to 16 r^2 (from L2).
//
// Flops: K r^2 + r^3 / 3; backward 2 K r^2 + r^3 / 3 per block. Latency and launches bound both.
//
// Why CUDA C++: blocks whose sizes double, substitution along a column and work in place between barriers are indexing
// that Triton does not have.

#include "cuda/gram.cuh"
#include "cuda/householder.h"
#include "cuda/tiles.h"
#include "cuda/warp.cuh"

namespace peftkern::cuda {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kSlice = 256;                         // rows of V per block
constexpr int kMatrix = kMaxRank * (kMaxRank + 2);  // doubles that one layer's algebra takes at most

// Inverts the upper triangular n x n matrix A (n a multiple of 16) in place; uses the part below the diagonal.
static __device__ void invert(double* A, int n, int ld) {
  // Diagonal blocks: lane j of a half-warp solves for column j (n <= 128: one block each at most).
  if (const int block = threadIdx.x / 16; block / 2 * 2 < n / 16) {
    const bool real = block < n / 16;  // an odd number of blocks leaves half a warp without one
    double* D = A + block * 16 * (ld + 1);
    const int j = threadIdx.x % 16;
    double x[16];
#pragma unroll
    for (int i = 15; i >= 0; i--) {
      double s = i == j ? 1.0 : 0.0;
#pragma unroll
      for (int k = i + 1; k < 16; k++) s -= real ? D[i * ld + k] * x[k] : 0.0;
      x[i] = real && i <= j ? s / D[i * ld + i] : 0.0;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; i++)
      if (real && i <= j) D[i * ld + j] = x[i];
  }
  __syncthreads();
  for (int s = 16; s < n; s *= 2) {
    const int pairs = (n + s - 1) / (2 * s);
    for (int step = 0; step < 2; step++) {
      // A thread takes four rows i of one column j, of X = A12 T22 and then of T12 = -T11 X; X^T lies below the
      // diagonal.
      for (int item = threadIdx.x; item < pairs * (s / 4) * s; item += kThreads) {
        const int j = item % s, i = item / s % (s / 4) * 4, o = item / (s * (s / 4)) * 2 * s;
        if (o + s + j >= n) continue;
        const double* below = A + (o + s + j) * ld + o;
        double sum[4] = {};
        if (step == 0) {
          for (int k = 0; k <= j; k++) {
            const double b = A[(o + s + k) * ld + o + s + j];
#pragma unroll
            for (int e = 0; e < 4; e++) sum[e] += A[(o + i + e) * ld + o + s + k] * b;
          }
#pragma unroll
          for (int e = 0; e < 4; e++) A[(o + s + j) * ld + o + i + e] = sum[e];
        } else {
#pragma unroll
          for (int e = 0; e < 4; e++)
            for (int k = i + e; k < i + 4; k++) sum[e] -= A[(o + i + e) * ld + o + k] * below[k];
          for (int k = i + 4; k < s; k++) {
#pragma unroll
            for (int e = 0; e < 4; e++) sum[e] -= A[(o + i + e) * ld + o + k] * below[k];
          }
#pragma unroll
          for (int e = 0; e < 4; e++) A[(o + i + e) * ld + o + s + j] = sum[e];
        }
      }
      __syncthreads();
    }
  }
}

// From G (upper triangle in A): the sum of squared cosines, or the core of its gradient.
static __device__ void penalty(const Factor& f, const double* A, int ld, double* scratch) {
  const int r = f.r;
  const auto scale = [&](int j) { return A[j * ld + j] > 0 ? 1 / sqrt(A[j * ld + j]) : 0.0; };
  const auto cosine = [&](int i, int j) { return (i < j ? A[i * ld + j] : A[j * ld + i]) * scale(i) * scale(j); };
  for (int j = threadIdx.x; j < r; j += kThreads) {
    double sum = 0;
    for (int i = 0; i < r; i++) {
      const double c = i == j ? 0 * A[j * ld + j] : cosine(i, j);
      sum += c * c;
    }
    scratch[j] = sum;
  }
  __syncthreads();
  double total = 0;
  for (int j = 0; j < r; j++) total += scratch[j];
  const double root = total > 0 ? sqrt(total) : total;
  if (f.job == kPenalty) {
    const double value = f.squared ? total : root;
    if (threadIdx.x == 0 && f.is_double) *static_cast<double*>(f.layers[0].out) = value;
    if (threadIdx.x == 0 && !f.is_double) *static_cast<float*>(f.layers[0].out) = float(value);
    return;
  }
  const double grad = f.is_double ? *static_cast<const double*>(f.grad) : *static_cast<const float*>(f.grad);
  const double factor = f.squared ? 4 * grad : total > 0 || total != total ? 2 * grad / root : 0;
  double* M = static_cast<double*>(f.layers[0].out);
  for (int item = threadIdx.x; item < r * r; item += kThreads) {
    const int i = item / r, j = item % r;
    const double c = i == j ? -scratch[j] : cosine(i, j);
    M[item] = factor * c * scale(i) * scale(j);
  }
}

template <typename V>
__global__ void __launch_bounds__(kThreads) householder_factor_kernel(const __grid_constant__ Factor f) {
  extern __shared__ __align__(16) char shared_bytes[];
  double* shared = reinterpret_cast<double*>(shared_bytes);
  __shared__ bool last, zero[kMaxRank];
  const FactorLayer& layer = f.layers[blockIdx.y];
  const int tiles = (f.r + 31) / 32, jobs = tiles * (tiles + 1) / 2;
  const int slices = (layer.K + kSlice - 1) / kSlice, slice = blockIdx.x / jobs, job = blockIdx.x % jobs;
  if (slice >= slices) return;
  int right = 0, left = job;
  while (left > right) left -= ++right;

  // This block's share of G.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double sum[4][4][2] = {};
  const int begin = slice * kSlice + warp * (kSlice / kWarps);
  const V* v = static_cast<const V*>(layer.V);
  gram(v, v, 32 * left, 32 * right, begin, min(begin + kSlice / kWarps, layer.K), f.r, f.wide, lane, sum);
  add_warps<kWarps>(sum, shared, f.partial + (layer.first_partial + int64_t(slice) * jobs + job) * kGramTile);

  // The last block of the layer goes on; it leaves the counter as it was.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(f.counters + blockIdx.y, 1u) + 1 == unsigned(slices * jobs);
    __threadfence();
    if (last) atomicExch(f.counters + blockIdx.y, 0u);
  }
  __syncthreads();
  if (!last) return;

  const int n = (f.r + 15) / 16 * 16, ld = n + 1;
  double* A = f.in_shared ? shared : f.matrix + int64_t(blockIdx.y) * kMatrix;
  for (int item = threadIdx.x; item < jobs * kGramTile; item += kThreads) {
    int column = 0, row = item / kGramTile;
    while (row > column) row -= ++column;
    const int i = 32 * row + gram_row(item % kGramTile), j = 32 * column + gram_column(item % kGramTile);
    if (i > j || j >= n) continue;
    const double* at = f.partial + layer.first_partial * kGramTile + item;
    double total = 0;
    for (int s = 0; s < slices; s++) total += at[int64_t(s) * jobs * kGramTile];
    if (i == j) zero[j] = total == 0;
    A[i * ld + j] = i < j || f.job != kFactor ? total : total == 0 ? 1.0 : total / 2;
  }
  __syncthreads();
  if (f.job != kFactor) {
    penalty(f, A, ld, A + n * ld);
    return;
  }
  invert(A, n, ld);
  double* T = static_cast<double*>(layer.out);
  for (int item = threadIdx.x; item < f.r * f.r; item += kThreads) {
    const int i = item / f.r, j = item % f.r;
    T[item] = i > j || (i == j && zero[j]) ? 0.0 : A[i * ld + j];
  }
}

// Upper 8 x 8 tiles of a symmetric matrix; rows 2 and 3 of every four have their halves swapped, against bank
// conflicts.
__device__ inline int tile_place(int I, int J, int i, int j) {
  return (J * (J + 1) / 2 + I) * 64 + i * 8 + (j ^ (i & 2) * 2);
}

template <typename V>
struct BackwardTile {
  static constexpr int kRows = sizeof(V) == 8 ? 16 : 32;
  static constexpr int kGroups = kWarps / (kRows / 8);  // of warps that share rows and deal out the columns
  __host__ __device__ static constexpr int stride(int r) { return (r + 7) / 8 * 8 + 4; }
  __host__ __device__ static constexpr int tiles(int r) { return (r + 7) / 8 * ((r + 7) / 8 + 1) / 2; }
  static constexpr int shared(int r) { return tiles(r) * 512 + kRows * stride(r) * sizeof(V); }
};

// dA into the tiles: W = dT T^T for the tiles at and above the diagonal, then -T^T W in place from the bottom up.
static __device__ void gram_gradient(double* tiles, const double* T, const double* dT, int r) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int n = (r + 7) / 8;
  const auto at = [r](const double* m, int i, int j) { return i < r && j < r ? m[i * r + j] : 0.0; };
  for (int item = warp; item < n * (n + 1) / 2; item += kWarps) {
    int J = 0, I = item;
    while (I > J) I -= ++J;
    double sum[2] = {};
    for (int k = 8 * J; k < 8 * n; k += 4) mma_f64(sum, at(dT, 8 * I + g, k + t), at(T, 8 * J + g, k + t));
    *reinterpret_cast<double2*>(tiles + tile_place(I, J, g, 2 * t)) = make_double2(sum[0], sum[1]);
  }
  __syncthreads();
  for (int J = warp; J < n; J += kWarps) {
    for (int I = J; I >= 0; I--) {
      double sum[2] = {};
      for (int k = 0; k < 8 * (I + 1); k += 4) {
        mma_f64(sum, -at(T, k + t, 8 * I + g), tiles[tile_place(k / 8, J, k % 8 + t, g)]);
      }
      __syncwarp();
      *reinterpret_cast<double2*>(tiles + tile_place(I, J, g, 2 * t)) = make_double2(sum[0], sum[1]);
      __syncwarp();
    }
  }
}

template <typename V>
__global__ void __launch_bounds__(kThreads)
    householder_factor_backward_kernel(const V* v, const double* T, const double* dT, V* dV, int K, int r) {
  using Tile = BackwardTile<V>;
  extern __shared__ __align__(16) char shared_bytes[];
  const int n = (r + 7) / 8, stride = Tile::stride(r);
  double* tiles = reinterpret_cast<double*>(shared_bytes);
  V* rows = reinterpret_cast<V*>(tiles + Tile::tiles(r) * 64);
  const int64_t begin = int64_t(blockIdx.x) * Tile::kRows;
  for (int item = threadIdx.x; item < Tile::kRows * 8 * n; item += kThreads) {
    const int row = item / (8 * n), column = item % (8 * n);
    rows[row * stride + column] = begin + row < K && column < r ? v[(begin + row) * r + column] : V(0);
  }
  if (T != nullptr) {
    gram_gradient(tiles, T, dT, r);
  } else {
    for (int item = threadIdx.x; item < 64 * n * n; item += kThreads) {
      const int i = item / (8 * n), j = item % (8 * n);
      if (i / 8 <= j / 8) tiles[tile_place(i / 8, j / 8, i % 8, j % 8)] = i < r && j < r ? dT[i * r + j] : 0.0;
    }
  }
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row = warp / Tile::kGroups * 8 + g;
  for (int J = warp % Tile::kGroups; J < n; J += Tile::kGroups) {
    double sum[2] = {};
    for (int I = 0; I < n; I++) {
#pragma unroll
      for (int half = 0; half < 8; half += 4) {
        const int i = half + t;
        const bool below = I > J || (I == J && i > g);
        const double m = below ? tiles[tile_place(J, I, g, i)] : tiles[tile_place(I, J, i, g)];
        mma_f64(sum, rows[row * stride + 8 * I + i], m);
      }
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int column = 8 * J + 2 * t + e;
      if (begin + row < K && column < r) dV[(begin + row) * r + column] = V(sum[e]);
    }
  }
}

template <typename V>
int launch_backward(const void* v, const double* T, const double* dT, void* dV, int K, int r, void* stream) {
  using Tile = BackwardTile<V>;
  const void* kernel = reinterpret_cast<const void*>(householder_factor_backward_kernel<V>);
  const int shared = Tile::shared(r);
  if (shared > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return status;
  }
  void* arguments[] = {&v, &T, &dT, &dV, &K, &r};
  return cudaLaunchKernel(kernel, dim3((K + Tile::kRows - 1) / Tile::kRows), dim3(kThreads), arguments, shared,
                          static_cast<cudaStream_t>(stream));
}

static int matrix_bytes(int r) {
  const int n = (r + 15) / 16 * 16;
  return (n * (n + 1) + kMaxRank) * 8;
}
static bool fits_shared(int r) { return matrix_bytes(r) <= architecture().shared - 1024; }

int factor_matrix(int r) { return fits_shared(r) ? 0 : kMatrix; }

int64_t factor_partials(int K, int r) {
  const int tiles = (r + 31) / 32;
  return int64_t((K + kSlice - 1) / kSlice) * tiles * (tiles + 1) / 2;
}

int factor(Factor f, int layers, void* stream) {
  const int reduction = kWarps * kGramTile * 8, matrix = matrix_bytes(f.r);
  f.in_shared = f.matrix == nullptr;
  f.wide = f.r % 4 == 0;
  int64_t blocks = 1;
  for (int i = 0; i < layers; i++) {
    f.layers[i].first_partial = i == 0 ? 0 : f.layers[i - 1].first_partial + factor_partials(f.layers[i - 1].K, f.r);
    if (reinterpret_cast<uintptr_t>(f.layers[i].V) % 16) f.wide = false;
    blocks = blocks > factor_partials(f.layers[i].K, f.r) ? blocks : factor_partials(f.layers[i].K, f.r);
  }
  const int shared = f.in_shared && matrix > reduction ? matrix : reduction;
  const auto kernel = f.is_double ? householder_factor_kernel<double> : householder_factor_kernel<float>;
  return launch(kernel, dim3(unsigned(blocks), layers), kThreads, shared, stream, f);
}

int factor_backward(bool is_double, const void* V, const double* T, const double* dT, void* dV, int K, int r,
                    void* stream) {
  return is_double ? launch_backward<double>(V, T, dT, dV, K, r, stream)
                   : launch_backward<float>(V, T, dT, dV, K, r, stream);
}

}  // namespace peftkern::cuda
