// row_linear on any device from sm_80 on, over plain weights.
#include "row_linear_mma_kernel.cuh"

namespace orthrus::cuda {

int launch_row_linear_mma(const RowLinearArgs& args, int tile_rows, bool many_rows, void* stream,
                          const DeviceInfo& device) {
  return launch_mma<false>(args, tile_rows, many_rows, stream, device);
}

}  // namespace orthrus::cuda
