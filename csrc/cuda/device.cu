// API: csrc/cuda/device.h. No dispatch: one kernel of one thread, which proves that this library's code runs on the GPU
// it meets (a library built for other architectures, or by a CUDA newer than the driver, answers with a status).

#include "cuda/device.h"

#include <cuda_runtime_api.h>
#include <cstring>

#define PEFTKERN_STRINGIFY(...) #__VA_ARGS__
#define PEFTKERN_STRING(...) PEFTKERN_STRINGIFY(__VA_ARGS__)

namespace peftkern::cuda {

__global__ void probe_arch_kernel(int* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

const char* archs() { return PEFTKERN_STRING(__CUDA_ARCH_LIST__); }

const char* error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int device_count(int* count) { return cudaGetDeviceCount(count); }

int device(int index, Device* out) {
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDeviceProperties(&properties, index);
  if (status != cudaSuccess) return status;
  std::strncpy(out->name, properties.name, sizeof(out->name) - 1);
  out->name[sizeof(out->name) - 1] = '\0';
  out->major = properties.major;
  out->minor = properties.minor;
  out->multiprocessors = properties.multiProcessorCount;
  out->shared_bytes_per_block = static_cast<int>(properties.sharedMemPerBlockOptin);
  out->l2_bytes = properties.l2CacheSize;
  out->memory_bytes = properties.totalGlobalMem;
  return cudaSuccess;
}

int probe_arch(int* out, void* stream) {
  void* arguments[] = {&out};
  return cudaLaunchKernel(reinterpret_cast<const void*>(probe_arch_kernel), dim3(1), dim3(1), arguments, 0,
                          static_cast<cudaStream_t>(stream));
}

}  // namespace peftkern::cuda
