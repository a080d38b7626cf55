// Twin of csrc/include/orthrus/launch.cuh for host-compiled kernels. A kernel that touches the stream's
// results without pdl_wait would be wrong on the device, so the launch counts the waits.
#pragma once
#include "cuda_runtime.h"

namespace orthrus::cuda {

inline int waits = 0;
inline void pdl_wait() { ++waits; }
inline void pdl_launch_dependents() {}

struct DeviceInfo {};
inline DeviceInfo device_info() { return {}; }

template <typename Params>
int launch(void (*kernel)(Params), const Params& params, dim3 grid, int threads, int, void*, DeviceInfo) {
  gridDim = grid;
  blockDim = dim3(threads);
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    waits = 0;
    cuda_host::Block::current().run(threads, [&] { kernel(params); });
    if (waits != threads) {
      std::fprintf(stderr, "cuda_host: %d of %d threads called pdl_wait\n", waits, threads);
      std::abort();
    }
  }
  return cudaSuccess;
}

}  // namespace orthrus::cuda
