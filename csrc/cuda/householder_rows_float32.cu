// householder_rows.cuh for float32 rows; a file of its own, so that the three compile side by side.
#include "cuda/householder_rows.cuh"

namespace peftkern::cuda {

int rows_float32(const Rows& args, void* stream) { return launch_rows<float>(args, stream); }

}  // namespace peftkern::cuda
