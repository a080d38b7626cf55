// dual_attn's attention kernels on any device from sm_80 on.
#include "dual_attn_launch.cuh"

namespace orthrus::cuda {

int launch_dual_attn_mma(const DualAttnLaunch& a, bool* split, void* stream, const DeviceInfo& device) {
  return a.p.kv.head_dim == 64 ? launch_attention<false, 64>(a, split, stream, device)
                               : launch_attention<false, 128>(a, split, stream, device);
}

}  // namespace orthrus::cuda
