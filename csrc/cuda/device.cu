// Facts about the driver and its devices; must work on a machine that has neither.
#include <cuda_runtime.h>

#include "orthrus/ops.h"

namespace orthrus::cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int32_t device_count() {
  // Without a driver the call returns an error and leaves the count unset: any error means "none".
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace orthrus::cuda
