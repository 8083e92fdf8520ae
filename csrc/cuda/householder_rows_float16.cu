// householder_rows.cuh for float16 rows; a file of its own, so that the three compile side by side.
#include "cuda/householder_rows.cuh"

namespace peftkern::cuda {

int rows_float16(const Rows& args, void* stream) { return launch_rows<fp16>(args, stream); }

}  // namespace peftkern::cuda
