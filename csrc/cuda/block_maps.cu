// Rotations R [S, b, b] made of skew matrices Q, and the gradients back, one launch for all blocks
// (peftkern/ops/block_rotation/README.md, eq. 2 and 3):
//   polynomial    X_d = c_d I, X_k = c_k I + Q X_(k+1), R = X_0
//     backward    A_(d-1) = c_d dR, A_k = dR X_(k+1)^T - Q A_(k+1), dQ = A_0: as many products as with kept X_k
//   exact         R = 2 (I + Q)^-1 - I by Gauss and Jordan in float64; no pivot is below 1
//     backward    dQ = -(I + R)^T dR (I + R)^T / 2 in float64
// Q is given as q [S, b (b - 1) / 2], its strict upper triangle, or as B [S, b, b], Q = (B - B^T) / 2.
//
// Launch: a block of 8 x 8 or 16 x 16 threads per matrix, up to 4 x 4 numbers in a thread's registers, factors in
// shared memory, in rows of an odd number. Bytes: each parameter, R and gradient once. Flops: README.md, "Cost".
#include "cuda/blocks.h"
#include "cuda/tiles.h"

namespace peftkern::cuda {

__device__ inline double number(const BlockMap& a, const void* from, int64_t at) {
  return a.is_double ? static_cast<const double*>(from)[at] : static_cast<const float*>(from)[at];
}
__device__ inline void store(const BlockMap& a, int64_t at, double value) {
  if (a.is_double) {
    static_cast<double*>(a.out)[at] = value;
  } else {
    static_cast<float*>(a.out)[at] = float(value);
  }
}

// A b x b matrix, thread (y, x) with the numbers in rows y + kSide i, columns x + kSide j. T is what is computed in.
template <typename T, int kSide, int kTile>
struct Matrix {
  static constexpr int kRows = kSide * kTile, kStride = kRows + 1, kSize = kRows * kStride;
  T at[kTile][kTile];

  __device__ static int y() { return threadIdx.x / kSide; }
  __device__ static int x() { return threadIdx.x % kSide; }
  // at[i][j] = f(row, column), 0 beyond b.
  template <typename F>
  __device__ void fill(int b, const F& f) {
#pragma unroll
    for (int i = 0; i < kTile; i++) {
#pragma unroll
      for (int j = 0; j < kTile; j++) {
        const int row = y() + kSide * i, column = x() + kSide * j;
        at[i][j] = row < b && column < b ? f(row, column, at[i][j]) : T(0);
      }
    }
  }
  // To shared memory that no thread reads any more after the barrier, and all may read afterwards.
  __device__ void share(T* to) const {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTile; i++) {
#pragma unroll
      for (int j = 0; j < kTile; j++) {
        to[(y() + kSide * i) * kStride + x() + kSide * j] = at[i][j];
      }
    }
    __syncthreads();
  }
  // this += sign A B of matrices in shared memory; a transposed one is read by columns.
  template <bool kTransposeA, bool kTransposeB>
  __device__ void add_product(const T* A, const T* B, T sign, int b) {
    constexpr int kA = kTransposeA ? 1 : kStride, kB = kTransposeB ? kStride : 1;
    const T *rows = A + y() * kA, *columns = B + x() * kB;
#pragma unroll 4
    for (int k = 0; k < b; k++) {
      T left[kTile], right[kTile];
#pragma unroll
      for (int i = 0; i < kTile; i++) {
        left[i] = sign * rows[kSide * i * kA + k * (kTransposeA ? kStride : 1)];
        right[i] = columns[kSide * i * kB + k * (kTransposeB ? 1 : kStride)];
      }
#pragma unroll
      for (int i = 0; i < kTile; i++) {
#pragma unroll
        for (int j = 0; j < kTile; j++) at[i][j] += left[i] * right[j];
      }
    }
  }
};

__device__ inline int64_t packed_at(int row, int column, int b) {
  return int64_t(row) * (2 * b - row - 1) / 2 + column - row - 1;
}

template <typename M, typename T>
__device__ void load_matrix(M& to, const void* from, const BlockMap& a) {
  to.fill(a.b,
          [&](int row, int column, T) { return T(number(a, from, (int64_t(blockIdx.x) * a.b + row) * a.b + column)); });
}

// Q of a block's parameter, by way of shared memory for the transpose.
template <typename M, typename T>
__device__ void load_skew(M& Q, T* shared, const BlockMap& a) {
  const int64_t block = blockIdx.x;
  if (a.packed) {
    const int64_t first = block * (int64_t(a.b) * (a.b - 1) / 2);
    Q.fill(a.b, [&](int row, int column, T) {
      return row < column ? T(number(a, a.q, first + packed_at(row, column, a.b))) : T(0);
    });
  } else {
    load_matrix<M, T>(Q, a.q, a);
  }
  Q.share(shared);
  Q.fill(a.b, [&](int row, int column, T v) {
    const T difference = v - shared[column * M::kStride + row];
    return a.packed ? difference : difference / 2;
  });
}

// The gradient in the parameter of the gradient in Q, which is shared for its transpose.
template <typename M, typename T>
__device__ void store_skew(const M& dQ, T* shared, const BlockMap& a) {
  dQ.share(shared);
  M out;
  const int64_t block = blockIdx.x;
  out.fill(a.b, [&](int row, int column, T) {
    const T difference = shared[row * M::kStride + column] - shared[column * M::kStride + row];
    if (!a.packed) {
      store(a, (block * a.b + row) * a.b + column, difference / 2);
    } else if (row < column) {
      store(a, block * (int64_t(a.b) * (a.b - 1) / 2) + packed_at(row, column, a.b), difference);
    }
    return T(0);
  });
}

template <typename M, typename T>
__device__ void store_matrix(M& R, const BlockMap& a) {
  R.fill(a.b, [&](int row, int column, T value) {
    store(a, (int64_t(blockIdx.x) * a.b + row) * a.b + column, value);
    return value;
  });
}

template <typename T, int kSide, int kTile>
__global__ void __launch_bounds__(kSide* kSide) skew_polynomial_kernel(const __grid_constant__ BlockMap a) {
  using M = Matrix<T, kSide, kTile>;
  extern __shared__ __align__(16) char shared[];
  T *Q = reinterpret_cast<T*>(shared), *X = Q + M::kSize;
  const int degree = a.terms - 1;
  M R;
  load_skew<M, T>(R, X, a);
  R.share(Q);
  const T last = a.coefficients[degree], next = degree > 0 ? a.coefficients[degree - 1] : 0;
  R.fill(a.b, [&](int row, int column, T q) {
    return degree == 0 ? (row == column ? last : T(0)) : last * q + (row == column ? next : T(0));
  });
  for (int k = degree - 2; k >= 0; k--) {
    R.share(X);
    R.fill(a.b, [&](int row, int column, T) { return row == column ? T(a.coefficients[k]) : T(0); });
    R.template add_product<false, false>(Q, X, 1, a.b);
  }
  store_matrix<M, T>(R, a);
}

template <typename T, int kSide, int kTile>
__global__ void __launch_bounds__(kSide* kSide) skew_polynomial_backward_kernel(const __grid_constant__ BlockMap a) {
  using M = Matrix<T, kSide, kTile>;
  extern __shared__ __align__(16) char shared[];
  T *Q = reinterpret_cast<T*>(shared), *X = Q + M::kSize, *A = X + M::kSize, *dR = A + M::kSize;
  const int degree = a.terms - 1;
  const T last = a.coefficients[degree];
  M x, sum;
  load_skew<M, T>(x, X, a);
  x.share(Q);
  load_matrix<M, T>(sum, a.dR, a);
  if (degree > 1) sum.share(dR);
  sum.fill(a.b, [&](int, int, T v) { return degree > 0 ? last * v : T(0); });
  x.fill(a.b, [&](int row, int column, T q) {
    return last * q + (degree > 0 && row == column ? T(a.coefficients[degree - 1]) : T(0));
  });
  for (int k = degree - 2; k >= 0; k--) {
    sum.share(A);
    x.share(X);
    sum.fill(a.b, [](int, int, T) { return T(0); });
    sum.template add_product<false, true>(dR, X, 1, a.b);
    sum.template add_product<false, false>(Q, A, -1, a.b);
    if (k > 0) {
      x.fill(a.b, [&](int row, int column, T) { return row == column ? T(a.coefficients[k]) : T(0); });
      x.template add_product<false, false>(Q, X, 1, a.b);
    }
  }
  store_skew<M, T>(sum, X, a);
}

template <int kSide, int kTile>
__global__ void __launch_bounds__(kSide* kSide) cayley_kernel(const __grid_constant__ BlockMap a) {
  using M = Matrix<double, kSide, kTile>;
  __shared__ double rows[2][M::kRows], columns[2][M::kRows], inverses[2];
  const int y = M::y(), x = M::x();
  M R;
  extern __shared__ __align__(16) char shared[];
  load_skew<M, double>(R, reinterpret_cast<double*>(shared), a);
  R.fill(a.b, [](int row, int column, double q) { return q + (row == column); });
  int turn = 0;
#pragma unroll
  for (int p = 0; p < kTile; p++) {
    for (int side = 0; side < kSide && p * kSide + side < a.b; side++, turn ^= 1) {
      const int pivot = p * kSide + side;
#pragma unroll
      for (int i = 0; i < kTile; i++) {
        if (y == side) rows[turn][x + kSide * i] = R.at[p][i];
        if (x == side) columns[turn][y + kSide * i] = R.at[i][p];
      }
      if (y == side && x == side) inverses[turn] = 1 / R.at[p][p];
      __syncthreads();
      const double inverse = inverses[turn];
      R.fill(a.b, [&](int row, int column, double v) {
        if (row == pivot) return column == pivot ? inverse : rows[turn][column] * inverse;
        const double factor = columns[turn][row] * inverse;
        return column == pivot ? -factor : v - factor * rows[turn][column];
      });
    }
  }
  R.fill(a.b, [](int row, int column, double v) { return 2 * v - (row == column); });
  store_matrix<M, double>(R, a);
}

template <int kSide, int kTile>
__global__ void __launch_bounds__(kSide* kSide) cayley_backward_kernel(const __grid_constant__ BlockMap a) {
  using M = Matrix<double, kSide, kTile>;
  extern __shared__ __align__(16) char shared[];
  double *W = reinterpret_cast<double*>(shared), *U = W + M::kSize;
  M v;
  load_matrix<M, double>(v, a.q, a);
  v.fill(a.b, [](int row, int column, double r) { return r + (row == column); });
  v.share(W);
  load_matrix<M, double>(v, a.dR, a);
  v.share(U);
  v.fill(a.b, [](int, int, double) { return 0.0; });
  v.template add_product<true, false>(W, U, 1, a.b);
  v.share(U);
  v.fill(a.b, [](int, int, double) { return 0.0; });
  v.template add_product<false, true>(U, W, -0.5, a.b);
  store_skew<M, double>(v, U, a);
}

template <int kSide, int kTile>
static int run_map(const BlockMap& a, bool backward, void* stream) {
  using Wide = Matrix<double, kSide, kTile>;
  constexpr int kDouble = Wide::kSize * 8, kSingle = Wide::kSize * 4;
  constexpr int threads = kSide * kSide;
  const dim3 grid(static_cast<unsigned>(a.S));
  if (a.terms == 0) {
    return backward ? launch(cayley_backward_kernel<kSide, kTile>, grid, threads, 2 * kDouble, stream, a)
                    : launch(cayley_kernel<kSide, kTile>, grid, threads, kDouble, stream, a);
  }
  if (a.is_double) {
    return backward
               ? launch(skew_polynomial_backward_kernel<double, kSide, kTile>, grid, threads, 4 * kDouble, stream, a)
               : launch(skew_polynomial_kernel<double, kSide, kTile>, grid, threads, 2 * kDouble, stream, a);
  }
  return backward ? launch(skew_polynomial_backward_kernel<float, kSide, kTile>, grid, threads, 4 * kSingle, stream, a)
                  : launch(skew_polynomial_kernel<float, kSide, kTile>, grid, threads, 2 * kSingle, stream, a);
}

static int run_map(const BlockMap& a, bool backward, void* stream) {
  if (a.S == 0 || a.terms > kMaxTerms || a.b > kMaxBlock) return a.S == 0 ? 0 : int(cudaErrorInvalidValue);
  return a.b <= 8    ? run_map<8, 1>(a, backward, stream)
         : a.b <= 16 ? run_map<16, 1>(a, backward, stream)
         : a.b <= 32 ? run_map<16, 2>(a, backward, stream)
                     : run_map<16, 4>(a, backward, stream);
}

bool block_map_fits(int b) {
  const int rows = padded_group(b);
  return b <= 32 || 4 * rows * (rows + 1) * int(sizeof(double)) <= architecture().shared;
}

int block_map(const BlockMap& a, void* stream) { return run_map(a, false, stream); }
int block_map_backward(const BlockMap& a, void* stream) { return run_map(a, true, stream); }

}  // namespace peftkern::cuda
