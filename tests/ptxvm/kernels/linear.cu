// Toy kernels of the kinds that the project writes: tiled fp32 product, bf16 tensor-core product, softmax.
#include <cuda_bf16.h>
#include <cstdint>

// C[M,N] = A[M,K] B[K,N] in 16 x 16 tiles, ragged edges masked.
extern "C" __global__ void sgemm(const float* A, const float* B, float* C, int M, int N, int K) {
  __shared__ float a[16][16], b[16][16];
  const int tx = threadIdx.x, ty = threadIdx.y, r = blockIdx.y * 16 + ty, c = blockIdx.x * 16 + tx;
  float acc = 0;
  for (int k0 = 0; k0 < K; k0 += 16) {
    a[ty][tx] = r < M && k0 + tx < K ? A[size_t(r) * K + k0 + tx] : 0.f;
    b[ty][tx] = k0 + ty < K && c < N ? B[size_t(k0 + ty) * N + c] : 0.f;
    __syncthreads();
    for (int k = 0; k < 16; k++) acc += a[ty][k] * b[k][tx];
    __syncthreads();
  }
  if (r < M && c < N) C[size_t(r) * N + c] = acc;
}

// Softmax of each row: one block per row, shuffles inside warps, shared memory between them.
extern "C" __global__ void softmax(const __nv_bfloat16* x, __nv_bfloat16* y, int n) {
  __shared__ float partial[32];
  const __nv_bfloat16* row = x + size_t(blockIdx.x) * n;
  const int t = threadIdx.x, warps = blockDim.x / 32;
  float m = -INFINITY;
  for (int i = t; i < n; i += blockDim.x) m = fmaxf(m, __bfloat162float(row[i]));
  for (int o = 16; o; o >>= 1) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, o));
  if (t % 32 == 0) partial[t / 32] = m;
  __syncthreads();
  m = partial[0];
  for (int i = 1; i < warps; i++) m = fmaxf(m, partial[i]);
  __syncthreads();
  float s = 0;
  for (int i = t; i < n; i += blockDim.x) s += __expf(__bfloat162float(row[i]) - m);
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
  if (t % 32 == 0) partial[t / 32] = s;
  __syncthreads();
  s = 0;
  for (int i = 0; i < warps; i++) s += partial[i];
  for (int i = t; i < n; i += blockDim.x)
    y[size_t(blockIdx.x) * n + i] = __float2bfloat16(__expf(__bfloat162float(row[i]) - m) / s);
}

__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
}
__device__ __forceinline__ void load_matrix4(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p)));
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C[M,N] = A[M,K] B[N,K]^T in bf16: 64 x 64 blocks of 4 warps, two stages of cp.async, M, N, K multiples of 64.
extern "C" __global__ void __launch_bounds__(128)
    hgemm(const __nv_bfloat16* A, const __nv_bfloat16* B, __nv_bfloat16* C, int M, int N, int K) {
  extern __shared__ __align__(128) unsigned char raw[];
  constexpr int T = 64, LD = T + 8;  // 8 more columns: ldmatrix without bank conflicts
  auto* sA = reinterpret_cast<__nv_bfloat16*>(raw);
  auto* sB = sA + 2 * T * LD;
  const int t = threadIdx.x, w = t >> 5, l = t & 31, m0 = blockIdx.x * T, n0 = blockIdx.y * T;
  float acc[T / 8][4] = {};
  auto fetch = [&](int stage, int k0) {
    for (int i = t; i < T * T / 8; i += 128) {
      const int r = i / (T / 8), c = i % (T / 8) * 8;
      copy16(&sA[(stage * T + r) * LD + c], A + size_t(m0 + r) * K + k0 + c);
      copy16(&sB[(stage * T + r) * LD + c], B + size_t(n0 + r) * K + k0 + c);
    }
    asm volatile("cp.async.commit_group;");
  };
  fetch(0, 0);
  for (int k = 0; k < K / T; k++) {
    if (k + 1 < K / T)
      fetch((k + 1) & 1, (k + 1) * T);
    else
      asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    const __nv_bfloat16 *a = sA + (k & 1) * T * LD, *b = sB + (k & 1) * T * LD;
    for (int kk = 0; kk < T; kk += 16) {
      uint32_t fa[4];
      load_matrix4(fa, &a[(w * 16 + (l & 15)) * LD + kk + (l >> 4) * 8]);
      for (int j = 0; j < T / 8; j += 2) {
        uint32_t fb[4];
        load_matrix4(fb, &b[(j * 8 + (l & 7) + (l >> 4) * 8) * LD + kk + ((l >> 3) & 1) * 8]);
        mma(acc[j], fa, fb[0], fb[1]);
        mma(acc[j + 1], fa, fb[2], fb[3]);
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < T / 8; j++) {
    const int r = m0 + w * 16 + (l >> 2), c = n0 + j * 8 + (l & 3) * 2;
    *reinterpret_cast<__nv_bfloat162*>(&C[size_t(r) * N + c]) = __floats2bfloat162_rn(acc[j][0], acc[j][1]);
    *reinterpret_cast<__nv_bfloat162*>(&C[size_t(r + 8) * N + c]) = __floats2bfloat162_rn(acc[j][2], acc[j][3]);
  }
}

// What compilers make of less common C++: a struct by value, constant memory, a call, a jump table, local arrays, fp64.
struct Scale {
  float* out;
  int n;
  float factor;
};
__constant__ float table[4] = {1, 2, 3, 4};
__device__ __noinline__ float angle(float x, int n) {
  float s = 0;
  for (int i = 0; i < n; i++) s += sinf(x * i);
  return s;
}
extern "C" __global__ void mixed(Scale p, const double* x, int mode) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.n) return;
  float v = float(sqrt(x[i])) * p.factor;
  switch (mode) {
    case 0:
      v += table[i & 3];
      break;
    case 1:
      v = angle(v, 5);
      break;
    case 2:
      v = fmodf(v, 0.75f);
      break;
    case 3:
      v = expf(v) / 3.f;
      break;
    case 4:
      v = float(i * 1103515245ll % 1000);
      break;
    default: {
      float local[8];
      for (int j = 0; j < 8; j++) local[j] = v * j;
      v = local[(i * 5) & 7];
    }
  }
  p.out[i] = v;
}
