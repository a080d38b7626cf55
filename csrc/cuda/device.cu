// Error strings of the driver, and streams of the module's own; must work on a machine that has no driver.
#include <cuda_runtime.h>

#include "orthrus/ops.h"

namespace orthrus::cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int new_stream(void** stream) {
  return cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream), cudaStreamNonBlocking);
}

}  // namespace orthrus::cuda
