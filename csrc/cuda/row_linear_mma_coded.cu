// row_linear on any device from sm_80 on, over coded weights.
#include "row_linear_mma_kernel.cuh"

namespace orthrus::cuda {

int launch_row_linear_mma_coded(const RowLinearArgs& args, int tile_rows, bool many_rows, void* stream,
                                const DeviceInfo& device) {
  return launch_mma<true>(args, tile_rows, many_rows, stream, device);
}

}  // namespace orthrus::cuda
