// The block kernels for AVX-512 (F, BW, DQ, VL).
// Chosen by dispatch.cpp; the standard headers come before the target, so that no shared inline function gets AVX-512
// code. Formulas and shapes: blocks.h.
#if defined(__x86_64__)
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include <immintrin.h>
#include "../common/dtype.h"
#include "../common/threads.h"
#include "blocks.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define PEFTKERN_ISA avx512
#define PEFTKERN_VECTOR_BYTES 64
#include "block_entry.h"
#endif
