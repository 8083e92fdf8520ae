// Pairs of kernels: `true` is right, `false` has one planted bug.
#include <cstdint>

// y = reverse of x, 128 elements through shared memory. Bug: no barrier between filling and reading.
template <bool OK>
__global__ void reverse(const float* x, float* y) {
  __shared__ float tile[128];
  const int t = threadIdx.x;
  tile[t] = x[t];
  if (OK) __syncthreads();
  y[t] = tile[127 - t];
}

// Sums of 4 rounds through one shared slot per thread. Bug: the next round overwrites what others still read.
template <bool OK>
__global__ void rounds(const float* x, float* y) {
  __shared__ float tile[128];
  const int t = threadIdx.x;
  float sum = 0;
  for (int i = 0; i < 4; i++) {
    tile[t] = x[i * 128 + t];
    __syncthreads();
    sum += tile[(t + 64) % 128];
    if (OK) __syncthreads();
  }
  y[t] = sum;
}

// Neighbour exchange inside one warp. Bug: no __syncwarp.
template <bool OK>
__global__ void neighbour(float* y) {
  __shared__ float tile[32];
  const int t = threadIdx.x;
  tile[t] = float(t);
  if (OK) __syncwarp();
  y[t] = tile[t ^ 1];
}

// Differences of neighbours, n - 1 of them. Bug: one too many.
template <bool OK>
__global__ void differences(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < (OK ? n - 1 : n)) y[i] = x[i + 1] - x[i];
}

// y = 2 x. Bug: no mask on the store.
template <bool OK>
__global__ void twice(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float v = i < n ? x[i] : 0.f;
  if (!OK || i < n) y[i] = 2 * v;
}

// Shared index one beyond the tile.
template <bool OK>
__global__ void beyond_shared(float* y) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  tile[OK ? t : t + 1] = t;
  __syncthreads();
  y[t] = tile[t];
}

// Transposition of 32 x 32. Bug: consecutive threads read a column.
template <bool OK>
__global__ void transpose(const float* x, float* y) {
  const int r = threadIdx.y, c = threadIdx.x;
  __shared__ float tile[32][33];
  if (OK) {
    tile[r][c] = x[r * 32 + c];
    __syncthreads();
    y[r * 32 + c] = tile[c][r];
  } else {
    y[r * 32 + c] = x[c * 32 + r];
  }
}

// The same through shared memory. Bug: rows of 32 words, so that a column lies in one bank.
template <bool OK>
__global__ void banks(const float* x, float* y) {
  const int r = threadIdx.y, c = threadIdx.x;
  __shared__ float tile[32][OK ? 33 : 32];
  tile[r][c] = x[r * 32 + c];
  __syncthreads();
  y[r * 32 + c] = tile[c][r];
}

// Counts of x[i] % 8. Bug: plain additions in shared memory.
template <bool OK>
__global__ void histogram(const int* x, int* y) {
  __shared__ int bins[8];
  const int t = threadIdx.x;
  if (t < 8) bins[t] = 0;
  __syncthreads();
  if (OK)
    atomicAdd(&bins[x[t] & 7], 1);
  else
    bins[x[t] & 7] += 1;
  __syncthreads();
  if (t < 8) y[t] = bins[t];
}

// Every block writes its own slot. Bug: all write slot 0.
template <bool OK>
__global__ void slots(int* y) {
  if (threadIdx.x == 0) y[OK ? blockIdx.x : 0] = blockIdx.x;
}

// 16-byte reads. Bug: they begin at an odd element.
template <bool OK>
__global__ void wide(const float* x, float* y) {
  const float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + (OK ? 0 : 1));
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

// Sum of everything: blocks leave partial sums, another warp of the last one adds them. Bug: no fence before the counter.
template <bool OK>
__global__ void last_block(const float* x, volatile float* partial, unsigned* counter, float* y) {
  __shared__ bool last;
  __shared__ float sums[64];
  const int t = threadIdx.x;
  sums[t] = x[blockIdx.x * 64 + t];
  __syncthreads();
  if (t == 0) {
    float s = 0;
    for (int i = 0; i < 64; i++) s += sums[i];
    const_cast<float*>(partial)[blockIdx.x] = s;
    if (OK) __threadfence();
    last = atomicAdd(counter, 1) == gridDim.x - 1;
    if (OK) __threadfence();
  }
  __syncthreads();
  if (last && t == 32) {
    float s = 0;
    for (int i = 0; i < gridDim.x; i++) s += const_cast<float*>(partial)[i];
    *y = s;
  }
}

// Bug: half of each warp goes to a barrier that the other half never reaches.
template <bool OK>
__global__ void divergent_barrier(float* y) {
  if (OK || threadIdx.x % 32 < 16) __syncthreads();
  y[threadIdx.x] = 1;
}

// Bug: the second warp leaves before the barrier.
template <bool OK>
__global__ void early_exit(float* y) {
  if (!OK && threadIdx.x >= 32) return;
  y[threadIdx.x] = 1;
  __syncthreads();
}

// Sum over a warp. Bug: the upper half is not there.
template <bool OK>
__global__ void warp_sum(float* y) {
  float v = threadIdx.x;
  if (OK || threadIdx.x < 16) {
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    y[threadIdx.x] = v;
  }
}

__device__ __forceinline__ void copy16(float* to, const float* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from));
}
// y = sum of 4 chunks of 128, fetched ahead into two buffers.
// Bugs: 1 waits for too few groups, 2 has no barrier after the wait, 3 refills a buffer that others still read.
template <int BUG>
__global__ void pipeline(const float* x, float* y) {
  __shared__ __align__(16) float buffer[2][128];
  const int t = threadIdx.x;
  float sum = 0;
  auto fetch = [&](int chunk) {
    if (t < 32) copy16(&buffer[chunk % 2][4 * t], x + chunk * 128 + 4 * t);
    asm volatile("cp.async.commit_group;");
  };
  fetch(0);
  for (int i = 0; i < 4; i++) {
    if (i + 1 < 4)
      fetch(i + 1);
    else
      asm volatile("cp.async.commit_group;");
    if (BUG == 1)
      asm volatile("cp.async.wait_group 2;" ::: "memory");
    else
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (BUG != 2) __syncthreads();
    sum += buffer[i % 2][(t + 37) % 128];
    if (BUG != 3) __syncthreads();
  }
  y[t] = sum;
}

// Block 0 waits for block 1.
__global__ void waits(volatile int* flag, int* y) {
  if (blockIdx.x == 1) {
    y[1] = 7;
    __threadfence();
    *flag = 1;
  } else {
    while (*flag == 0) {
    }
    __threadfence();
    y[0] = y[1];
  }
}

template __global__ void reverse<true>(const float*, float*);
template __global__ void reverse<false>(const float*, float*);
template __global__ void rounds<true>(const float*, float*);
template __global__ void rounds<false>(const float*, float*);
template __global__ void neighbour<true>(float*);
template __global__ void neighbour<false>(float*);
template __global__ void differences<true>(const float*, float*, int);
template __global__ void differences<false>(const float*, float*, int);
template __global__ void twice<true>(const float*, float*, int);
template __global__ void twice<false>(const float*, float*, int);
template __global__ void beyond_shared<true>(float*);
template __global__ void beyond_shared<false>(float*);
template __global__ void transpose<true>(const float*, float*);
template __global__ void transpose<false>(const float*, float*);
template __global__ void banks<true>(const float*, float*);
template __global__ void banks<false>(const float*, float*);
template __global__ void histogram<true>(const int*, int*);
template __global__ void histogram<false>(const int*, int*);
template __global__ void slots<true>(int*);
template __global__ void slots<false>(int*);
template __global__ void wide<true>(const float*, float*);
template __global__ void wide<false>(const float*, float*);
template __global__ void last_block<true>(const float*, volatile float*, unsigned*, float*);
template __global__ void last_block<false>(const float*, volatile float*, unsigned*, float*);
template __global__ void divergent_barrier<true>(float*);
template __global__ void divergent_barrier<false>(float*);
template __global__ void early_exit<true>(float*);
template __global__ void early_exit<false>(float*);
template __global__ void warp_sum<true>(float*);
template __global__ void warp_sum<false>(float*);
template __global__ void pipeline<0>(const float*, float*);
template __global__ void pipeline<1>(const float*, float*);
template __global__ void pipeline<2>(const float*, float*);
template __global__ void pipeline<3>(const float*, float*);
