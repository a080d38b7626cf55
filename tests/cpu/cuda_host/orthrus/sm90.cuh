// Twin of csrc/include/orthrus/sm90.cuh for host-compiled kernels. Copies land late, one at a time, oldest or newest
// first, onto poison; a wgmma reads shared memory only when its group is waited for: a stage that is read too early
// or released too soon gives a wrong result.
#pragma once
#include <functional>

#include "orthrus/sm80.cuh"

#define __CUDA_ARCH_FEAT_SM90_ALL

inline void __trap() { std::abort(); }

enum { cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

namespace cuda_host {

struct Transaction {
  int arrivals = 0, pending = 0, parity = 0;
  int64_t bytes = 0;
  void settle() {
    if (pending < 0) std::abort();
    if (pending || bytes) return;
    parity ^= 1;
    pending = arrivals;
  }
};

inline std::map<uint64_t*, Transaction> transactions;
inline std::deque<std::function<void()>> copies_in_flight;
inline std::map<int, std::deque<std::vector<std::function<void()>>>> wgmma_groups;  // of each thread

inline void land(uint64_t* barrier, int bytes) {
  transactions[barrier].bytes -= bytes;
  transactions[barrier].settle();
}

}  // namespace cuda_host

namespace orthrus::cuda::sm90 {

struct TensorMap {
  const uint16_t* data;
  int rows, columns, box_rows;
  int64_t stride;
};

inline bool make_row_map(TensorMap* map, const uint16_t* data, int rows, int columns, int64_t stride, int box_rows) {
  *map = {data, rows, columns, box_rows, stride};
  return true;
}
inline void prefetch_map(const TensorMap*) {}

inline void barrier_init(uint64_t* barrier, int arrivals) {
  cuda_host::transactions[barrier] = {arrivals, arrivals, 0, 0};
}
inline void fence_barrier_init() {}
inline void barrier_arrive(uint64_t* barrier) {
  --cuda_host::transactions[barrier].pending;
  cuda_host::transactions[barrier].settle();
}
inline void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  cuda_host::transactions[barrier].bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(uint64_t* barrier, int parity) {
  cuda_host::poll([&] {
    if (cuda_host::transactions[barrier].parity != parity) return true;
    auto& copies = cuda_host::copies_in_flight;
    if (!copies.empty() && cuda_host::descending) {
      copies.back()();
      copies.pop_back();
    } else if (!copies.empty()) {
      copies.front()();
      copies.pop_front();
    }
    return false;
  });
}

inline uint64_t evict_first_policy() { return 0; }
inline void bulk_load(void* dst, const void* src, int bytes, uint64_t* barrier, uint64_t = 0) {
  std::memset(dst, 0xff, bytes);
  cuda_host::copies_in_flight.push_back([=] {
    std::memcpy(dst, src, bytes);
    cuda_host::land(barrier, bytes);
  });
}

inline void bulk_prefetch(const void* src, int bytes, uint64_t) {
  volatile uint8_t last = static_cast<const uint8_t*>(src)[bytes - 1];  // a sanitizer sees a wild address
  (void)last;
}

// Address bits 4-6 are permuted by bits 7-9.
inline uint8_t* swizzled(uintptr_t address) { return reinterpret_cast<uint8_t*>(address ^ (address >> 3 & 0x70)); }

inline void tensor_load(void* dst, const TensorMap* map, int column, int row, uint64_t* barrier) {
  const TensorMap m = *map;
  std::memset(dst, 0xff, m.box_rows * 128);
  cuda_host::copies_in_flight.push_back([=] {
    for (int r = 0; r < m.box_rows; ++r) {
      for (int chunk = 0; chunk < 8; ++chunk) {
        uint8_t* to = swizzled(reinterpret_cast<uintptr_t>(dst) + r * 128 + chunk * 16);
        if (row + r < m.rows) {
          std::memcpy(to, m.data + (row + r) * m.stride + column + chunk * 8, 16);
        } else {
          std::memset(to, 0, 16);
        }
      }
    }
    cuda_host::land(barrier, m.box_rows * 128);
  });
}

inline uint64_t matrix_descriptor(const void* smem) { return reinterpret_cast<uintptr_t>(smem); }
constexpr uint64_t descriptor_offset(int bytes) { return bytes; }

inline void wgmma_fence() {}
template <int kN>
void wgmma(float* d, uint64_t a, uint64_t b, int accumulate) {
  auto& groups = cuda_host::wgmma_groups[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  const int lane = threadIdx.x % 32, feature = threadIdx.x / 32 % 4 * 16 + lane / 4;
  groups.back().push_back([=] {
    for (int i = 0; i < kN / 2; ++i) {
      float sum = accumulate ? d[i] : 0.f;
      for (int k = 0; k < 16; ++k) {
        const uint8_t* av = swizzled(a + (feature + i / 2 % 2 * 8) * 128 + k * 2);
        sum += cuda_host::widen(av) * cuda_host::widen(swizzled(b + (i / 4 * 8 + lane % 4 * 2 + i % 2) * 128 + k * 2));
      }
      d[i] = sum;
    }
  });
}
inline void wgmma_commit() { cuda_host::wgmma_groups[threadIdx.x].emplace_back(); }
template <int kPending>
void wgmma_wait() {
  auto& groups = cuda_host::wgmma_groups[threadIdx.x];
  while (static_cast<int>(groups.size()) > kPending + 1) {
    for (const auto& run : groups.front()) run();
    groups.pop_front();
  }
  cuda_host::Block::current().exchange(0);  // .sync.aligned: the warp's lanes pass together
}
template <int>
void give_registers() {}
template <int>
void take_registers() {}
template <int kCount>
void pin(float (&)[kCount]) {}

}  // namespace orthrus::cuda::sm90
