// Scratch memory of one kernel call: 64-byte aligned, uninitialised, freed at scope exit.
// Allocated before a parallel region, never inside one: an exception must not cross its border.
// Throws std::bad_alloc. In the namespace of its instruction set: a shared template could be emitted with AVX-512 code.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace peftkern {
namespace PEFTKERN_ISA {

template <class E>
class Buffer {
 public:
  explicit Buffer(size_t count) {
    size_t bytes = (count * sizeof(E) + 127) / 64 * 64;
    data_ = static_cast<E*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  E* data() { return data_; }
  const E* data() const { return data_; }
  E& operator[](size_t i) { return data_[i]; }

 private:
  E* data_;
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
