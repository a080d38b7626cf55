// row_linear on Hopper over plain weights.
#include "row_linear_sm90_kernel.cuh"

namespace orthrus::cuda {

int launch_row_linear_sm90(const RowLinearArgs& args, int tile_rows, bool many_rows, void* stream,
                           const DeviceInfo& device) {
  return launch_sm90<false>(args, tile_rows, many_rows, stream, device);
}

}  // namespace orthrus::cuda
