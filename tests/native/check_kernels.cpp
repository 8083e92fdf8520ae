// Self-check of the CPU kernels without Python, made to be built with -fsanitize=address,undefined: exact-size heap
// buffers, so that a read or write one element too far is caught; every instruction set that this processor has.
// rotate and rotate_backward against plain loops in fp64: z = x - P C V^T, dx = dz - Q C^T V^T, C = T^T.

#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/dispatch.h"

using namespace peftkern;

static const char* const kLevelNames[] = {"portable", "avx2", "avx512", "amx"};
static int failures = 0;
static uint64_t state = 1;

static double uniform() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(state >> 11) / double(1ull << 53) * 2 - 1;
}

static void put(std::vector<char>& m, Dtype dtype, int64_t i, double v) {
  if (dtype == kFloat64) memcpy(&m[i * 8], &v, 8);
  if (dtype == kFloat32) {
    float f = float(v);
    memcpy(&m[i * 4], &f, 4);
  }
  if (dtype == kBFloat16) {
    bf16 h = to_bf16(float(v));
    memcpy(&m[i * 2], &h, 2);
  }
  if (dtype == kFloat16) {
    fp16 h = to_fp16(float(v));
    memcpy(&m[i * 2], &h, 2);
  }
}

static double get(const std::vector<char>& m, Dtype dtype, int64_t i) {
  double d;
  float f;
  bf16 b;
  fp16 h;
  if (dtype == kFloat64) {
    memcpy(&d, &m[i * 8], 8);
    return d;
  }
  if (dtype == kFloat32) {
    memcpy(&f, &m[i * 4], 4);
    return f;
  }
  if (dtype == kBFloat16) {
    memcpy(&b, &m[i * 2], 2);
    return to_float(b);
  }
  memcpy(&h, &m[i * 2], 2);
  return to_float(h);
}

static std::vector<char> random(Dtype dtype, int64_t n) {
  std::vector<char> m(n * dtype_size(dtype));
  for (int64_t i = 0; i < n; i++) put(m, dtype, i, uniform());
  return m;
}

// rows - (rows V) C V^T, C = T^T or T.
static std::vector<double> rotated(const std::vector<char>& rows, Dtype dtype, const std::vector<char>& V,
                                   Dtype V_dtype, const std::vector<double>& T, bool transposed, int64_t M, int64_t K,
                                   int r) {
  std::vector<double> out(M * K), P(r), S(r);
  for (int64_t i = 0; i < M; i++) {
    for (int j = 0; j < r; j++) {
      P[j] = 0;
      for (int64_t k = 0; k < K; k++) P[j] += get(rows, dtype, i * K + k) * get(V, V_dtype, k * r + j);
    }
    for (int j = 0; j < r; j++) {
      S[j] = 0;
      for (int l = 0; l < r; l++) S[j] += P[l] * (transposed ? T[j * r + l] : T[l * r + j]);
    }
    for (int64_t k = 0; k < K; k++) {
      out[i * K + k] = get(rows, dtype, i * K + k);
      for (int j = 0; j < r; j++) out[i * K + k] -= S[j] * get(V, V_dtype, k * r + j);
    }
  }
  return out;
}

static void expect(const std::vector<char>& actual, Dtype dtype, const std::vector<double>& exact, const char* what,
                   const char* level, int64_t M, int64_t K, int r) {
  const double limits[] = {1e-12, 2e-6, 0x1p-7, 0x1p-10};
  double error = 0, norm = 1e-300;
  for (size_t i = 0; i < exact.size(); i++) {
    double d = get(actual, dtype, int64_t(i)) - exact[i];
    error += d * d;
    norm += exact[i] * exact[i];
  }
  // Negated, so that NaN fails.
  if (std::sqrt(error / norm) < limits[dtype]) return;
  printf("%s at %s, dtype %d, M %ld K %ld r %d: error %g\n", what, level, dtype, long(M), long(K), r,
         std::sqrt(error / norm));
  failures++;
}

static void check(Level level, Dtype dtype, int64_t M, int64_t K, int r) {
  const Kernels& kernels = kernels_of(level);
  Dtype V_dtype = dtype == kFloat64 ? kFloat64 : kFloat32;
  auto x = random(dtype, M * K), dz = random(dtype, M * K), V = random(V_dtype, K * r);
  std::vector<char> z(x.size()), dx(x.size()), P(M * r * dtype_size(V_dtype)), dV(V.size()), dP(P.size());
  std::vector<double> T(r * r), dT(r * r);
  Reflectors reflectors = {V.data(), V_dtype, K, r, r, 1};
  Rows x_rows = {x.data(), dtype, K}, dz_rows = {dz.data(), dtype, K};
  kernels.wy_factor(reflectors, T.data(), 2);
  kernels.rotate(x_rows, M, reflectors, T.data(), false, {z.data(), dtype, K}, P.data(), 2);
  kernels.rotate_backward(dz_rows, x_rows, M, P.data(), reflectors, T.data(), false, dx.data(), dV.data(), dT.data(),
                          2);
  expect(z, dtype, rotated(x, dtype, V, V_dtype, T, true, M, K, r), "rotate", kLevelNames[level], M, K, r);
  expect(dx, dtype, rotated(dz, dtype, V, V_dtype, T, false, M, K, r), "rotate_backward", kLevelNames[level], M, K, r);
  // For the sanitizers: their values are tested from Python.
  kernels.wy_factor_backward(dT.data(), reflectors, T.data(), dV.data(), 2);
  kernels.project(x_rows, M, reflectors, dP.data(), 2);
  kernels.project_backward(dP.data(), x_rows, M, reflectors, dx.data(), dV.data(), 2);
  kernels.penalty_backward(kernels.penalty(reflectors, true, 2), reflectors, false, dV.data(), 2);
  if (dtype != kBFloat16 && dtype != kFloat16) return;
  int64_t N = 37, width = K + (3 * r + 31) / 32 * 32;
  auto W = random(dtype, N * K), bias = random(dtype, N);
  std::vector<char> xs(M * width * 2), ws(N * width * 2), y(M * N * 2);
  Rows W_rows = {W.data(), dtype, K};
  kernels.pack_linear(x_rows, M, W_rows, N, reflectors, T.data(), {xs.data(), dtype, width}, {ws.data(), dtype, width},
                      P.data(), 2);
  kernels.linear_few_rows(x_rows, M, W_rows, N, bias.data(), reflectors, T.data(), {y.data(), dtype, N}, P.data(), 2);
}

int main() {
  const int64_t shapes[][3] = {{0, 33, 2},   {1, 1, 1},    {3, 123, 7},   {17, 64, 8},
                               {33, 96, 31}, {70, 160, 9}, {33, 129, 128}};
  for (int level = kPortable; level <= best_level(); level++)
    for (int dtype = kFloat64; dtype <= kFloat16; dtype++)
      for (const auto& s : shapes) check(Level(level), Dtype(dtype), s[0], s[1], int(s[2]));
  printf("%d levels, %d failures\n", best_level() + 1, failures);
  return failures != 0;
}
