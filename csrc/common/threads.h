// How many OpenMP threads a loop is worth, and which one is running.
// The caller passes torch's own number; torch and this module share one libgomp, so no second pool appears.
// A parallel region costs a few microseconds: below kWorkPerThread multiply-adds a thread is not woken.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace peftkern {

constexpr int64_t kWorkPerThread = 1 << 17;

inline int useful_threads(int threads, int64_t tasks, int64_t multiply_adds) {
  int64_t useful = 1 + multiply_adds / kWorkPerThread;
  if (useful > threads) useful = threads;
  if (useful > tasks) useful = tasks;
  return useful < 1 ? 1 : int(useful);
}

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace peftkern
