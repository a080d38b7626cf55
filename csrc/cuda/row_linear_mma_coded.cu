// row_linear on any device from sm_80 on, over coded weights.
#include "row_linear_mma_kernel.cuh"

namespace orthrus::cuda {

int launch_row_linear_mma_coded(const RowLinearArgs& args, int tokens, bool prefill, void* stream,
                                const DeviceInfo& device) {
  return launch_mma<true>(args, tokens, prefill, stream, device);
}

}  // namespace orthrus::cuda
