// Self-check of the CPU kernels without Python, made to be built with -fsanitize=address,undefined: exact-size heap
// buffers, so that a read or write one element too far is caught; every instruction set that this processor has.
// Against plain loops in fp64: rotate z = x - P C V^T, rotate_backward dx = dz - Q C^T V^T, C = T^T; linear_update
// u = (z - x) W^T; linear_backward dV = -dz^T S - x^T R for dz = dy W, S = P C, R = dz V C^T; orthonormal_factor.

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

using Matrix = std::vector<double>;

static Matrix widened(const std::vector<char>& m, Dtype dtype) {
  Matrix out(m.size() / dtype_size(dtype));
  for (size_t i = 0; i < out.size(); i++) out[i] = get(m, dtype, int64_t(i));
  return out;
}

// A B for row-major A [M][K], B [K][N]; a transposed operand is stored as [K][M] or [N][K].
static Matrix product(const Matrix& A, const Matrix& B, int64_t M, int64_t K, int64_t N, bool transpose_A = false,
                      bool transpose_B = false) {
  Matrix out(M * N);
  for (int64_t i = 0; i < M; i++)
    for (int64_t k = 0; k < K; k++) {
      double a = transpose_A ? A[k * M + i] : A[i * K + k];
      for (int64_t j = 0; j < N; j++) out[i * N + j] += a * (transpose_B ? B[j * K + k] : B[k * N + j]);
    }
  return out;
}

static Matrix minus(Matrix a, const Matrix& b) {
  for (size_t i = 0; i < a.size(); i++) a[i] -= b[i];
  return a;
}

// S = (rows V) C with C = T^T or T.
static Matrix coefficients(const Matrix& rows, const Matrix& V, const Matrix& T, bool transposed, int64_t M, int64_t K,
                           int r) {
  return product(product(rows, V, M, K, r), T, M, r, r, false, transposed);
}

static Matrix rotated(const Matrix& rows, const Matrix& V, const Matrix& T, bool transposed, int64_t M, int64_t K,
                      int r) {
  return minus(rows, product(coefficients(rows, V, T, transposed, M, K, r), V, M, r, K, false, true));
}

static void expect(const Matrix& actual, const Matrix& exact, double limit, const char* what, const char* level,
                   Dtype dtype, int64_t M, int64_t K, int r) {
  double error = 0, norm = 1e-300;
  for (size_t i = 0; i < exact.size(); i++) {
    double d = actual[i] - exact[i];
    error += d * d;
    norm += exact[i] * exact[i];
  }
  // Negated, so that NaN fails.
  if (std::sqrt(error / norm) < limit) return;
  printf("%s at %s, dtype %d, M %ld K %ld r %d: error %g\n", what, level, dtype, long(M), long(K), r,
         std::sqrt(error / norm));
  failures++;
}

static const double kRounding[] = {1e-12, 2e-6, 0x1p-7, 0x1p-10};

// The exact precision, with one weight for the forward and the backward.
static void check_linear(Level level, const std::vector<char>& x, Dtype dtype, const Reflectors& V, const Matrix& T,
                         const Matrix& exact_z, int64_t M, int64_t N) {
  const Kernels& kernels = kernels_of(level);
  const char* name = kLevelNames[level];
  int r = V.r;
  int64_t K = V.K;
  auto W = random(dtype, N * K), bias = random(dtype, N), dy = random(dtype, M * N);
  std::vector<char> u(M * N * 2), y(M * N * 2), P(M * r * 4), B(N * r * 4), update(M * K * 2), dV(K * r * 4);
  const char* V_bytes = static_cast<const char*>(V.data);
  Matrix wide_x = widened(x, dtype), wide_W = widened(W, dtype);
  Matrix wide_V = widened({V_bytes, V_bytes + K * r * 4}, kFloat32), dT(r * r);
  Rows x_rows = {const_cast<char*>(x.data()), dtype, K}, W_rows = {W.data(), dtype, K}, dy_rows = {dy.data(), dtype, N};
  kernels.linear_few_rows(x_rows, M, W_rows, N, bias.data(), V, T.data(), {y.data(), dtype, N}, P.data(), 2);
  kernels.linear_update(x_rows, M, W_rows, N, V, T.data(), {u.data(), dtype, N}, P.data(), B.data(), 2);
  Matrix exact_y = product(exact_z, wide_W, M, K, N, false, true);
  Matrix exact_u = minus(exact_y, product(wide_x, wide_W, M, K, N, false, true));
  expect(widened(u, dtype), exact_u, kRounding[dtype], "linear_update", name, dtype, M, K, r);
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < N; j++) exact_y[i * N + j] += get(bias, dtype, j);
  expect(widened(y, dtype), exact_y, kRounding[dtype], "linear_few_rows", name, dtype, M, K, r);

  Matrix exact_dz = product(widened(dy, dtype), wide_W, M, N, K);
  Matrix exact_update = minus(rotated(exact_dz, wide_V, T, false, M, K, r), exact_dz);
  Matrix R = coefficients(exact_dz, wide_V, T, false, M, K, r);
  Matrix S = coefficients(wide_x, wide_V, T, true, M, K, r), exact_dV = product(exact_dz, S, K, M, r, true);
  exact_dV = minus(minus(Matrix(K * r), exact_dV), product(wide_x, R, K, M, r, true));
  Matrix Q = product(exact_dz, wide_V, M, K, r), exact_P = product(wide_x, wide_V, M, K, r);
  Matrix exact_dT = minus(Matrix(r * r), product(Q, exact_P, r, M, r, true));
  const bool masks[][2] = {{true, true}, {true, false}, {false, true}};
  for (const auto& mask : masks) {
    kernels.linear_backward(dy_rows, x_rows, M, W_rows, N, P.data(), B.data(), V, T.data(),
                            mask[0] ? update.data() : nullptr, mask[1] ? dV.data() : nullptr,
                            mask[1] ? dT.data() : nullptr, 2);
    if (mask[0])
      expect(widened(update, dtype), exact_update, kRounding[dtype], "linear_backward dx", name, dtype, M, K, r);
    if (!mask[1]) continue;
    expect(widened(dV, kFloat32), exact_dV, kRounding[kFloat32], "linear_backward dV", name, dtype, M, K, r);
    expect(dT, exact_dT, kRounding[kFloat32], "linear_backward dT", name, dtype, M, K, r);
  }
}

// Q = V B with Q^T Q = I and B upper triangular, T = 2 I; dV = (dQ - 2 Q (dT + dT^T)) B^T.
static void check_gram_schmidt(Level level, const Reflectors& V, const std::vector<char>& dQ) {
  const char* name = kLevelNames[level];
  int r = V.r;
  int64_t K = V.K;
  const char* bytes = static_cast<const char*>(V.data);
  std::vector<char> Q(dQ.size()), dV(dQ.size());
  Matrix T(r * r), B(r * r), dT(r * r), eye(r * r), N(r * r);
  for (int i = 0; i < r; i++) eye[i * r + i] = 1;
  for (double& t : dT) t = uniform();
  for (int i = 0; i < r; i++)
    for (int j = 0; j < r; j++) N[i * r + j] = 2 * (dT[i * r + j] + dT[j * r + i]);
  kernels_of(level).orthonormal_factor(V, Q.data(), T.data(), B.data(), 2);
  Reflectors dQ_columns = {dQ.data(), V.dtype, K, r, r, 1}, Q_columns = {Q.data(), V.dtype, K, r, r, 1};
  kernels_of(level).orthonormal_factor_backward(dQ_columns, dT.data(), Q_columns, B.data(), dV.data(), 2);
  Matrix wide_Q = widened(Q, V.dtype), G = product(wide_Q, wide_Q, r, K, r, true);
  Matrix upper = B;
  for (int i = 0; i < r; i++)
    for (int j = 0; j < i; j++) upper[i * r + j] = 0;
  double limit = kRounding[V.dtype];
  expect(B, upper, 1e-300, "orthonormal_factor B", name, V.dtype, 0, K, r);
  expect(product(widened({bytes, bytes + dQ.size()}, V.dtype), B, K, r, r), wide_Q, limit, "orthonormal_factor V B",
         name, V.dtype, 0, K, r);
  expect(G, eye, limit, "orthonormal_factor Q", name, V.dtype, 0, K, r);
  for (double& t : T) t /= 2;
  expect(T, eye, 1e-300, "orthonormal_factor T", name, V.dtype, 0, K, r);
  Matrix exact = product(minus(widened(dQ, V.dtype), product(wide_Q, N, K, r, r)), B, K, r, r, false, true);
  expect(widened(dV, V.dtype), exact, limit, "orthonormal_factor_backward", name, V.dtype, 0, K, r);
}

static void check(Level level, Dtype dtype, int64_t M, int64_t K, int r, int64_t N) {
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
  const char* name = kLevelNames[level];
  Matrix wide_V = widened(V, V_dtype), wide_x = widened(x, dtype);
  Matrix exact_z = rotated(wide_x, wide_V, T, true, M, K, r);
  expect(widened(z, dtype), exact_z, kRounding[dtype], "rotate", name, dtype, M, K, r);
  expect(widened(dx, dtype), rotated(widened(dz, dtype), wide_V, T, false, M, K, r), kRounding[dtype],
         "rotate_backward", name, dtype, M, K, r);
  check_gram_schmidt(level, reflectors, V);
  // For the sanitizers: their values are tested from Python.
  kernels.wy_factor_backward(dT.data(), reflectors, T.data(), dV.data(), 2);
  kernels.project(x_rows, M, reflectors, dP.data(), 2);
  kernels.project_backward(dP.data(), x_rows, M, reflectors, dx.data(), dV.data(), 2);
  kernels.penalty_backward(kernels.penalty(reflectors, true, 2), reflectors, false, dV.data(), 2);
  if (dtype != kBFloat16 && dtype != kFloat16) return;
  check_linear(level, x, dtype, reflectors, T, exact_z, M, N);
}

int main() {
  const int64_t shapes[][4] = {{0, 33, 2, 5},    {1, 1, 1, 1},     {3, 123, 7, 37},    {17, 64, 8, 32},
                               {33, 96, 31, 37}, {70, 160, 9, 64}, {33, 129, 128, 17}, {33, 64, 32, 96}};
  for (int level = kPortable; level <= best_level(); level++)
    for (int dtype = kFloat64; dtype <= kFloat16; dtype++)
      for (const auto& s : shapes) check(Level(level), Dtype(dtype), s[0], s[1], int(s[2]), s[3]);
  printf("%d levels, %d failures\n", best_level() + 1, failures);
  return failures != 0;
}
