// block_rows.cuh for float16 rows; a file of its own, so that the three compile side by side.
#include "cuda/block_rows.cuh"

namespace peftkern::cuda {

int block_rows_float16(BlockRows args, void* stream) { return launch_block_rows<fp16>(args, stream); }

}  // namespace peftkern::cuda
