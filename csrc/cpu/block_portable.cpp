// The block kernels for any processor: vectors of 16 bytes as the compiler's own baseline has them (SSE2, NEON).
// Chosen by dispatch.cpp where neither AVX2 nor AVX-512 is there.
// Formulas and shapes: blocks.h.
#define PEFTKERN_ISA portable
#define PEFTKERN_VECTOR_BYTES 16
#include "block_entry.h"
