// Which instructions row_linear and dual_attn multiply with.
#pragma once
#include "orthrus/launch.cuh"

namespace orthrus::cuda {

// Whether the device runs the wgmma kernels: a Hopper GPU, if the module has them and ORTHRUS_CUDA_ISA does not ask for
// the portable ones.
bool runs_wgmma(const DeviceInfo& device);

}  // namespace orthrus::cuda
