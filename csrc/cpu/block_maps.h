// The small blocks themselves: polynomials of packed skew matrices, the Cayley map, and their gradients.
// Compiled once per instruction set; one block at a time and thread, products by block_tiles.h, or, for the Cayley map
// of small blocks, a block in each lane of a vector.
// The polynomial runs in its dtype; the Cayley map in fp64: I + A has a positive definite symmetric part, so every
// pivot is at least 1 and Gauss-Jordan needs no exchange of rows.
#pragma once

#include "block_rotate.h"

namespace peftkern {
namespace PEFTKERN_ISA {

inline int64_t packed_size(int b) { return int64_t(b) * (b - 1) / 2; }

// A [b][bp] from packed numbers or from the skew part of a block; padding zero.
template <class C, class D>
void read_skew(const SmallBatch& batch, int64_t j, D* A, int64_t bp) {
  int b = batch.b;
  const C* src = static_cast<const C*>(batch.data) + j * (batch.packed ? packed_size(b) : int64_t(b) * b);
  memset(A, 0, b * bp * sizeof(D));
  for (int i = 0; i < b; i++)
    for (int c = i + 1; c < b; c++) {
      D a = batch.packed ? D(*src++) : (D(src[i * b + c]) - D(src[c * b + i])) / 2;
      A[i * bp + c] = a;
      A[c * bp + i] = -a;
    }
}

// The gradient of the entries above the diagonal, packed, or of the block B whose skew part A is.
template <class C, class D>
void write_skew_gradient(const D* dA, int64_t bp, int b, bool packed, int64_t j, C* out) {
  out += j * (packed ? packed_size(b) : int64_t(b) * b);
  for (int i = 0; i < b; i++)
    for (int c = packed ? i + 1 : 0; c < b; c++) {
      D d = dA[i * bp + c] - dA[c * bp + i];
      *out++ = C(packed ? d : d / 2);
    }
}

// Calls work(j, scratch) for every block, scratch holding `count` matrices [b][bp] of D.
template <class D, class Work>
void for_blocks(int64_t S, int b, int count, int threads, Work work) {
  int64_t bp = round_up(b, Vec<D>::W), size = b * bp;
  threads = useful_threads(threads, S, S * size * b);
  Buffer<D> scratch(threads * count * size);
#pragma omp parallel num_threads(threads)
  {
    D* own = scratch.data() + thread_index() * count * size;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < S; j++) work(j, own, bp, size);
  }
}

template <class C>
Columns<const C> whole(const C* A, int64_t bp, int b) {
  return {A, A + b, bp, b};
}

template <class C>
void add_identity(C* X, int64_t bp, int b, C c) {
  for (int i = 0; i < b; i++) X[i * bp + i] += c;
}

// X = c_k I + A X', the step of Horner's rule; X' [b][bp].
template <class C>
void horner_step(const C* A, const C* next, C c, int b, int64_t bp, C* X) {
  multiply_block(whole(A, bp, b), b, b, next, bp, X, bp);
  add_identity(X, bp, b, c);
}

// X_(d-1) = c_(d-1) I + c_d A, the first step.
template <class C>
void horner_start(const C* A, const double* c, int d, int b, int64_t bp, C* X) {
  for (int64_t i = 0; i < b * bp; i++) X[i] = C(c[d]) * A[i];
  add_identity(X, bp, b, C(c[d - 1]));
}

template <class C>
void write_block(const C* X, int64_t bp, int b, C* out) {
  for (int i = 0; i < b; i++) memcpy(out + i * b, X + i * bp, b * sizeof(C));
}

template <class C>
void polynomial(const SmallBatch& q, const double* c, int count, C* R, int threads) {
  int b = q.b, d = count - 1;
  for_blocks<C>(q.S, b, 3, threads, [&](int64_t j, C* A, int64_t bp, int64_t size) {
    C *X = A + size, *other = X + size;
    read_skew<C>(q, j, A, bp);
    memset(X, 0, size * sizeof(C));
    if (d == 0) add_identity(X, bp, b, C(c[0]));
    if (d > 0) horner_start(A, c, d, b, bp, X);
    for (int k = d - 2; k >= 0; k--) {
      horner_step(A, X, C(c[k]), b, bp, other);
      C* swap = X;
      X = other;
      other = swap;
    }
    write_block(X, bp, b, R + j * b * b);
  });
}

// dQ = sum over i, j of c_(i+j+1) N^i dR N^j with N = Q^T = -Q: Y_i = N^i dR, then Horner's rule in N from the right on
// Z_j = sum_i c_(i+j+1) Y_i.
template <class C>
void polynomial_backward(const C* dR, const SmallBatch& q, const double* c, int count, C* dq, int threads) {
  int b = q.b, d = count - 1;
  for_blocks<C>(q.S, b, 3 + (d > 0 ? d : 1), threads, [&](int64_t j, C* N, int64_t bp, int64_t size) {
    using V = Vec<C>;
    C *sum = N + size, *other = sum + size, *Y = other + size;
    read_skew<C>(q, j, N, bp);
    for (int64_t i = 0; i < size; i++) N[i] = -N[i];
    memset(sum, 0, 3 * size * sizeof(C));
    for (int i = 0; i < b; i++) memcpy(Y + i * bp, dR + (j * b + i) * b, b * sizeof(C));
    for (int i = 1; i < d; i++) multiply_block(whole<C>(N, bp, b), b, b, Y + (i - 1) * size, bp, Y + i * size, bp);
    for (int k = d - 1; k >= 0; k--) {
      if (k < d - 1) multiply_block(whole<C>(sum, bp, b), b, b, N, bp, other, bp);
      for (int64_t e = 0; e < size; e += V::W) {
        typename V::type z = V::load(other + e);
        for (int i = 0; i + k < d; i++) z += V::splat(C(c[i + k + 1])) * V::load(Y + i * size + e);
        V::store(sum + e, z);
      }
    }
    write_skew_gradient(sum, bp, b, true, j, dq);
  });
}

// X [b][bp] -> X^-1 in place by Gauss-Jordan, for a matrix whose symmetric part is at least I.
inline void invert_in_place(double* X, int b, int64_t bp) {
  using V = Vec<double>;
  for (int k = 0; k < b; k++) {
    double* pivot_row = X + k * bp;
    double inverse = 1 / pivot_row[k];
    pivot_row[k] = 1;
    for (int64_t c = 0; c < bp; c += V::W) V::store(pivot_row + c, V::load(pivot_row + c) * V::splat(inverse));
    for (int i = 0; i < b; i++) {
      if (i == k) continue;
      double* row = X + i * bp;
      V::type factor = V::splat(row[k]);
      row[k] = 0;
      for (int64_t c = 0; c < bp; c += V::W) V::store(row + c, V::load(row + c) - factor * V::load(pivot_row + c));
    }
  }
}

// Small blocks side by side, one in each lane of a vector: X [b][b] of vectors -> X^-1.
inline void invert_lanes(double* X, int b) {
  using V = Vec<double>;
  constexpr int W = V::W;
  for (int k = 0; k < b; k++) {
    double* pivot_row = X + k * b * W;
    V::type inverse = 1 / V::load(pivot_row + k * W);
    V::store(pivot_row + k * W, V::splat(1));
    for (int c = 0; c < b; c++) V::store(pivot_row + c * W, V::load(pivot_row + c * W) * inverse);
    for (int i = 0; i < b; i++) {
      if (i == k) continue;
      double* row = X + i * b * W;
      V::type factor = V::load(row + k * W);
      V::store(row + k * W, V::type{});
      for (int c = 0; c < b; c++) V::store(row + c * W, V::load(row + c * W) - factor * V::load(pivot_row + c * W));
    }
  }
}

constexpr int kLaneBlock = 16;  // blocks up to here are side by side in vectors

// R = 2 (I + A)^-1 - I for blocks j0 to j0 + lanes - 1.
template <class C>
void cayley_lanes(const SmallBatch& a, int64_t j0, int lanes, C* R) {
  using V = Vec<double>;
  constexpr int W = V::W;
  int b = a.b;
  alignas(64) double X[kLaneBlock * kLaneBlock * W];
  int64_t stride = a.packed ? packed_size(b) : int64_t(b) * b;
  const C* src = static_cast<const C*>(a.data) + j0 * stride;
  // Lanes without a block hold I.
  for (int i = 0, packed = 0; i < b; i++) {
    V::store(X + i * (b + 1) * W, V::splat(1));
    for (int c = i + 1; c < b; c++, packed++) {
      double *upper = X + (i * b + c) * W, *lower = X + (c * b + i) * W;
      for (int l = 0; l < W; l++) upper[l] = 0;
      for (int l = 0; l < lanes; l++) {
        const C* block = src + l * stride;
        upper[l] = a.packed ? double(block[packed]) : (double(block[i * b + c]) - double(block[c * b + i])) / 2;
      }
      V::store(lower, -V::load(upper));
    }
  }
  invert_lanes(X, b);
  for (int l = 0; l < lanes; l++) {
    C* out = R + (j0 + l) * b * b;
    for (int i = 0; i < b; i++)
      for (int c = 0; c < b; c++) *out++ = C(2 * X[(i * b + c) * W + l] - (i == c));
  }
}

// R = 2 (I + A)^-1 - I.
template <class C>
void cayley(const SmallBatch& a, C* R, int threads) {
  int b = a.b;
  if (b <= kLaneBlock) {
    constexpr int W = Vec<double>::W;
    int64_t groups = ceil_div(a.S, W);
    threads = useful_threads(threads, groups, a.S * b * b * b);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t g = 0; g < groups; g++) cayley_lanes(a, g * W, min_int(W, a.S - g * W), R);
    return;
  }
  for_blocks<double>(a.S, b, 1, threads, [&](int64_t j, double* X, int64_t bp, int64_t) {
    read_skew<C>(a, j, X, bp);
    add_identity(X, bp, b, 1.0);
    invert_in_place(X, b, bp);
    C* out = R + j * b * b;
    for (int i = 0; i < b; i++)
      for (int c = 0; c < b; c++) *out++ = C(2 * X[i * bp + c] - (i == c));
  });
}

// dA = -S dR S / 2 with S = (I + R)^T.
template <class C>
void cayley_backward(const C* dR, const SmallBatch& R, bool packed, C* out, int threads) {
  int b = R.b;
  for_blocks<double>(R.S, b, 3, threads, [&](int64_t j, double* S, int64_t bp, int64_t size) {
    double *G = S + size, *product = G + size;
    const C *blocks = static_cast<const C*>(R.data) + j * b * b, *incoming = dR + j * b * b;
    memset(S, 0, 2 * size * sizeof(double));
    for (int i = 0; i < b; i++)
      for (int c = 0; c < b; c++) {
        S[i * bp + c] = double(blocks[c * b + i]) + (i == c);
        G[i * bp + c] = double(incoming[i * b + c]) / -2;
      }
    multiply_block(whole<double>(S, bp, b), b, b, G, bp, product, bp);
    multiply_block(whole<double>(product, bp, b), b, b, S, bp, G, bp);
    write_skew_gradient(G, bp, b, packed, j, out);
  });
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
