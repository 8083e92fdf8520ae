// What one warp does with one instruction of sm_80: asynchronous copies, matrix loads, tensor-core products; and how
// float32 operands are split so that products in tf32 keep float32 accuracy.
//
// A fragment's lane is (g, t) = (lane / 4, lane % 4). Products contract over an index whose order is free, as long as
// both operands use one order: the kernels pick the one in which operands load without bank conflicts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace peftkern::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies `bytes` of 16 (of 4) and fills the rest with zeros; nothing is read when bytes is 0.
__device__ inline void copy_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void copy_async_4(void* to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 8] b [8, 8]: a = (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b = (t, g), (t + 4, g);
// c = (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). The sum is cut towards zero, so chains must stay short.
__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c [8, 8] += a [8, 4] b [4, 8] in IEEE float64: a = (g, t), b = (t, g), c = (g, 2t), (g, 2t + 1).
__device__ inline void mma_f64(double (&c)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}

// v = high + low to 2^-22 of v: the products high high + high low + low high keep float32 accuracy. The low part is
// rounded by an addition, since the tensor core drops what tf32 does not hold; the high part must keep a NaN a NaN. An
// operand that serves many products rounds its high part as well (6 instructions), one that serves few cuts it (3).
__device__ inline void split_tf32(float v, uint32_t& high, uint32_t& low) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(v));
  low = __float_as_uint(v - __uint_as_float(high)) + 0x1000u;
}
__device__ inline void cut_tf32(float v, uint32_t& high, uint32_t& low) {
  high = __float_as_uint(v) & 0xffffe000u;
  low = __float_as_uint(v - __uint_as_float(high)) + 0x1000u;
}

// The two numbers of a register of packed half-precision numbers as float32, which is exact in tf32.
__device__ inline void unpack(uint32_t pair, float (&v)[2], bf16) {
  v[0] = __uint_as_float(pair << 16);
  v[1] = __uint_as_float(pair & 0xffff0000u);
}
__device__ inline void unpack(uint32_t pair, float (&v)[2], fp16) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  v[0] = both.x;
  v[1] = both.y;
}
__device__ inline uint32_t pack(float low, float high, bf16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ inline uint32_t pack(float low, float high, fp16) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

}  // namespace peftkern::cuda
