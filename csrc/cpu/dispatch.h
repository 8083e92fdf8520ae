// Which kernels this processor gets: the best level it has, or a lower one by name.
// dispatch.cpp asks the processor and the operating system once; nothing here is read per call but a table pointer.
// Levels, lowest first: portable, avx2, avx512, amx (avx512 plus AMX tiles for bf16 activations).
#pragma once

#include <vector>

#include "blocks.h"
#include "householder.h"

namespace peftkern {

enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

struct Feature {
  const char* name;
  bool present;
};

std::vector<Feature> processor_features();
Level best_level();
// Entry points of a level; the caller has checked level <= best_level().
const Kernels& kernels_of(Level level);
const BlockKernels& block_kernels_of(Level level);

}  // namespace peftkern
