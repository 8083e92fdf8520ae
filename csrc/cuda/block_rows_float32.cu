// block_rows.cuh for float32 rows; a file of its own, so that the three compile side by side.
#include "cuda/block_rows.cuh"

namespace peftkern::cuda {

int block_rows_float32(BlockRows args, void* stream) { return launch_block_rows<float>(args, stream); }

}  // namespace peftkern::cuda
