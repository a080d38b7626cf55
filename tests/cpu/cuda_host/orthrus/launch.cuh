// Twin of csrc/include/orthrus/launch.cuh for host-compiled kernels. A kernel that touches the stream's results without
// pdl_wait would be wrong on the device, so every thread has to call it. Blocks too run in either order.
#pragma once
#include <cstring>

#include "orthrus/sm80.cuh"

// Of this library, by the linker: where kernels' static shared memory is.
extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[];

namespace cuda_host {

inline int num_launches = 1;
inline uint64_t* end_of(int launch) { return cuda_host_meetings + 1 + launch % 2; }

}  // namespace cuda_host

namespace orthrus::cuda {

inline void pdl_wait() {
  const cuda_host::races::Unseen unseen;
  cuda_host::waited[threadIdx.x] = true;
  cuda_host::proxy_fenced[threadIdx.x] = false;
  cuda_host::races::acquire(cuda_host::end_of(cuda_host::num_launches - 1));
}
inline void pdl_launch_dependents() {}

// A Hopper with as many SMs as the test says.
struct DeviceInfo {
  int num_sms, major, minor, error;
};
inline DeviceInfo device_info() { return {cuda_host::num_sms, 9, 0, cudaSuccess}; }

// By turns, as the order of threads: kernels that depend on it are all to be run.
template <typename Params>
int occupancy(void (*)(Params), int, int, int* ctas) {
  *ctas = cuda_host::descending ? 2 : 1;
  return cudaSuccess;
}

template <typename Params>
int launch(void (*kernel)(Params), const Params& params, dim3 grid, int threads, int smem_bytes, void* stream,
           DeviceInfo) {
  if (stream != cuda_host::kStream) cuda_host::fail("a launch on another stream");
  constexpr int kPoison = 0xff;  // NaN
  uint8_t* shared = cuda_host::dynamic_shared;
  static const void* poisoned = std::memset(shared, kPoison, sizeof(cuda_host::dynamic_shared));
  (void)poisoned;
  if (smem_bytes > cuda_host::kMaxSharedBytes) return cudaErrorInvalidValue;
  cuda_host::shared_bytes = smem_bytes;
  uint8_t* const rest = shared + smem_bytes;
  const int64_t rest_bytes = sizeof(cuda_host::dynamic_shared) - smem_bytes;
  ++cuda_host::num_launches;
  gridDim = grid;
  blockDim = dim3(threads);
  const unsigned blocks = grid.x * grid.y;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = cuda_host::descending ? blocks - 1 - i : i;
    blockIdx.x = block % grid.x;
    blockIdx.y = block / grid.x;
    std::fill_n(cuda_host::waited, cuda_host::kMaxThreads, false);
    cuda_host::named_barriers.clear();
    cuda_host::races::forget(shared, smem_bytes);
    cuda_host::races::forget(__bss_start, _end - __bss_start);
    ASAN_POISON_MEMORY_REGION(rest, rest_bytes);
    cuda_host::Block::current().run(cuda_host::num_launches, block, threads, [&] {
      kernel(params);
      cuda_host::races::release(cuda_host::end_of(cuda_host::num_launches));
    });
    ASAN_UNPOISON_MEMORY_REGION(rest, rest_bytes);
    if (std::count(cuda_host::waited, cuda_host::waited + threads, true) != threads)
      cuda_host::fail("not every thread called pdl_wait");
    if (rest[0] != kPoison || std::memcmp(rest, rest + 1, rest_bytes - 1))
      cuda_host::fail("shared memory is written that the launch did not ask for");
    std::memset(shared, kPoison, smem_bytes);
  }
  return cudaSuccess;
}

}  // namespace orthrus::cuda
