// dual_attn's attention kernels on Hopper.
#include "dual_attn_launch.cuh"

namespace orthrus::cuda {

int launch_dual_attn_sm90(const DualAttnLaunch& a, bool* split, void* stream, const DeviceInfo& device) {
  return a.p.kv.head_dim == 64 ? launch_attention<true, 64>(a, split, stream, device)
                               : launch_attention<true, 128>(a, split, stream, device);
}

}  // namespace orthrus::cuda
