// The closed table of what a kernel may take of each architecture, and how its blocks are sized from it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace peftkern::cuda {

struct Architecture {
  int capability;     // of the oldest device that the row serves, e.g. 86 for 8.6
  int shared;         // bytes of shared memory that one block may have
  int shared_of_two;  // the same where two blocks share a multiprocessor
};

// Shared memory of a multiprocessor less 1 KiB per block. Rows from the CUDA programming guide, table of capabilities.
constexpr Architecture kArchitectures[] = {
    {80, 163 * 1024, 81 * 1024},    // A100
    {86, 99 * 1024, 49 * 1024},     // RTX 30, A40, RTX 40, L40S
    {90, 227 * 1024, 113 * 1024},   // H100, H200
    {100, 227 * 1024, 113 * 1024},  // B200
    {120, 99 * 1024, 49 * 1024},    // RTX 50
};

constexpr int kLeastShared = 99 * 1024;

// The row of the current device; a device between two rows takes the older one.
inline Architecture architecture() {
  int device = 0, major = 8, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  Architecture found = kArchitectures[0];
  for (const Architecture& a : kArchitectures)
    if (a.capability <= 10 * major + minor) found = a;
  return found;
}

// Blocks that fill a large device, four to a multiprocessor. A constant: results must not depend on the device.
constexpr int64_t kFill = 4 * 132;

// r is padded to a multiple of 32 at compile time, columns beyond r are skipped in eights.
constexpr int padded_rank(int r) { return r <= 32 ? 32 : r <= 64 ? 64 : 128; }

// Whether rows `stride` apart can be read 16 bytes at a time.
inline bool wide(const void* p, int64_t stride, int size) {
  return (reinterpret_cast<uintptr_t>(p) | uint64_t(stride) * size) % 16 == 0;
}

// Launches kernel with more than 48 KiB of dynamic shared memory where it needs them. Returns the status.
template <typename Kernel, typename Args>
int launch(Kernel* kernel, dim3 grid, int threads, int shared, void* stream, const Args& args) {
  if (shared > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return status;
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), arguments, shared,
                          static_cast<cudaStream_t>(stream));
}

}  // namespace peftkern::cuda
