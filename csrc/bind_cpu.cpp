// peftkern._native_cpu: pointers, sizes and strides in; results written through the pointers.
// `level` names the instruction set (0 portable, 1 avx2, 2 avx512, 3 amx), `threads` is torch's number; the GIL is
// released. Shapes and formulas: cpu/householder.h. The caller has checked shapes and dtypes and allocated the outputs.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace peftkern;
using Pointer = uintptr_t;

static void* raw(Pointer p) { return reinterpret_cast<void*>(p); }
static const double* doubles(Pointer p) { return reinterpret_cast<const double*>(p); }

static Rows rows(Pointer data, int dtype, int64_t stride) { return {raw(data), Dtype(dtype), stride}; }

static Reflectors reflectors(Pointer V, int dtype, int64_t K, int r, int64_t stride_k, int64_t stride_r) {
  if (r < 1 || r > kMaxRank || K < 1) throw std::invalid_argument("V must be [K, r] with K >= 1 and 1 <= r <= 128");
  return {raw(V), Dtype(dtype), K, r, stride_k, stride_r};
}

static const Kernels& kernels(int level) {
  if (level < kPortable || level > best_level())
    throw std::invalid_argument("this processor lacks that instruction set");
  return kernels_of(Level(level));
}

// The five facts of V, in the order in which Python passes them.
#define V_ARGS Pointer V, int V_dtype, int64_t K, int r, int64_t stride_k, int64_t stride_r
#define V_VALUE reflectors(V, V_dtype, K, r, stride_k, stride_r)

static void bind_factor(py::module_& m) {
  m.def("wy_factor", [](int level, int threads, V_ARGS, Pointer T) {
    py::gil_scoped_release unlocked;
    kernels(level).wy_factor(V_VALUE, static_cast<double*>(raw(T)), threads);
  });
  m.def("wy_factor_backward", [](int level, int threads, Pointer dT, V_ARGS, Pointer T, Pointer dV) {
    py::gil_scoped_release unlocked;
    kernels(level).wy_factor_backward(doubles(dT), V_VALUE, doubles(T), raw(dV), threads);
  });
  m.def("orthonormal_factor", [](int level, int threads, V_ARGS, Pointer Q, Pointer T, Pointer B) {
    py::gil_scoped_release unlocked;
    kernels(level).orthonormal_factor(V_VALUE, raw(Q), static_cast<double*>(raw(T)), static_cast<double*>(raw(B)),
                                      threads);
  });
  m.def("orthonormal_factor_backward",
        [](int level, int threads, V_ARGS, Pointer dT, Pointer Q, Pointer B, Pointer dV) {
          py::gil_scoped_release unlocked;
          kernels(level).orthonormal_factor_backward(V_VALUE, doubles(dT), reflectors(Q, V_dtype, K, r, r, 1),
                                                     doubles(B), raw(dV), threads);
        });
  m.def("orthogonality_penalty", [](int level, int threads, V_ARGS, bool squared) {
    py::gil_scoped_release unlocked;
    return kernels(level).penalty(V_VALUE, squared, threads);
  });
  m.def("orthogonality_penalty_backward", [](int level, int threads, double grad, V_ARGS, bool squared, Pointer dV) {
    py::gil_scoped_release unlocked;
    kernels(level).penalty_backward(grad, V_VALUE, squared, raw(dV), threads);
  });
}

static void bind_rotate(py::module_& m) {
  m.def("project", [](int level, int threads, Pointer x, int dtype, int64_t M, int64_t x_stride, V_ARGS, Pointer P) {
    py::gil_scoped_release unlocked;
    kernels(level).project(rows(x, dtype, x_stride), M, V_VALUE, raw(P), threads);
  });
  m.def("project_backward", [](int level, int threads, Pointer dP, Pointer x, int dtype, int64_t M, int64_t x_stride,
                               V_ARGS, Pointer dx, Pointer dV) {
    py::gil_scoped_release unlocked;
    kernels(level).project_backward(raw(dP), rows(x, dtype, x_stride), M, V_VALUE, raw(dx), raw(dV), threads);
  });
  m.def("rotate", [](int level, int threads, Pointer x, int dtype, int64_t M, int64_t x_stride, V_ARGS, Pointer T,
                     bool reverse, Pointer z, Pointer P) {
    py::gil_scoped_release unlocked;
    kernels(level).rotate(rows(x, dtype, x_stride), M, V_VALUE, doubles(T), reverse, rows(z, dtype, K), raw(P),
                          threads);
  });
  m.def("rotate_backward",
        [](int level, int threads, Pointer dz, int64_t dz_stride, Pointer x, int dtype, int64_t M, int64_t x_stride,
           Pointer P, V_ARGS, Pointer T, bool reverse, Pointer dx, Pointer dV, Pointer dT) {
          py::gil_scoped_release unlocked;
          kernels(level).rotate_backward(rows(dz, dtype, dz_stride), rows(x, dtype, x_stride), M, raw(P), V_VALUE,
                                         doubles(T), reverse, raw(dx), raw(dV), static_cast<double*>(raw(dT)), threads);
        });
}

static void bind_exact(py::module_& m) {
  m.def("linear_update", [](int level, int threads, Pointer x, int dtype, int64_t M, int64_t x_stride, Pointer W,
                            int64_t N, int64_t W_stride, V_ARGS, Pointer T, Pointer u, Pointer P, Pointer B) {
    py::gil_scoped_release unlocked;
    kernels(level).linear_update(rows(x, dtype, x_stride), M, rows(W, dtype, W_stride), N, V_VALUE, doubles(T),
                                 rows(u, dtype, N), raw(P), raw(B), threads);
  });
  m.def("linear_few_rows", [](int level, int threads, Pointer x, int dtype, int64_t M, int64_t x_stride, Pointer W,
                              int64_t N, int64_t W_stride, Pointer bias, V_ARGS, Pointer T, Pointer y, Pointer P) {
    py::gil_scoped_release unlocked;
    kernels(level).linear_few_rows(rows(x, dtype, x_stride), M, rows(W, dtype, W_stride), N, raw(bias), V_VALUE,
                                   doubles(T), rows(y, dtype, N), raw(P), threads);
  });
  m.def(
      "generate",
      [](int level, int threads, Pointer u, Pointer kept, int64_t bytes, Pointer x, int dtype, int64_t M,
         int64_t x_stride, Pointer W, int64_t N, int64_t W_stride, Pointer bias, V_ARGS, Pointer T, Pointer y) {
        py::gil_scoped_release unlocked;
        if (bytes && std::memcmp(raw(u), raw(kept), size_t(bytes))) return false;
        std::vector<float> P(M * r);
        kernels(level).linear_few_rows(rows(x, dtype, x_stride), M, rows(W, dtype, W_stride), N, raw(bias), V_VALUE,
                                       doubles(T), rows(y, dtype, N), P.data(), threads);
        return true;
      },
      "linear_few_rows where the bytes of u are those kept; false and nothing written where they are not.");
}

static void bind_exact_backward(py::module_& m) {
  m.def("linear_backward", [](int level, int threads, Pointer dy, int64_t dy_stride, Pointer x, int dtype, int64_t M,
                              int64_t x_stride, Pointer W, int64_t N, int64_t W_stride, Pointer P, Pointer B, V_ARGS,
                              Pointer T, Pointer update, Pointer dV, Pointer dT) {
    py::gil_scoped_release unlocked;
    kernels(level).linear_backward(rows(dy, dtype, dy_stride), rows(x, dtype, x_stride), M, rows(W, dtype, W_stride), N,
                                   raw(P), raw(B), V_VALUE, doubles(T), raw(update), raw(dV),
                                   static_cast<double*>(raw(dT)), threads);
  });
}

// block_rotation and butterfly; shapes and formulas: cpu/blocks.h.

static Blocks blocks(Pointer R, int dtype, int64_t K, int f, int64_t stored, int b) {
  if (b < 1 || b > kMaxBlock || f < 1 || f > 48 || K % (int64_t(b) << (f - 1)) || (stored != K / b && stored != 1))
    throw std::invalid_argument("R must be [f, K/b or 1, b, b] with b <= 256 and K a multiple of b 2^(f-1)");
  return {raw(R), Dtype(dtype), K, f, stored, b};
}

static const BlockKernels& block_kernels(int level) {
  kernels(level);
  return block_kernels_of(Level(level));
}

static SmallBatch small_batch(Pointer data, int dtype, int64_t S, int b, bool packed) {
  if (b < 1 || b > kMaxBlock) throw std::invalid_argument("blocks must have 1 to 256 columns");
  return {raw(data), Dtype(dtype), S, b, packed};
}

#define R_ARGS Pointer R, int R_dtype, int64_t K, int f, int64_t stored, int b
#define R_VALUE blocks(R, R_dtype, K, f, stored, b)

static void bind_blocks(py::module_& m) {
  m.attr("MAX_BLOCK") = int(kMaxBlock);
  m.def("rotate_blocks", [](int level, int threads, Pointer x, int x_dtype, int64_t M, int64_t x_stride, R_ARGS,
                            bool transpose, Pointer z, Pointer rest, int z_dtype) {
    py::gil_scoped_release unlocked;
    block_kernels(level).rotate(rows(x, x_dtype, x_stride), M, R_VALUE, transpose, rows(z, z_dtype, K),
                                rows(rest, z_dtype, K), threads);
  });
  m.def("rotate_blocks_backward", [](int level, int threads, Pointer dz, int64_t dz_stride, Pointer x, int dtype,
                                     int64_t M, int64_t x_stride, R_ARGS, bool transpose, Pointer dx, Pointer dR) {
    py::gil_scoped_release unlocked;
    block_kernels(level).rotate_backward(rows(dz, dtype, dz_stride), rows(x, dtype, x_stride), M, R_VALUE, transpose,
                                         raw(dx), raw(dR), threads);
  });
  m.def("skew_polynomial",
        [](int level, int threads, Pointer q, int dtype, int64_t S, int b, const std::vector<double>& c, Pointer R) {
          py::gil_scoped_release unlocked;
          block_kernels(level).polynomial(small_batch(q, dtype, S, b, true), c.data(), int(c.size()), raw(R), threads);
        });
  m.def("skew_polynomial_backward", [](int level, int threads, Pointer dR, Pointer q, int dtype, int64_t S, int b,
                                       const std::vector<double>& c, Pointer dq) {
    py::gil_scoped_release unlocked;
    block_kernels(level).polynomial_backward(raw(dR), small_batch(q, dtype, S, b, true), c.data(), int(c.size()),
                                             raw(dq), threads);
  });
  m.def("cayley", [](int level, int threads, Pointer a, int dtype, int64_t S, int b, bool packed, Pointer R) {
    py::gil_scoped_release unlocked;
    block_kernels(level).cayley(small_batch(a, dtype, S, b, packed), raw(R), threads);
  });
  m.def("cayley_backward",
        [](int level, int threads, Pointer dR, Pointer R, int dtype, int64_t S, int b, bool packed, Pointer out) {
          py::gil_scoped_release unlocked;
          block_kernels(level).cayley_backward(raw(dR), small_batch(R, dtype, S, b, false), packed, raw(out), threads);
        });
  m.def("scale_outputs", [](int level, int threads, Pointer y, int dtype, int64_t M, int64_t y_stride, int64_t N,
                            Pointer s, Pointer bias, Pointer out) {
    py::gil_scoped_release unlocked;
    block_kernels(level).scale(rows(y, dtype, y_stride), M, N, raw(s), raw(bias), raw(out), threads);
  });
  m.def("scale_outputs_backward",
        [](int level, int threads, Pointer dy, int64_t dy_stride, Pointer y, int dtype, int64_t M, int64_t y_stride,
           int64_t N, Pointer s, Pointer bias, Pointer dy0, Pointer ds) {
          py::gil_scoped_release unlocked;
          block_kernels(level).scale_backward(rows(dy, dtype, dy_stride), rows(y, dtype, y_stride), M, N, raw(s),
                                              raw(bias), raw(dy0), raw(ds), threads);
        });
}

PYBIND11_MODULE(_native_cpu, m) {
  m.attr("MAX_RANK") = int(kMaxRank);
  m.def("best_level", [] { return int(best_level()); }, "Highest level of instruction set that this processor has.");
  m.def("level_names", [] { return py::make_tuple("portable", "avx2", "avx512", "amx"); });
  m.def(
      "features",
      [] {
        py::dict out;
        for (const Feature& feature : processor_features()) out[feature.name] = feature.present;
        return out;
      },
      "Name to bool: what the kernels ask of the processor and the operating system.");
  bind_factor(m);
  bind_rotate(m);
  bind_exact(m);
  bind_exact_backward(m);
  bind_blocks(m);
}
