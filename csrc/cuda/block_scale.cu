// The scale of a butterfly layer's outputs (butterfly/README.md), computed in float32 (float64) and rounded once:
//   z = (y - b) s + b               [M, N], of outputs that already have a bias
//   dz = dy s,  ds = the sum over rows of dy (y - b)
//   z = (y + y_low) s + b,  p = y + y_low      of a product that has not been rounded
//
// Launch: blocks of 8 warps, one per panel of 32 lanes by 16 bytes of columns and run of rows; a lane keeps its
// columns' s, b and sums. The sums of the warps are added in order, then those of the runs by block_sum. No atomics.
// Bytes: y once and z once, backward dy and y once and dz once; partial sums 4 N per run. That is the least.
#include <type_traits>

#include "cuda/blocks.h"
#include "cuda/tiles.h"
#include "cuda/warp.cuh"

namespace peftkern::cuda {

constexpr int kScaleWarps = 8;

template <typename X>
struct ScaleTypes {
  using Working = float;
};
template <>
struct ScaleTypes<double> {
  using Working = double;
};

template <typename X>
constexpr int kLaneColumns = 16 / int(sizeof(X));

// Columns of one lane, 8 or 16 bytes; those beyond `left` are 0.
template <typename X, int kCount = kLaneColumns<X>>
struct alignas(16) LaneColumns {
  using Word = std::conditional_t<sizeof(X) * kCount == 16, uint4, uint2>;
  X at[kCount];

  __device__ void load(const X* from, int left, bool wide) {
    if (wide) {
      *reinterpret_cast<Word*>(this) = *reinterpret_cast<const Word*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i++) at[i] = i < left ? from[i] : X(0.0f);
    }
  }
  __device__ void store(X* to, int left, bool wide) const {
    if (wide) {
      *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(this);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        if (i < left) to[i] = at[i];
      }
    }
  }
};

template <typename X, bool kBackward>
__global__ void __launch_bounds__(32 * kScaleWarps) scale_outputs_kernel(const __grid_constant__ OutputScale a) {
  using W = typename ScaleTypes<X>::Working;
  using Columns = LaneColumns<X>;
  constexpr int kColumns = kLaneColumns<X>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = (blockIdx.x * 32 + lane) * kColumns, left = a.N - column;
  const int64_t begin = int64_t(blockIdx.y) * a.chunk_rows, end = min(begin + a.chunk_rows, a.M);
  alignas(16) W scale[kColumns];
  W bias[kColumns], sum[kColumns] = {};
  if (a.wide && left > 0) {
    constexpr int kPiece = kLaneColumns<W>;
#pragma unroll
    for (int i = 0; i < kColumns; i += kPiece) {
      *reinterpret_cast<uint4*>(scale + i) =
          *reinterpret_cast<const uint4*>(static_cast<const W*>(a.scale) + column + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; i++) scale[i] = i < left ? static_cast<const W*>(a.scale)[column + i] : W(0);
  }
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    bias[i] = i < left && a.bias != nullptr ? W(static_cast<const X*>(a.bias)[column + i]) : W(0);
  }
  const X* from = static_cast<const X*>(a.y) + column;
  const X* incoming = static_cast<const X*>(a.dy) + column;
  X* to = static_cast<X*>(a.z) + column;
#pragma unroll 4
  for (int64_t row = begin + warp; row < end; row += kScaleWarps) {
    if (left <= 0) break;
    Columns y, dy, out;
    if (!kBackward || a.partial != nullptr) y.load(from + row * a.y_stride, left, a.wide);
    if constexpr (kBackward) {
      dy.load(incoming + row * a.dy_stride, left, a.wide);
#pragma unroll
      for (int i = 0; i < kColumns; i++) {
        if (a.partial != nullptr) sum[i] += W(dy.at[i]) * (W(y.at[i]) - bias[i]);
        out.at[i] = X(W(dy.at[i]) * scale[i]);
      }
      if (a.z != nullptr) out.store(to + row * a.N, left, a.wide);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; i++) out.at[i] = X((W(y.at[i]) - bias[i]) * scale[i] + bias[i]);
      out.store(to + row * a.N, left, a.wide);
    }
  }
  if constexpr (kBackward) {
    if (a.partial == nullptr) return;
    constexpr int kStride = 32 + 32 / kColumns;  // no bank is met twice, neither way
    __shared__ W sums[kScaleWarps][kColumns * kStride];
#pragma unroll
    for (int i = 0; i < kColumns; i++) sums[warp][i * kStride + lane] = sum[i];
    __syncthreads();
    const int first = blockIdx.x * 32 * kColumns;
    for (int i = threadIdx.x; i < 32 * kColumns && first + i < a.N; i += 32 * kScaleWarps) {
      W total = 0;
      for (int w = 0; w < kScaleWarps; w++) total += sums[w][i % kColumns * kStride + i / kColumns];
      static_cast<W*>(a.partial)[int64_t(blockIdx.y) * a.N + first + i] = total;
    }
  }
}

template <typename X>
__global__ void __launch_bounds__(32 * kScaleWarps) scale_product_kernel(const __grid_constant__ ScaledProduct a) {
  using W = typename ScaleTypes<X>::Working;
  constexpr int kColumns = kLaneColumns<W>;
  const int column = (blockIdx.x * 32 + threadIdx.x % 32) * kColumns, left = a.N - column;
  const int64_t begin = int64_t(blockIdx.y) * a.chunk_rows, end = min(begin + a.chunk_rows, a.M);
  if (left <= 0) return;
  LaneColumns<W> scale;
  LaneColumns<X, kColumns> bias;
  if (a.scale != nullptr) scale.load(static_cast<const W*>(a.scale) + column, left, a.wide);
  if (a.bias != nullptr) bias.load(static_cast<const X*>(a.bias) + column, left, a.wide);
#pragma unroll 4
  for (int64_t row = begin + threadIdx.x / 32; row < end; row += kScaleWarps) {
    const int64_t at = row * a.N + column;
    LaneColumns<W> y;
    LaneColumns<X, kColumns> low, z, p;
    y.load(static_cast<const W*>(a.y) + at, left, a.wide);
    if (a.y_low != nullptr) low.load(static_cast<const X*>(a.y_low) + at, left, a.wide);
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
      const W product = a.y_low != nullptr ? y.at[i] + W(low.at[i]) : y.at[i];
      const W scaled = a.scale != nullptr ? product * scale.at[i] : product;
      p.at[i] = X(product);
      z.at[i] = X(a.bias != nullptr ? scaled + W(bias.at[i]) : scaled);
    }
    z.store(static_cast<X*>(a.z) + at, left, a.wide);
    if (a.p != nullptr) p.store(static_cast<X*>(a.p) + at, left, a.wide);
  }
}

static int panels(int size, int N) { return (N + 32 * (16 / size) - 1) / (32 * (16 / size)); }

int scale_chunks(Dtype dtype, int64_t M, int N) {
  const int64_t across = panels(int(dtype_size(dtype)), N), fill = across > 0 && kFill > across ? kFill / across : 1;
  const int64_t most = (M + 63) / 64, chunks = most < fill ? most : fill,
                each = chunks > 0 ? (M + chunks - 1) / chunks : 1;
  return int((M + each - 1) / each);
}

template <typename X>
static int run_scale(Dtype dtype, OutputScale a, bool backward, void* stream) {
  if (a.M == 0 || a.N == 0) return 0;
  const int chunks = scale_chunks(dtype, a.M, a.N);
  const dim3 grid(panels(sizeof(X), a.N), chunks);
  a.chunk_rows = (a.M + chunks - 1) / chunks;
  a.wide = a.N % kLaneColumns<X> == 0 && wide(a.y, a.y_stride, sizeof(X)) && wide(a.z, 0, sizeof(X)) &&
           wide(a.scale, 0, 4) && wide(a.dy, a.dy_stride, sizeof(X));
  return backward ? launch(scale_outputs_kernel<X, true>, grid, 32 * kScaleWarps, 0, stream, a)
                  : launch(scale_outputs_kernel<X, false>, grid, 32 * kScaleWarps, 0, stream, a);
}

static int run_scale(Dtype dtype, const OutputScale& a, bool backward, void* stream) {
  return dtype == kFloat64    ? run_scale<double>(dtype, a, backward, stream)
         : dtype == kFloat32  ? run_scale<float>(dtype, a, backward, stream)
         : dtype == kBFloat16 ? run_scale<bf16>(dtype, a, backward, stream)
                              : run_scale<fp16>(dtype, a, backward, stream);
}

template <typename X>
static int run_product(ScaledProduct a, void* stream) {
  using W = typename ScaleTypes<X>::Working;
  if (a.M == 0 || a.N == 0) return 0;
  const Dtype working = sizeof(W) == 8 ? kFloat64 : kFloat32;
  const int chunks = scale_chunks(working, a.M, a.N);
  a.chunk_rows = (a.M + chunks - 1) / chunks;
  a.wide = a.N % kLaneColumns<W> == 0 && wide(a.y, 0, 4) && wide(a.y_low, 0, 4) && wide(a.scale, 0, 4) &&
           wide(a.bias, 0, 4) && wide(a.z, 0, 4) && wide(a.p, 0, 4);
  return launch(scale_product_kernel<X>, dim3(panels(sizeof(W), a.N), chunks), 32 * kScaleWarps, 0, stream, a);
}

int scale_product(Dtype dtype, const ScaledProduct& a, void* stream) {
  return dtype == kFloat64    ? run_product<double>(a, stream)
         : dtype == kFloat32  ? run_product<float>(a, stream)
         : dtype == kBFloat16 ? run_product<bf16>(a, stream)
                              : run_product<fp16>(a, stream);
}

int scale_outputs(Dtype dtype, OutputScale a, void* stream) { return run_scale(dtype, a, false, stream); }
int scale_outputs_backward(Dtype dtype, OutputScale a, void* stream) { return run_scale(dtype, a, true, stream); }

}  // namespace peftkern::cuda
