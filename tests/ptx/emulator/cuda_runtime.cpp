// The part of the CUDA runtime that the host code in csrc/cuda calls: launches go to the emulator.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>

#include "cuda_host_names.h"
#include "run.h"

int cuda_host::num_sms = 5;
bool cuda_host::descending = false;
bool cuda_host::last_cluster_only = false;
std::vector<cuda_host::Prefetched> cuda_host::prefetched;

namespace ptx {
namespace {

struct Function {
  std::string name;
  int max_dynamic = 48 * 1024;
};
std::map<const void*, Function>& functions() {
  static auto& all = *new std::map<const void*, Function>;
  return all;
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* size,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  const bool good = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && rank == 2 &&
                    reinterpret_cast<uintptr_t>(base) % 16 == 0 && size[0] > 0 && size[1] > 0 &&
                    strides[0] % 16 == 0 && box[0] * 2 <= 128 && box[0] * 2 % 16 == 0 &&
                    box[1] > 0 && box[1] <= 256 && steps[0] == 1 && steps[1] == 1 &&
                    interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
                    fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && reinterpret_cast<uintptr_t>(map) % 64 == 0;
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  const TensorMap made{kTensorMapMagic, reinterpret_cast<uintptr_t>(base), size[0], size[1], strides[0], box[0], box[1],
                       128, 2};
  static_assert(sizeof(made) <= sizeof(CUtensorMap));
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

int run_kernel(const void* function, dim3 grid, dim3 block, size_t dynamic, void** args, bool pdl = false,
               uint32_t cluster = 1) {
  const Function& f = functions().at(function);
  if (block.y != 1 || block.z != 1 || grid.x == 0) return cudaErrorInvalidConfiguration;
  if (static_cast<int>(dynamic) > f.max_dynamic) return cudaErrorInvalidValue;
  try {
    for (const Module* module : modules) {
      const auto found = module->kernels.find(f.name);
      if (found == module->kernels.end()) continue;
      const auto* bytes = static_cast<const uint8_t*>(args[0]);
      launch(*module, f.name, {grid.x, grid.y, grid.z}, block.x, static_cast<uint32_t>(dynamic),
             {bytes, bytes + found->second->param_bytes}, pdl, cluster);
      return cudaSuccess;
    }
    throw Failure("no module has " + f.name);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "ptx: %s\n", error.what());
    return cudaErrorUnknown;
  }
}

}  // namespace
}  // namespace ptx

extern "C" {

static int handle;
void** __cudaRegisterFatBinary(void*) { return reinterpret_cast<void**>(&handle); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  ptx::functions()[host].name = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(f));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return static_cast<cudaError_t>(ptx::run_kernel(f, grid, block, args ? shared : 0, args));
}
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return static_cast<cudaError_t>(ptx::run_kernel(f, grid, block, shared, args));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
  if (c->stream != cuda_host::kStream) return cudaErrorInvalidResourceHandle;
  const bool pdl = std::any_of(c->attrs, c->attrs + c->numAttrs, [](const cudaLaunchAttribute& a) {
    return a.id == cudaLaunchAttributeProgrammaticStreamSerialization && a.val.programmaticStreamSerializationAllowed;
  });
  uint32_t cluster = 1;
  for (const auto* a = c->attrs; a != c->attrs + c->numAttrs; ++a) {
    if (a->id != cudaLaunchAttributeClusterDimension) continue;
    if (a->val.clusterDim.y != 1 || a->val.clusterDim.z != 1) return cudaErrorInvalidConfiguration;
    cluster = a->val.clusterDim.x;
  }
  return static_cast<cudaError_t>(ptx::run_kernel(f, c->gridDim, c->blockDim, c->dynamicSmemBytes, args, pdl, cluster));
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = cuda_host::num_sms; break;
    case cudaDevAttrComputeCapabilityMajor: *value = ptx::architecture / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = ptx::architecture % 10; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* f) {
  *a = {};
  a->maxDynamicSharedSizeBytes = ptx::functions().at(f).max_dynamic;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  const int granted = ptx::architecture == 90 ? 227 * 1024 : 99 * 1024;  // on the smallest device that runs them
  if (value > granted) return cudaErrorInvalidValue;
  ptx::functions().at(f).max_dynamic = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* ctas, const void*, int threads, size_t shared) {
  const int of_sm = (ptx::architecture == 90 ? 228 : 100) * 1024;  // likewise, on the smallest device
  *ctas = std::max(1, std::min<int>(2048 / threads, of_sm / static_cast<int>(shared + 1024)));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* ctas, const void* f, int threads, size_t shared,
                                                                   unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(ctas, f, threads, shared);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&ptx::encode_tiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return cudaErrorNotSupported; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t*, unsigned, int) { return cudaErrorNotSupported; }
cudaError_t cudaDeviceGetStreamPriorityRange(int*, int*) { return cudaErrorNotSupported; }
cudaError_t cudaStreamCreate(cudaStream_t*) { return cudaErrorNotSupported; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
}
