// Scratch memory of one kernel call: 64-byte aligned, uninitialised, given back at scope exit in reverse order.
// A stack that each calling thread keeps (up to 32 MiB): fresh pages for every call would cost as much as the kernels.
// Used before a parallel region, never inside one; throws std::bad_alloc. In the namespace of its instruction set: a
// shared template could be emitted with AVX-512 code.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace peftkern {
namespace PEFTKERN_ISA {

struct ScratchStack {
  static constexpr size_t kLimit = size_t(32) << 20;

  ~ScratchStack() { std::free(base); }

  // Grows only while nothing is on it, to what the calls before have asked for at once.
  char* push(size_t bytes) {
    wanted = used + bytes > wanted ? used + bytes : wanted;
    if (used == 0 && wanted > size && wanted <= kLimit) {
      std::free(base);
      base = static_cast<char*>(std::aligned_alloc(64, wanted));
      size = base ? wanted : 0;
    }
    used += bytes;
    return used <= size ? base + used - bytes : nullptr;
  }
  void pop(size_t bytes) { used -= bytes; }

  char* base = nullptr;
  // Bytes there are, in use (the overflow to the heap included), and the most ever in use.
  size_t size = 0, used = 0, wanted = 0;
};

inline ScratchStack& scratch_stack() {
  static thread_local ScratchStack stack;
  return stack;
}

template <class E>
class Buffer {
 public:
  explicit Buffer(size_t count) : bytes_((count * sizeof(E) + 127) / 64 * 64) {
#if !defined(__SANITIZE_ADDRESS__)
    data_ = reinterpret_cast<E*>(scratch_stack().push(bytes_));
    from_stack_ = data_ != nullptr;
    if (from_stack_) return;
#endif
    data_ = static_cast<E*>(std::aligned_alloc(64, bytes_));
    if (data_) return;
    give_back();
    throw std::bad_alloc();
  }
  ~Buffer() {
    if (!from_stack_) std::free(data_);
    give_back();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  E* data() { return data_; }
  const E* data() const { return data_; }
  E& operator[](size_t i) { return data_[i]; }

 private:
  void give_back() {
#if !defined(__SANITIZE_ADDRESS__)
    scratch_stack().pop(bytes_);
#endif
  }

  E* data_;
  size_t bytes_;
  bool from_stack_ = false;
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
