// Twin of csrc/include/orthrus/launch.cuh for host-compiled kernels. A kernel that touches the stream's results without
// pdl_wait would be wrong on the device, so every thread has to call it. Blocks, or clusters of them, also run in
// either order.
#pragma once
#include <cstring>

#include "orthrus/sm80.cuh"

// Symbols that the linker defines for this library: the section that holds kernels' static shared memory.
extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[];

namespace cuda_host {

inline int num_launches = 1;
inline uint64_t* end_of(int launch) { return cuda_host_meetings + 1 + launch % 2; }

}  // namespace cuda_host

namespace orthrus::cuda {

inline void pdl_wait() {
  const cuda_host::races::Unseen unseen;
  cuda_host::waited[cuda_host::self] = true;
  cuda_host::proxy_fenced[cuda_host::self] = false;
  cuda_host::races::acquire(cuda_host::end_of(cuda_host::num_launches - 1));
}
inline void pdl_launch_dependents() {}

// A Hopper GPU with as many SMs as the test says.
struct DeviceInfo {
  int num_sms, major, minor, error;
};
inline DeviceInfo device_info() { return {cuda_host::num_sms, 9, 0, cudaSuccess}; }

// Alternates with the order of threads, so that every kernel that is chosen by it runs.
template <typename Params>
int occupancy(void (*)(Params), int, int, int* ctas) {
  *ctas = cuda_host::descending ? 2 : 1;
  return cudaSuccess;
}

template <typename Params>
int launch(void (*kernel)(Params), const Params& params, dim3 grid, int threads, int smem_bytes, void* stream,
           DeviceInfo, int cluster = 1) {
  if (stream != cuda_host::kStream) cuda_host::fail("a launch on another stream");
  constexpr int kPoison = 0xff;  // NaN
  auto& shared = cuda_host::dynamic_shared;
  static const void* poisoned = std::memset(shared, kPoison, sizeof(shared));
  (void)poisoned;
  if (smem_bytes > cuda_host::kMaxSharedBytes || cluster > cuda_host::kMaxCluster || grid.x % cluster || grid.x == 0)
    return cudaErrorInvalidValue;
  cuda_host::shared_bytes = smem_bytes;
  const int64_t rest_bytes = sizeof(*shared) - smem_bytes;
  ++cuda_host::num_launches;
  gridDim = grid;
  blockDim = dim3(threads);
  const unsigned clusters = grid.x / cluster * grid.y;
  const unsigned first = cuda_host::last_cluster_only ? clusters - 1 : 0;
  for (unsigned i = first; i < clusters; ++i) {
    const unsigned at = cuda_host::descending ? first + clusters - 1 - i : i;
    const dim3 first_block(at * cluster % grid.x, at * cluster / grid.x);
    std::fill_n(cuda_host::waited, cuda_host::kMaxThreads, false);
    cuda_host::named_barriers.clear();
    cuda_host::races::forget(__bss_start, _end - __bss_start);
    for (int rank = 0; rank < cluster; ++rank) {
      cuda_host::races::forget(shared[rank], smem_bytes);
      ASAN_POISON_MEMORY_REGION(shared[rank] + smem_bytes, rest_bytes);
    }
    cuda_host::Block::current().run(cuda_host::num_launches, at, first_block, cluster, [&] {
      kernel(params);
      cuda_host::races::release(cuda_host::end_of(cuda_host::num_launches));
    });
    const int all = cluster * threads;
    if (std::count(cuda_host::waited, cuda_host::waited + all, true) != all)
      cuda_host::fail("not every thread called pdl_wait");
    for (int rank = 0; rank < cluster; ++rank) {
      uint8_t* const rest = shared[rank] + smem_bytes;
      ASAN_UNPOISON_MEMORY_REGION(rest, rest_bytes);
      if (rest[0] != kPoison || std::memcmp(rest, rest + 1, rest_bytes - 1))
        cuda_host::fail("shared memory is written that the launch did not ask for");
      std::memset(shared[rank], kPoison, smem_bytes);
    }
  }
  return cudaSuccess;
}

}  // namespace orthrus::cuda
