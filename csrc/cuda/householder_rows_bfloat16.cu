// householder_rows.cuh for bfloat16 rows; a file of its own, so that the three compile side by side.
#include "cuda/householder_rows.cuh"

namespace peftkern::cuda {

int rows_bfloat16(const Rows& args, void* stream) { return launch_rows<bf16>(args, stream); }

}  // namespace peftkern::cuda
