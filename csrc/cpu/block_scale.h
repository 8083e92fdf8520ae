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

inline Vec<double>::type load(const double* p) { return Vec<double>::load(p); }
inline void store(double* p, Vec<double>::type v) { Vec<double>::store(p, v); }
inline double load1(const double* p) { return *p; }
inline void store1(double* p, double v) { *p = v; }

// Calls work with a null pointer of the element type of rows that are computed in C.
template <class C, class Work>
void with_elements(Dtype dtype, Work work) {
  if constexpr (std::is_same<C, double>::value) return work(static_cast<double*>(nullptr));
  if constexpr (std::is_same<C, float>::value) {
    if (dtype == kFloat32) work(static_cast<float*>(nullptr));
    if (dtype == kBFloat16) work(static_cast<bf16*>(nullptr));
    if (dtype == kFloat16) work(static_cast<fp16*>(nullptr));
  }
}

template <class C, class E>
void scale_row(const E* y, int64_t N, const C* s, const C* bias, E* out) {
  using V = Vec<C>;
  int64_t c = 0;
  for (; c + V::W <= N; c += V::W) {
    // The row behind this one.
    __builtin_prefetch(out + N + c, 1);
    typename V::type b = V::load(bias + c);
    store(out + c, (load(y + c) - b) * V::load(s + c) + b);
  }
  for (; c < N; c++) store1(out + c, (load1(y + c) - bias[c]) * s[c] + bias[c]);
}

template <class C>
void scale_outputs(const Rows& y, int64_t M, int64_t N, const void* s, const void* bias, void* out, int threads) {
  ScaleVectors<C> vectors(s, bias, y.dtype, N);
  Rows to = {out, y.dtype, N};
  threads = useful_threads(threads, M, M * N);
  with_elements<C>(y.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < M; i++)
      scale_row(reinterpret_cast<const E*>(address(y, i, 0)), N, vectors.scale, vectors.bias(),
                reinterpret_cast<E*>(address(to, i, 0)));
  });
}

// total += dy (y - bias), dy0 = dy s; null total or dy0: not wanted.
template <class C, class E>
void scale_row_backward(const E* dy, const E* y, int64_t N, const C* s, const C* bias, C* total, E* dy0) {
  using V = Vec<C>;
  int64_t c = 0;
  for (; c + V::W <= N; c += V::W) {
    typename V::type g = load(dy + c);
    if (total) V::store(total + c, V::load(total + c) + g * (load(y + c) - V::load(bias + c)));
    if (!dy0) continue;
    __builtin_prefetch(dy0 + N + c, 1);
    store(dy0 + c, g * V::load(s + c));
  }
  for (; c < N; c++) {
    C g = load1(dy + c);
    if (total) total[c] += g * (load1(y + c) - bias[c]);
    if (dy0) store1(dy0 + c, g * s[c]);
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
  with_elements<C>(y.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t sum = 0; sum < sums; sum++) {
      C* total = ds ? partial.data() + sum * N : nullptr;
      if (ds) memset(total, 0, N * sizeof(C));
      int64_t end = (sum + 1) * sum_rows < M ? (sum + 1) * sum_rows : M;
      for (int64_t i = sum * sum_rows; i < end; i++)
        scale_row_backward(reinterpret_cast<const E*>(address(dy, i, 0)), reinterpret_cast<const E*>(address(y, i, 0)),
                           N, vectors.scale, vectors.bias(), total,
                           dy0 ? reinterpret_cast<E*>(address(to, i, 0)) : nullptr);
    }
  });
  if (!ds) return;
  memset(ds, 0, N * sizeof(C));
  for (int64_t i = 0; i < sums; i++)
    for (int64_t c = 0; c < N; c++) ds[c] += partial[i * N + c];
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
