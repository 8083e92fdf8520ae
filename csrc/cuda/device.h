// What the CUDA library knows about itself and the GPU it meets. Status codes are cudaError_t; 0 is success.
#pragma once

#include <cstddef>

namespace peftkern::cuda {

struct Device {
  char name[256];
  int major, minor;  // compute capability
  int multiprocessors;
  int shared_bytes_per_block;  // with opt-in
  int l2_bytes;
  size_t memory_bytes;
};

int runtime_version();  // of the cudart linked in, e.g. 13000
int driver_version();   // newest CUDA that the driver serves, 0 without a driver
const char* archs();    // architectures compiled in, e.g. "800,900,1000"
const char* error_string(int status);

int device_count(int* count);
int device(int index, Device* out);

// Writes to *out (device memory, int32) the architecture of the code that the GPU chose from this library, e.g. 900.
int probe_arch(int* out, void* stream);

}  // namespace peftkern::cuda
