// Twin of csrc/include/orthrus/launch.cuh for host-compiled kernels. A kernel that touches the stream's
// results without pdl_wait would be wrong on the device, so the launch counts the waits.
#pragma once
#include <cstring>

#include "orthrus/sm80.cuh"

namespace orthrus::cuda {

inline int waits = 0;
inline void pdl_wait() { ++waits; }
inline void pdl_launch_dependents() {}

struct DeviceInfo {
  int num_sms;
};
inline DeviceInfo device_info() { return {cuda_host::num_sms}; }

template <typename Params>
int occupancy(void (*)(Params), int, int, int* ctas) {
  *ctas = 1;
  return cudaSuccess;
}

template <typename Params>
int launch(void (*kernel)(Params), const Params& params, dim3 grid, int threads, int, void*, DeviceInfo) {
  gridDim = grid;
  blockDim = dim3(threads);
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    waits = 0;
    std::memset(cuda_host::dynamic_shared, 0xff, sizeof(cuda_host::dynamic_shared));  // NaN
    cuda_host::Block::current().run(threads, [&] { kernel(params); });
    if (waits != threads) cuda_host::fail("not every thread called pdl_wait");
  }
  return cudaSuccess;
}

}  // namespace orthrus::cuda
