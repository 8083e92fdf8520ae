// A CUDA runtime whose device is the PTX machine: launches go to a callback, memory is host memory.
// Linked into a library of host launchers in place of cudart.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
using Launcher = int (*)(const char* name, const unsigned* grid, const unsigned* block, void** args,
                         unsigned long shared);
struct Kernel {
  std::string name;
  int dynamic_shared = 48 * 1024;
};
struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

Launcher launcher = nullptr;
cudaError_t last = cudaSuccess;
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> k;
  return k;
}
std::vector<Configuration>& configurations() {
  static thread_local std::vector<Configuration> c;
  return c;
}
cudaError_t set(cudaError_t e) {
  if (e != cudaSuccess) last = e;
  return e;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** args, size_t shared) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return set(cudaErrorInvalidDeviceFunction);
  if (!launcher) return set(cudaErrorNoDevice);
  // As on a device: more than 48 KiB of dynamic shared memory must be asked for with cudaFuncSetAttribute.
  if (shared > size_t(found->second.dynamic_shared)) return set(cudaErrorInvalidValue);
  const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  return set(cudaError_t(launcher(found->second.name.c_str(), g, b, args, shared)));
}
}  // namespace

EXPORT void ptxvm_set_launcher(Launcher f) {
  launcher = f;
  last = cudaSuccess;
}

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                   int*) {
  kernels()[host].name = name;
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations().push_back({grid, block, shared, stream});
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations().empty()) return cudaErrorMissingConfiguration;
  const Configuration c = configurations().back();
  configurations().pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                                      cudaStream_t) {
  return launch(reinterpret_cast<const void*>(kernel), grid, block, args, shared);
}
EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                                    cudaStream_t) {
  return launch(function, grid, block, args, shared);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void** args) {
  if (c->numAttrs) return set(cudaErrorNotSupported);
  return launch(function, c->gridDim, c->blockDim, args, c->dynamicSmemBytes);
}
EXPORT cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return set(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) found->second.dynamic_shared = value;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t e = last;
  last = cudaSuccess;
  return e;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last; }
EXPORT const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess              ? "no error"
         : e == cudaErrorLaunchFailure ? "the PTX machine reported an error"
                                       : "error of the PTX machine's runtime";
}
EXPORT const char* cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
EXPORT cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int* d) {
  *d = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
EXPORT cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t) {
  std::memset(p, value, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, n);
  return cudaSuccess;
}
// An A100.
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 108;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 163 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 164 * 1024;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 40 << 20;
      break;
    default:
      return set(cudaErrorNotSupported);
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = cudaDeviceProp();
  std::strcpy(p->name, "PTX machine (sm_80)");
  p->major = 8;
  p->multiProcessorCount = 108;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->sharedMemPerBlock = 48 * 1024;
  p->sharedMemPerBlockOptin = 163 * 1024;
  p->sharedMemPerMultiprocessor = 164 * 1024;
  p->totalGlobalMem = size_t(40) << 30;
  p->l2CacheSize = 40 << 20;
  p->regsPerBlock = 65536;
  return cudaSuccess;
}
