// row_linear on Hopper over coded weights.
#include "row_linear_sm90_kernel.cuh"

namespace orthrus::cuda {

int launch_row_linear_sm90_coded(const RowLinearArgs& args, int tile_rows, bool many_rows, void* stream,
                                 const DeviceInfo& device) {
  return launch_sm90<true>(args, tile_rows, many_rows, stream, device);
}

}  // namespace orthrus::cuda
