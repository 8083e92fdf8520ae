// block_rows.cuh for bfloat16 rows; a file of its own, so that the three compile side by side.
#include "cuda/block_rows.cuh"

namespace peftkern::cuda {

int block_rows_bfloat16(BlockRows args, void* stream) { return launch_block_rows<bf16>(args, stream); }

}  // namespace peftkern::cuda
