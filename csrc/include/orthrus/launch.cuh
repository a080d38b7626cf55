// Kernel launch with programmatic dependent launch: a kernel may start while its predecessor on the stream still runs,
// and waits for it inside. The host shim of the CPU tests provides its own version.
#pragma once
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

namespace orthrus::cuda {

// Blocks until every earlier kernel of the stream has finished and its writes are visible. Every kernel calls it before
// it touches any tensor but weights, on early exits too: a later kernel relies on this to see all earlier writes, not
// only those of its predecessor.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#if ORTHRUS_PDL_DELAY_NS > 0  // a build that finds kernels that do not wait as they should
  __nanosleep(ORTHRUS_PDL_DELAY_NS);
#endif
#endif
}

// Lets the next kernel of the stream start its prologue once every CTA of this one has got here. Small kernels call it
// at once, before they wait: a prologue touches nothing but weights, and a row_linear behind them can stream its
// weights while the kernel before them ends. By then all CTAs of the small kernel have started, so its successors
// cannot keep it from running.
__device__ __forceinline__ void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct DeviceInfo {
  int num_sms;
  int major, minor;   // compute capability
  cudaError_t error;  // why the other fields are 0: no device, or one that has failed
};

inline DeviceInfo device_info() {
  int device = 0;
  DeviceInfo info{};
  info.error = cudaGetDevice(&device);
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    if (info.error == cudaSuccess) info.error = cudaDeviceGetAttribute(value, attribute, device);
  };
  read(&info.num_sms, cudaDevAttrMultiProcessorCount);
  read(&info.major, cudaDevAttrComputeCapabilityMajor);
  read(&info.minor, cudaDevAttrComputeCapabilityMinor);
  return info;
}

inline bool pdl_is_off() {
  static const bool off = [] {
    const char* value = std::getenv("ORTHRUS_CUDA_PDL");
    return value && std::strcmp(value, "0") == 0;
  }();
  return off;
}

// Raises the kernel's limit, never lowers it: a graph recorded with more may be instantiated after a launch with less.
template <typename Params>
cudaError_t allow_smem(void (*kernel)(Params), int smem_bytes) {
  if (smem_bytes <= 48 * 1024) return cudaSuccess;
  const auto* function = reinterpret_cast<const void*>(kernel);
  static std::mutex reads_and_sets;
  const std::lock_guard<std::mutex> lock(reads_and_sets);
  cudaFuncAttributes now{};
  if (const cudaError_t error = cudaFuncGetAttributes(&now, function)) return error;
  if (smem_bytes <= now.maxDynamicSharedSizeBytes) return cudaSuccess;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
}

// CTAs of `kernel` that fit on one SM. Returns a cudaError_t as int.
template <typename Params>
int occupancy(void (*kernel)(Params), int threads, int smem_bytes, int* ctas) {
  const cudaError_t error = allow_smem(kernel, smem_bytes);
  if (error != cudaSuccess) return static_cast<int>(error);
  return static_cast<int>(cudaOccupancyMaxActiveBlocksPerMultiprocessor(ctas, kernel, threads, smem_bytes));
}

// Launches clusters of `cluster` CTAs, neighbours in x (Hopper, if more than one). Returns a cudaError_t as int.
template <typename Params>
int launch(void (*kernel)(Params), const Params& params, dim3 grid, int threads, int smem_bytes, void* stream,
           const DeviceInfo& device, int cluster = 1) {
  if (const cudaError_t error = allow_smem(kernel, smem_bytes)) return static_cast<int>(error);
  cudaLaunchAttribute attributes[3]{};
  cudaLaunchConfig_t config{};
  const auto next_attribute = [&](cudaLaunchAttributeID id) -> cudaLaunchAttributeValue& {
    attributes[config.numAttrs].id = id;
    return attributes[config.numAttrs++].val;
  };
  // The same carve-out for every kernel: a different one would keep neighbouring kernels from sharing an SM. It is an
  // attribute of the launch, not of the function: setting the function's may wait for copies.
  next_attribute(cudaLaunchAttributePreferredSharedMemoryCarveout).sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  if (device.major >= 9 && !pdl_is_off())
    next_attribute(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
  if (cluster > 1)
    next_attribute(cudaLaunchAttributeClusterDimension).clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace orthrus::cuda
