// scale and scale_backward: the output scale of a layer whose base has added its bias, (y - bias) s + bias.
// Compiled once per instruction set; one pass over rows, arithmetic in the scale's dtype C, one rounding at the store.
// Gradients: dy0 = dy s, ds = sum over rows of dy (y - bias), over fixed runs of rows added in order.
#pragma once

#include "block_rotate.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// The factor and the bias as C; zeros for no bias.
template <class C>
class ScaleVectors {
 public:
  ScaleVectors(const void* s, const void* bias, Dtype dtype, int64_t N) : scale(static_cast<const C*>(s)), bias_(N) {
    if (bias)
      read_tile<C>({const_cast<void*>(bias), dtype, N}, 0, 1, 0, N, bias_.data(), N);
    else
      memset(bias_.data(), 0, N * sizeof(C));
  }
  const C* bias() const { return bias_.data(); }
  const C* const scale;

 private:
  Buffer<C> bias_;
};

template <class C>
void scale_outputs(const Rows& y, int64_t M, int64_t N, const void* s, const void* bias, void* out, int threads) {
  ScaleVectors<C> vectors(s, bias, y.dtype, N);
  Rows to = {out, y.dtype, N};
  threads = useful_threads(threads, M, M * N);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < M; i++) {
    C row[kRotateChunk];
    for (int64_t c0 = 0; c0 < N; c0 += kRotateChunk) {
      int cols = min_int(kRotateChunk, N - c0);
      read_tile<C>(y, i, 1, c0, cols, row, cols);
      const C *factor = vectors.scale + c0, *b = vectors.bias() + c0;
      for (int c = 0; c < cols; c++) row[c] = (row[c] - b[c]) * factor[c] + b[c];
      write_row(address(to, i, c0), to.dtype, row, cols);
    }
  }
}

template <class C>
void scale_outputs_backward(const Rows& dy, const Rows& y, int64_t M, int64_t N, const void* s, const void* bias,
                            void* dy0, C* ds, int threads) {
  ScaleVectors<C> vectors(s, bias, y.dtype, N);
  Rows to = {dy0, y.dtype, N};
  int64_t sum_rows = rows_per_sum(M), sums = ceil_div(M, sum_rows);
  Buffer<C> partial(ds ? sums * N : 0);
  threads = useful_threads(threads, sums, 2 * M * N);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t sum = 0; sum < sums; sum++) {
    C row[kRotateChunk], value[kRotateChunk];
    C* total = partial.data() + sum * N;
    if (ds) memset(total, 0, N * sizeof(C));
    int64_t end = (sum + 1) * sum_rows < M ? (sum + 1) * sum_rows : M;
    for (int64_t i = sum * sum_rows; i < end; i++)
      for (int64_t c0 = 0; c0 < N; c0 += kRotateChunk) {
        int cols = min_int(kRotateChunk, N - c0);
        read_tile<C>(dy, i, 1, c0, cols, row, cols);
        if (ds) {
          read_tile<C>(y, i, 1, c0, cols, value, cols);
          const C* b = vectors.bias() + c0;
          for (int c = 0; c < cols; c++) total[c0 + c] += row[c] * (value[c] - b[c]);
        }
        if (!dy0) continue;
        const C* factor = vectors.scale + c0;
        for (int c = 0; c < cols; c++) row[c] *= factor[c];
        write_row(address(to, i, c0), to.dtype, row, cols);
      }
  }
  if (!ds) return;
  for (int64_t c = 0; c < N; c++) {
    C sum = 0;
    for (int64_t i = 0; i < sums; i++) sum += partial[i * N + c];
    ds[c] = sum;
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
