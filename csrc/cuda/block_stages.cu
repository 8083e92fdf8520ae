// What surrounds the pass over rows: a butterfly's stages as one matrix per group and the gradient back to the stages,
// sums of partial results, and float64 products of any size.
//
//   D = B_(f-1) ... B_1 B_0       [n, G, G] of R [f, n 2^(f-1), b, b], G = b 2^(f-1) (butterfly/README.md, eq. 2 and 3)
//   dR_s = (I B_(f-1) ... B_(s+1))^T (dD B_0^T ... B_(s-1)^T)      on the blocks of stage s
//
// Launch: stages_product one block of threads per group and 32 rows of D; stages_backward one per group and stage,
// which takes dD (its sums over chunks included) 32 rows at a time. A stage is applied to rows in shared memory: a
// thread has one column and eight rows. Sums: eight threads by a run of the terms each, then the runs in order.
// Nothing is atomic.
// Bytes: R and dR once per 32 rows, D once; dD once per stage.
// Flops: 2 f n G^2 b forward, 2 f^2 n G^2 b backward: a few thousandths of a layer of 8192 tokens.
#include "cuda/blocks.h"
#include "cuda/tiles.h"

namespace peftkern::cuda {

constexpr int kStageThreads = 256, kStageRows = 32, kThreadRows = 8;

// Division of numbers below 2^16 by one of them, two instructions where the compiler would take twenty.
struct Divisor {
  unsigned n, inverse;
  __device__ explicit Divisor(int n) : n(n), inverse(0xffffffffu / unsigned(n) + 1) {}
  __device__ int of(int i) const { return n == 1 ? i : int(__umulhi(i, inverse)); }
};

// A stage on G columns: which numbers of which block meet in a column.
struct Stage {
  int b, s;
  // First column of the lower half of block j; the upper half lies distance() further.
  __device__ int first(int j) const { return (j >> s) * (b << s) + (j & ((1 << s) - 1)) * (b / 2); }
  __device__ int distance() const { return b / 2 << s; }
  __device__ int column(int j, int k) const { return first(j) + (k < b / 2 ? k : distance() + k - b / 2); }
};

template <typename T>
struct StageMemory {
  // Of rows, odd so that lanes of several rows meet no bank twice, and known to the compiler for their addresses.
  static constexpr int kStride = (sizeof(T) == 8 ? 64 : kMaxGroup) + 1;
  int G, b;
  Divisor by_G, by_b, by_half;
  T *blocks, *tiles;

  __device__ StageMemory(T* shared, int G, int b)
      : G(G), b(b), by_G(G), by_b(b), by_half(b / 2), blocks(shared), tiles(shared + G * (b + 1)) {}
  // Blocks lie b (b + 1) apart, so that lanes of several blocks meet no bank twice.
  __device__ int block(int j) const { return j * b * (b + 1); }
  __device__ T* tile(int i) const { return tiles + i * kStageRows * kStride; }
  static int bytes(int G, int b, int tiles) { return (G * (b + 1) + tiles * kStageRows * kStride) * int(sizeof(T)); }

  // The blocks of one stage of one group, or their transposes; all threads wait before and after.
  __device__ void load(const T* R, bool transpose) {
    __syncthreads();
    for (int i = threadIdx.x; i < G * b; i += kStageThreads) {
      const int row = by_b.of(i), column = i - row * b, j = by_b.of(row), within = row - j * b;
      blocks[block(j) + (transpose ? column * b + within : within * b + column)] = R[i];
    }
    __syncthreads();
  }

  // f(row, column) into each place of a tile.
  template <typename F>
  __device__ void fill(T* to, const F& f) const {
    for (int row = threadIdx.x / 32; row < kStageRows; row += kStageThreads / 32) {
#pragma unroll 1
      for (int column = threadIdx.x % 32; column < G; column += 32) to[row * kStride + column] = f(row, column);
    }
  }
  // Rows row0 .. row0 + 31 of the identity.
  __device__ void identity(T* to, int row0) const {
    fill(to, [&](int row, int column) { return T(row0 + row == column); });
  }

  // to = from times the stage that was loaded.
  __device__ void apply(const T* from, T* to, Stage stage) const {
    for (int item = threadIdx.x; item < G * (kStageRows / kThreadRows); item += kStageThreads) {
      const int rows = by_G.of(item), column = item - rows * G, unit = by_half.of(column);
      const int j = (unit >> (stage.s + 1) << stage.s) + (unit & ((1 << stage.s) - 1));
      const int number = (unit >> stage.s & 1) * (b / 2) + column - unit * (b / 2);
      const T* R = blocks + block(j) + number;
      const int place = rows * kThreadRows * kStride;
      T sum[kThreadRows] = {};
      for (int half = 0; half < 2; half++) {
        const T* v = from + place + stage.first(j) + half * stage.distance();
#pragma unroll 2
        for (int k = 0; k < b / 2; k++, R += b, v++) {
          const T r = *R;
#pragma unroll
          for (int i = 0; i < kThreadRows; i++) sum[i] += v[i * kStride] * r;
        }
      }
#pragma unroll
      for (int i = 0; i < kThreadRows; i++) to[place + i * kStride + column] = sum[i];
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kStageThreads) butterfly_product_kernel(const __grid_constant__ Stages a) {
  extern __shared__ __align__(16) char shared[];
  const int G = a.b << (a.f - 1), group = blockIdx.x, row0 = blockIdx.y * kStageRows;
  constexpr int kStride = StageMemory<T>::kStride;
  StageMemory<T> memory(reinterpret_cast<T*>(shared), G, a.b);
  const T* R = static_cast<const T*>(a.R) + int64_t(group) * G * a.b;
  memory.identity(memory.tile(0), row0);
  for (int s = a.f - 1; s >= 0; s--) {
    memory.load(R + int64_t(s) * a.n * G * a.b, false);
    memory.apply(memory.tile((a.f - 1 - s) % 2), memory.tile((a.f - s) % 2), {a.b, s});
  }
  __syncthreads();
  T* D = static_cast<T*>(a.D) + int64_t(group) * G * G;
  const T* result = memory.tile(a.f % 2);
  for (int row = threadIdx.x / 32; row < min(kStageRows, G - row0); row += kStageThreads / 32) {
#pragma unroll 1
    for (int column = threadIdx.x % 32; column < G; column += 32) {
      D[(row0 + row) * G + column] = result[row * kStride + column];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kStageThreads) butterfly_product_backward_kernel(const __grid_constant__ Stages a) {
  extern __shared__ __align__(16) char shared[];
  const int G = a.b << (a.f - 1), group = blockIdx.x, stage = blockIdx.y, count = G * a.b;
  constexpr int kStride = StageMemory<T>::kStride;
  StageMemory<T> memory(reinterpret_cast<T*>(shared), G, a.b);
  const T* R = static_cast<const T*>(a.R) + int64_t(group) * count;
  const int64_t stage_stride = int64_t(a.n) * count, chunk_stride = int64_t(a.n) * G * G;
  T* dR = static_cast<T*>(a.dR) + stage * stage_stride + int64_t(group) * count;
  for (int row0 = 0; row0 < G; row0 += kStageRows) {
    __syncthreads();
    const T* dD = static_cast<const T*>(a.dD) + (int64_t(group) * G + row0) * G;
    int g = 0;
    memory.fill(memory.tile(g), [&](int row, int column) {
      T total = 0;
      if (row0 + row < G) {
#pragma unroll 8
        for (int c = 0; c < a.chunks; c++) total += dD[c * chunk_stride + row * G + column];
      }
      return total;
    });
    for (int s = 0; s < stage; s++, g ^= 1) {
      memory.load(R + s * stage_stride, true);
      memory.apply(memory.tile(g), memory.tile(g ^ 1), {a.b, s});
    }
    __syncthreads();
    int u = g ^ 1, other = 2;
    memory.identity(memory.tile(u), row0);
    for (int s = a.f - 1; s > stage; s--) {
      memory.load(R + s * stage_stride, false);
      memory.apply(memory.tile(u), memory.tile(other), {a.b, s});
      const int next = other;
      other = u, u = next;
    }
    __syncthreads();
    const Stage at{a.b, stage};
    // Each number of dR belongs to one thread, which adds to it after every 32 rows.
    for (int i = threadIdx.x; i < count; i += kStageThreads) {
      const int row = memory.by_b.of(i), j = memory.by_b.of(row);
      const T* left = memory.tile(u) + at.column(j, row - j * a.b);
      const T* right = memory.tile(g) + at.column(j, i - row * a.b);
      T sum = row0 == 0 ? T(0) : dR[i];
#pragma unroll 8
      for (int m = 0; m < kStageRows; m++) sum += left[m * kStride] * right[m * kStride];
      dR[i] = sum;
    }
  }
}

template <typename T>
static int run_stages(const Stages& a, bool backward, void* stream) {
  const int G = a.b << (a.f - 1), shared = StageMemory<T>::bytes(G, a.b, backward ? 3 : 2);
  if (a.n == 0) return 0;
  return backward ? launch(butterfly_product_backward_kernel<T>, dim3(a.n, a.f), kStageThreads, shared, stream, a)
                  : launch(butterfly_product_kernel<T>, dim3(a.n, (G + kStageRows - 1) / kStageRows), kStageThreads,
                           shared, stream, a);
}

int stages_product(const Stages& a, void* stream) {
  return a.is_double ? run_stages<double>(a, false, stream) : run_stages<float>(a, false, stream);
}
int stages_backward(const Stages& a, void* stream) {
  return a.is_double ? run_stages<double>(a, true, stream) : run_stages<float>(a, true, stream);
}

struct Sum {
  const void* partial;
  void* out;
  int64_t count, terms;
};

// A block has 256 / kRuns numbers, each summed by kRuns threads.
template <typename T, int kRuns>
__global__ void __launch_bounds__(256) block_sum_kernel(const __grid_constant__ Sum a) {
  constexpr int kItems = 256 / kRuns;
  __shared__ T runs[kRuns][kItems];
  const int item = threadIdx.x % kItems, run = threadIdx.x / kItems;
  const int64_t i = int64_t(blockIdx.x) * kItems + item, each = (a.terms + kRuns - 1) / kRuns;
  const T* from = static_cast<const T*>(a.partial) + i;
  T total = 0;
  if (i < a.count) {
#pragma unroll 8
    for (int64_t c = run * each; c < min((run + 1) * each, a.terms); c++) total += from[c * a.count];
  }
  if (kRuns > 1) {
    runs[run][item] = total;
    __syncthreads();
    total = 0;
    for (int r = 0; r < kRuns; r++) total += runs[r][item];
  }
  if (run == 0 && i < a.count) static_cast<T*>(a.out)[i] = total;
}

int block_sum(bool is_double, const void* partial, void* out, int64_t count, int64_t terms, void* stream) {
  const Sum a{partial, out, count, terms};
  if (count == 0) return 0;
  const int items = terms > 64 ? 32 : 256;
  const dim3 grid(unsigned((count + items - 1) / items));
  if (is_double) {
    return terms > 64 ? launch(block_sum_kernel<double, 8>, grid, 256, 0, stream, a)
                      : launch(block_sum_kernel<double, 1>, grid, 256, 0, stream, a);
  }
  return terms > 64 ? launch(block_sum_kernel<float, 8>, grid, 256, 0, stream, a)
                    : launch(block_sum_kernel<float, 1>, grid, 256, 0, stream, a);
}

int block_chunks(int64_t M, int n, int G) {
  // As many as a large device has blocks in flight, which registers bound: 4, 3 or 2 to a multiprocessor. None of fewer
  // than 128 rows, nor one without rows.
  const int padded = padded_group(G), panel = padded > 64 ? padded : 64,
            resident = padded < 64    ? 4
                       : padded == 64 ? 3
                                      : 2;
  const int64_t panels = (int64_t(n) * padded + panel - 1) / panel, steps = (M + 63) / 64, slots = kFill / 4 * resident;
  const int64_t fill = panels > 0 && slots > panels ? slots / panels : 1, most = (steps + 1) / 2;
  const int64_t chunks = most < fill ? most : fill, each = chunks > 0 ? (steps + chunks - 1) / chunks : 1;
  return int((steps + each - 1) / each);
}

__global__ void __launch_bounds__(256) batched_product_kernel(const __grid_constant__ BatchedProduct a) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x, column = i % a.n, row = i / a.n % a.m,
                batch = i / a.n / a.m;
  if (batch >= a.batch) return;
  const double* A = a.A + batch * a.A_strides[0] + row * a.A_strides[1];
  const double* B = a.B + batch * a.B_strides[0] + column * a.B_strides[2];
  double sum = 0;
  for (int64_t k = 0; k < a.k; k++) sum += A[k * a.A_strides[2]] * B[k * a.B_strides[1]];
  a.C[batch * a.C_strides[0] + row * a.C_strides[1] + column * a.C_strides[2]] = sum;
}

int batched_product(const BatchedProduct& a, void* stream) {
  const int64_t count = a.batch * a.m * a.n;
  return count == 0 ? 0 : launch(batched_product_kernel, dim3(unsigned((count + 255) / 256)), 256, 0, stream, a);
}

}  // namespace peftkern::cuda
