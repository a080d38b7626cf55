// row_linear on Hopper over coded weights.
#include "row_linear_sm90_kernel.cuh"

namespace orthrus::cuda {

int launch_row_linear_sm90_coded(const RowLinearArgs& args, int tokens, bool prefill, void* stream,
                                 const DeviceInfo& device) {
  return launch_sm90<true>(args, tokens, prefill, stream, device);
}

}  // namespace orthrus::cuda
