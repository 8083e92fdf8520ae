// peftkern._native_cuda: pointers, sizes and stream in, status out. Imports on a machine without a driver or a GPU.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace py = pybind11;
namespace cuda = peftkern::cuda;

// For launchers: the Python function raises RuntimeError with CUDA's words.
static void check(int status, const char* what) {
  if (status != 0) {
    throw std::runtime_error(std::string(what) + ": " + cuda::error_string(status) + " (CUDA error " +
                             std::to_string(status) + ")");
  }
}

#include "cuda/bind_gram_schmidt.inc"
#include "cuda/bind_householder.inc"

#include "cuda/bind_block_rotation.inc"

PYBIND11_MODULE(_native_cuda, m) {
  bind_householder(m);
  bind_gram_schmidt(m);
  bind_block_rotation(m);
  m.def("runtime_version", &cuda::runtime_version, "Version of the CUDA runtime linked in, e.g. 13000.");
  m.def("driver_version", &cuda::driver_version, "Newest CUDA that the driver serves; 0 without a driver.");
  m.def("archs", &cuda::archs, "Architectures compiled in, e.g. '800,900,1000'.");
  m.def("error_string", &cuda::error_string, py::arg("status"));
  m.def(
      "device_count",
      [] {
        int count = 0;
        check(cuda::device_count(&count), "device_count");
        return count;
      },
      "Number of GPUs. Raises RuntimeError without a usable driver.");
  m.def(
      "device",
      [](int index) {
        cuda::Device d;
        check(cuda::device(index, &d), "device");
        py::dict out;
        out["name"] = d.name;
        out["capability"] = py::make_tuple(d.major, d.minor);
        out["multiprocessors"] = d.multiprocessors;
        out["shared_bytes_per_block"] = d.shared_bytes_per_block;
        out["l2_bytes"] = d.l2_bytes;
        out["memory_bytes"] = d.memory_bytes;
        return out;
      },
      py::arg("index"), "Properties of one GPU.");
  m.def(
      "probe_arch",
      [](uintptr_t out, uintptr_t stream) {
        return cuda::probe_arch(reinterpret_cast<int*>(out), reinterpret_cast<void*>(stream));
      },
      py::arg("out"), py::arg("stream"),
      "Write the architecture of the code that the GPU chose to the int32 at `out` (device memory). Returns the "
      "status.");
}
