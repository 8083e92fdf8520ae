// Self-check of the block kernels without Python, made to be built with -fsanitize=address,undefined: exact-size heap
// buffers, so that a read or write one element too far is caught; every instruction set that this processor has.
// Against plain loops in fp64: rotate z = x B_(f-1) ... B_0, rotate_backward dx and dR = u^T g, the output scale.

#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/dispatch.h"

using namespace peftkern;

static const char* const kLevelNames[] = {"portable", "avx2", "avx512", "amx"};
static const double kRounding[] = {1e-12, 2e-6, 0x1p-7, 0x1p-10};
static int failures = 0;
static uint64_t state = 1;

using Matrix = std::vector<double>;
using Bytes = std::vector<char>;

static double uniform() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(state >> 11) / double(1ull << 53) * 2 - 1;
}

static void put(Bytes& m, Dtype dtype, int64_t i, double v) {
  float f = float(v);
  bf16 b = to_bf16(f);
  fp16 h = to_fp16(f);
  const void* from = dtype == kFloat64    ? static_cast<const void*>(&v)
                     : dtype == kFloat32  ? static_cast<const void*>(&f)
                     : dtype == kBFloat16 ? static_cast<const void*>(&b)
                                          : &h;
  memcpy(&m[i * dtype_size(dtype)], from, dtype_size(dtype));
}

static Matrix widened(const Bytes& m, Dtype dtype) {
  Matrix out(m.size() / dtype_size(dtype));
  for (size_t i = 0; i < out.size(); i++) {
    const char* from = &m[i * dtype_size(dtype)];
    float f;
    bf16 b;
    fp16 h;
    if (dtype == kFloat64) memcpy(&out[i], from, 8);
    if (dtype == kFloat32) memcpy(&f, from, 4), out[i] = f;
    if (dtype == kBFloat16) memcpy(&b, from, 2), out[i] = to_float(b);
    if (dtype == kFloat16) memcpy(&h, from, 2), out[i] = to_float(h);
  }
  return out;
}

static Bytes random(Dtype dtype, int64_t n, double size = 1) {
  Bytes m(n * dtype_size(dtype));
  for (int64_t i = 0; i < n; i++) put(m, dtype, i, size * uniform());
  return m;
}

static void expect(const Bytes& actual, Dtype dtype, const Matrix& exact, double limit, const char* what, int level,
                   int64_t M, int64_t K, int b, int f) {
  Matrix seen = widened(actual, dtype);
  double error = 0, norm = 1e-300;
  for (size_t i = 0; i < exact.size(); i++) {
    error += (seen[i] - exact[i]) * (seen[i] - exact[i]);
    norm += exact[i] * exact[i];
  }
  // Negated, so that NaN fails.
  if (std::sqrt(error / norm) < limit) return;
  printf("%s at %s, dtype %d, M %ld K %ld b %d f %d: error %g\n", what, kLevelNames[level], dtype, long(M), long(K), b,
         f, std::sqrt(error / norm));
  failures++;
}

// Column of place i of block j of a stage.
static int64_t column(int64_t j, int i, int stage, int b) {
  if (stage == 0) return j * b + i;
  int half = b / 2;
  int64_t group = j >> stage, t = j & ((1 << stage) - 1), first = (group << stage) * b + t * half;
  return i < half ? first + i : first + (int64_t(half) << stage) + i - half;
}

// out = in B_s; with `reverse` in B_s^T. R [f][stored][b][b].
static Matrix stage_product(const Matrix& in, const Matrix& R, int64_t M, int64_t K, int64_t stored, int b, int stage,
                            bool reverse) {
  Matrix out(M * K);
  for (int64_t m = 0; m < M; m++)
    for (int64_t j = 0; j < K / b; j++) {
      const double* block = &R[(stage * stored + (stored == 1 ? 0 : j)) * b * b];
      for (int k = 0; k < b; k++)
        for (int c = 0; c < b; c++)
          out[m * K + column(j, c, stage, b)] +=
              in[m * K + column(j, k, stage, b)] * (reverse ? block[c * b + k] : block[k * b + c]);
    }
  return out;
}

static void check_rotation(int level, Dtype dtype, int64_t M, int64_t K, int b, int f, bool shared, bool transpose) {
  const BlockKernels& kernels = block_kernels_of(Level(level));
  Dtype wide = dtype == kFloat64 ? kFloat64 : kFloat32;
  int64_t stored = shared ? 1 : K / b;
  Bytes x = random(dtype, M * K), dz = random(dtype, M * K), R = random(wide, f * stored * b * b, 1.5 / std::sqrt(b));
  Bytes z(x.size()), rest(x.size()), dx(x.size()), dR(R.size()), in_place = dz, dR_again(R.size());
  Blocks blocks = {R.data(), wide, K, f, stored, b};
  Rows x_rows = {x.data(), dtype, K}, dz_rows = {dz.data(), dtype, K};
  kernels.rotate(x_rows, M, blocks, transpose, {z.data(), dtype, K}, {rest.data(), dtype, K}, 2);
  kernels.rotate_backward(dz_rows, x_rows, M, blocks, transpose, dx.data(), dR.data(), 2);
  kernels.rotate_backward({in_place.data(), dtype, K}, x_rows, M, blocks, transpose, in_place.data(), dR_again.data(),
                          2);
  if (in_place != dx || dR_again != dR) {
    printf("rotate_backward in place at %s, dtype %d, M %ld K %ld b %d f %d\n", kLevelNames[level], dtype, long(M),
           long(K), b, f);
    failures++;
  }

  Matrix wide_R = widened(R, wide), exact_dR(f * stored * b * b);
  std::vector<Matrix> u = {widened(x, dtype)};
  auto stage_of = [&](int t) { return transpose ? t : f - 1 - t; };
  for (int t = 0; t < f; t++) u.push_back(stage_product(u[t], wide_R, M, K, stored, b, stage_of(t), transpose));
  Matrix g = widened(dz, dtype);
  for (int t = f - 1; t >= 0; t--) {
    int s = stage_of(t);
    for (int64_t m = 0; m < M; m++)
      for (int64_t j = 0; j < K / b; j++)
        for (int k = 0; k < b; k++)
          for (int c = 0; c < b; c++)
            exact_dR[((s * stored + (shared ? 0 : j)) * b + (transpose ? c : k)) * b + (transpose ? k : c)] +=
                u[t][m * K + column(j, k, s, b)] * g[m * K + column(j, c, s, b)];
    g = stage_product(g, wide_R, M, K, stored, b, s, !transpose);
  }
  expect(z, dtype, u[f], kRounding[dtype], "rotate", level, M, K, b, f);
  Matrix sum = widened(z, dtype), low = widened(rest, dtype);
  for (size_t i = 0; i < sum.size(); i++) sum[i] += low[i];
  Bytes both(sum.size() * sizeof(double));
  if (!both.empty()) memcpy(both.data(), sum.data(), both.size());
  double limit = kRounding[dtype] * kRounding[dtype];
  expect(both, kFloat64, u[f], limit > kRounding[wide] ? limit : kRounding[wide], "rotate, two terms", level, M, K, b,
         f);
  expect(dx, dtype, g, kRounding[dtype], "rotate_backward dx", level, M, K, b, f);
  expect(dR, wide, exact_dR, 4 * kRounding[wide], "rotate_backward dR", level, M, K, b, f);
}

// For the sanitizers: the values of the maps are tested from Python.
static void check_maps(int level, Dtype dtype, int64_t S, int b) {
  const BlockKernels& kernels = block_kernels_of(Level(level));
  Bytes q = random(dtype, S * b * (b - 1) / 2, 0.2), B = random(dtype, S * b * b), dR = random(dtype, S * b * b);
  Bytes R(B.size()), dq(q.size()), dB(B.size());
  const double c[] = {1, 2, 2, 2, 1};
  for (int count = 1; count <= 5; count++) {
    kernels.polynomial({q.data(), dtype, S, b, true}, c, count, R.data(), 2);
    kernels.polynomial_backward(dR.data(), {q.data(), dtype, S, b, true}, c, count, dq.data(), 2);
  }
  kernels.cayley({q.data(), dtype, S, b, true}, R.data(), 2);
  kernels.cayley_backward(dR.data(), {R.data(), dtype, S, b, false}, true, dq.data(), 2);
  kernels.cayley({B.data(), dtype, S, b, false}, R.data(), 2);
  kernels.cayley_backward(dR.data(), {R.data(), dtype, S, b, false}, false, dB.data(), 2);
  Matrix wide = widened(R, dtype), product(S * b * b), eye(S * b * b);
  for (int64_t j = 0; j < S; j++)
    for (int i = 0; i < b; i++)
      for (int k = 0; k < b; k++) {
        eye[(j * b + i) * b + k] = i == k;
        for (int l = 0; l < b; l++)
          product[(j * b + i) * b + k] += wide[(j * b + l) * b + i] * wide[(j * b + l) * b + k];
      }
  Bytes seen(S * b * b * 8);
  memcpy(seen.data(), product.data(), seen.size());
  expect(seen, kFloat64, eye, kRounding[dtype], "cayley", level, S, b, b, 1);
}

static void check_scale(int level, Dtype dtype, int64_t M, int64_t N, bool with_bias) {
  const BlockKernels& kernels = block_kernels_of(Level(level));
  Dtype wide = dtype == kFloat64 ? kFloat64 : kFloat32;
  Bytes y = random(dtype, M * N), dy = random(dtype, M * N), bias = random(dtype, N), s = random(wide, N);
  Bytes out(y.size()), dy0(y.size()), ds(s.size());
  const void* b = with_bias ? bias.data() : nullptr;
  kernels.scale({y.data(), dtype, N}, M, N, s.data(), b, out.data(), 2);
  kernels.scale_backward({dy.data(), dtype, N}, {y.data(), dtype, N}, M, N, s.data(), b, dy0.data(), ds.data(), 2);
  Matrix exact(M * N), wide_y = widened(y, dtype), wide_b = widened(bias, dtype), wide_s = widened(s, wide);
  for (int64_t i = 0; i < M * N; i++) {
    double shift = with_bias ? wide_b[i % N] : 0;
    exact[i] = (wide_y[i] - shift) * wide_s[i % N] + shift;
  }
  expect(out, dtype, exact, kRounding[dtype], "scale", level, M, N, 0, 0);
}

int main() {
  const int shapes[][4] = {// M, K/b, b, f
                           {0, 3, 4, 1},   {1, 5, 3, 1},   {33, 9, 2, 1},  {17, 32, 8, 1}, {5, 3, 17, 1},
                           {33, 3, 32, 1}, {7, 2, 40, 1},  {33, 8, 4, 3},  {20, 6, 10, 2}, {9, 16, 16, 2},
                           {33, 16, 2, 5}, {18, 4, 32, 3}, {3, 2, 256, 1}, {4, 2, 64, 2},  {69, 3, 32, 1},
                           {600, 8, 8, 1}, {130, 8, 8, 4}, {70, 2, 48, 1}};
  for (int level = kPortable; level <= best_level(); level++)
    for (int dtype = kFloat64; dtype <= kFloat16; dtype++) {
      for (const auto& s : shapes)
        for (int flags = 0; flags < 4; flags++)
          if (s[3] == 1 || flags < 2)
            check_rotation(level, Dtype(dtype), s[0], int64_t(s[1]) * s[2], s[2], s[3], flags & 2, flags & 1);
      for (int b : {1, 2, 3, 8, 17, 33})
        if (dtype <= kFloat32) check_maps(level, Dtype(dtype), 3, b);
      for (int64_t N : {1, 37, 300}) check_scale(level, Dtype(dtype), 33, N, N % 2);
    }
  printf("%d levels, %d failures\n", best_level() + 1, failures);
  return failures != 0;
}
