// Small kernels of the householder family.
//
// Where few rows are split over blocks by their columns (householder_rows.cuh): P = sum of the parts, in their order,
// and S = P C, also of a saved P. Launch: 8 warps per 64 rows; 4 M r bytes for each part and each result, the least.
//
// Pair basis (README.md, eq. 9): Vp = [(v0 + v1) / 2, v0 - v1, ...] [K, r] float32, Cp = E T^T E^T [r, r] float64. One
// launch of 256 threads per 1024 numbers; 8 K r + 16 r^2 bytes, which is the least.
//
// Plain basis: its inverse, v0 = mean + difference / 2, v1 = mean - difference / 2, for W Vp [N, r] -> W V. One thread
// per number; 8 N r bytes, the least.
//
// Products of float64 matrices of any strides, C = alpha A B + D, for float64 activations: C [m, n], A [m, k], B [k,
// n]. Launch: 4 warps per 32 x 32 of C, each 16 x 16 in DMMA fragments straight from global memory: whole 32-byte
// sectors where the contraction or the columns are contiguous. Bytes: A once per 32 columns, B once per 32 rows; 2 m n
// k flops. float64 activations are for tests of gradients; their products gain nothing from fusion, so there is none.

#include "cuda/householder.h"
#include "cuda/small.cuh"
#include "cuda/tiles.h"
#include "cuda/warp.cuh"

namespace peftkern::cuda {

int row_part_columns(int64_t M, int K) {
  const int64_t tiles = row_tiles(M);
  if (tiles == 0 || tiles >= kFill / 6 || K < 512) return K;
  const int64_t wanted = kFill / 2 / tiles, most = K / 256, parts = wanted < most ? wanted : most;
  return int((K + 64 * parts - 1) / (64 * parts) * 64);
}
int row_parts(int64_t M, int K) { return (K + row_part_columns(M, K) - 1) / row_part_columns(M, K); }

template <int R>
__global__ void __launch_bounds__(256) householder_parts_kernel(const __grid_constant__ Rows a, int parts) {
  __shared__ __align__(16) float tile[64 * R];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row0 = int64_t(blockIdx.x) * 64 + 8 * warp;
  float* own = tile + 8 * warp * R;
  const auto fill = [&](const float* from, int count) {
    for (int i = lane; i < 8 * R; i += 32) {
      const int row = i / R, column = i % R;
      float sum = 0;
      if (row0 + row < a.M && column < a.r) {
        for (int p = 0; p < count; p++) sum += from[(p * a.M + row0 + row) * a.r + column];
      }
      own[place<R>(row, column)] = sum;
    }
    __syncwarp();
  };
  if (a.saved != nullptr) {
    fill(a.saved, 1);
    times_core<R>(own, a.saved_core, a.r, lane);
    store_rows<R>(own, a.saved_out, row0, a.M, a.r, false, lane);
    __syncwarp();
  }
  fill(a.split, parts);
  if (a.P != nullptr) store_rows<R>(own, a.P, row0, a.M, a.r, a.paired, lane);
  if (a.core.at == nullptr || a.S == nullptr) return;
  __syncwarp();
  times_core<R>(own, a.core, a.r, lane);
  store_rows<R>(own, a.S, row0, a.M, a.r, false, lane);
}

int finish_parts(const Rows& args, int parts, void* stream) {
  const auto kernel = padded_rank(args.r) == 32   ? householder_parts_kernel<32>
                      : padded_rank(args.r) == 64 ? householder_parts_kernel<64>
                                                  : householder_parts_kernel<128>;
  void* arguments[] = {const_cast<Rows*>(&args), &parts};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(row_tiles(args.M)), dim3(256), arguments, 0,
                          static_cast<cudaStream_t>(stream));
}

__global__ void __launch_bounds__(256) householder_pair_basis_kernel(const __grid_constant__ PairBasis a) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x, count = int64_t(a.K) * a.r;
  const int64_t V_threads = (count + 1023) / 1024 * 256;
  if (i < V_threads) {
    for (int64_t e = i; e < count; e += V_threads) {
      const int column = e % a.r;
      float v = a.V[e];
      if ((column | 1) < a.r) {
        const float other = a.V[column & 1 ? e - 1 : e + 1];
        v = column & 1 ? other - v : (v + other) / 2;
      }
      a.Vp[e] = v;
    }
    return;
  }
  const int item = int(i - V_threads);
  if (item >= a.r * a.r) return;
  // Rows 2p, 2p + 1 of E are (1, 1) and (1/2, -1/2); an odd last row is a one.
  const int row = item / a.r, column = item % a.r;
  const auto weight = [&](int at, int e) {
    return (at | 1) >= a.r ? (e == 0 ? 1.0 : 0.0) : at & 1 ? (e == 0 ? 0.5 : -0.5) : 1.0;
  };
  double sum = 0;
  for (int u = 0; u < 2; u++) {
    for (int v = 0; v < 2; v++) {
      const int i0 = (row & ~1) + u, j0 = (column & ~1) + v;
      if (i0 < a.r && j0 < a.r) sum += weight(row, u) * weight(column, v) * a.T[j0 * a.r + i0];
    }
  }
  a.Cp[item] = sum;
}

int pair_basis(PairBasis a, void* stream) {
  const int64_t threads = (int64_t(a.K) * a.r + 1023) / 1024 * 256 + a.r * a.r;
  return launch(householder_pair_basis_kernel, dim3(unsigned((threads + 255) / 256)), 256, 0, stream, a);
}

__global__ void __launch_bounds__(256)
    householder_plain_basis_kernel(const float* B, float* plain, int64_t count, int r) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  const int column = int(i % r);
  float v = B[i];
  if ((column | 1) < r) v = column & 1 ? B[i - 1] - v / 2 : v + B[i + 1] / 2;
  plain[i] = v;
}

int plain_basis(const float* B, float* plain, int64_t N, int r, void* stream) {
  int64_t count = N * r;
  void* arguments[] = {&B, &plain, &count, &r};
  return cudaLaunchKernel(reinterpret_cast<const void*>(householder_plain_basis_kernel),
                          dim3(unsigned((count + 255) / 256)), dim3(256), arguments, 0,
                          static_cast<cudaStream_t>(stream));
}

__global__ void __launch_bounds__(128) householder_product_f64_kernel(const __grid_constant__ Product a) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t row0 = int64_t(blockIdx.x) * 32 + warp / 2 * 16 + g, column0 = int64_t(blockIdx.y) * 32 + warp % 2 * 16;
  double sum[2][2][2] = {};
#pragma unroll 2
  for (int64_t k = t; k - t < a.k; k += 4) {
    double left[2], right[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t row = row0 + 8 * i, column = column0 + 8 * i + g;
      left[i] = k < a.k && row < a.m ? a.A[row * a.A_row + k * a.A_column] : 0.0;
      right[i] = k < a.k && column < a.n ? a.B[k * a.B_row + column * a.B_column] : 0.0;
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) mma_f64(sum[i][j], left[i], right[j]);
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int64_t row = row0 + 8 * i, column = column0 + 8 * j + 2 * t + e;
        if (row >= a.m || column >= a.n) continue;
        const double d = a.D == nullptr ? 0.0 : a.D[row * a.D_row + column];
        a.C[row * a.n + column] = d + a.alpha * sum[i][j][e];
      }
}

int product_f64(Product a, void* stream) {
  const dim3 grid(unsigned((a.m + 31) / 32), unsigned((a.n + 31) / 32));
  return launch(householder_product_f64_kernel, grid, 128, 0, stream, a);
}

}  // namespace peftkern::cuda
