// Twin of csrc/include/orthrus/sm80.cuh for host-compiled kernels. A cp.async lands only when its
// group is waited for, so that a missing wait reads poison.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "cuda_runtime.h"
#include "instruction_layouts.h"

#define __host__
#define __align__(bytes) __attribute__((aligned(bytes)))

// Aligned as on a device, so that the compiler never accesses them in a way that would fault there.
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace cuda_host {

constexpr int kMaxThreads = 1024;
inline int num_sms = 1;

// Polls until `ready`; a thread that polls for ever is a deadlock.
template <typename Ready>
void poll(const Ready& ready) {
  for (int turns = 0; !ready(); ++turns) {
    if (turns == 1000000) {
      std::fprintf(stderr, "cuda_host: thread %u of block %u polls for ever\n", threadIdx.x, blockIdx.x);
      std::abort();
    }
    Block::current().wait(Fiber::kReady);
  }
}

struct NamedBarrier {
  int arrived = 0, generation = 0;
  Meeting meeting{};
};

struct Copy {
  uint8_t* dst;
  const void* src;
};

inline std::map<int, NamedBarrier> named_barriers;

// What each thread has asked for and not yet waited for, group by group; the last group is open.
template <typename T>
using Groups = std::array<std::deque<std::vector<T>>, kMaxThreads>;
inline Groups<Copy> copy_groups;

template <typename T>
void add_to_group(Groups<T>& groups, const T& asked) {
  const races::Unseen unseen;
  auto& mine = groups[self];
  if (mine.empty()) mine.emplace_back();
  mine.back().push_back(asked);
}
template <typename T>
void close_group(Groups<T>& groups) {
  const races::Unseen unseen;
  groups[self].emplace_back();
}
// Runs what was asked for, except for the last `most` closed groups.
template <typename T, typename Run>
void run_groups(Groups<T>& groups, int most, const Run& run) {
  auto next = [&](std::vector<T>& group) {
    const races::Unseen unseen;
    auto& mine = groups[self];
    group.clear();
    if (static_cast<int>(mine.size()) <= most + 1) return false;
    group = std::move(mine.front());
    mine.pop_front();
    return true;
  };
  for (std::vector<T> group; next(group);) {
    for (const T& asked : group) run(asked);
  }
}

inline float widen(const uint8_t* bf16) {
  uint16_t half;
  std::memcpy(&half, bf16, 2);
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

struct MmaOperands {
  uint32_t words[6];  // of A and B
  float sums[4];
};

// Where each element of a matrix lies among what the lanes of a warp exchange, in bytes.
template <int kRows, auto kLayout>
constexpr auto offsets_in_lanes(int first_word) {
  std::array<uint16_t, kRows * 16> offsets{};
  for (int i = 0; i < kRows * 16; ++i) {
    const Place at = kLayout(i / 16, i % 16);
    offsets[i] = at.lane * Block::kValueBytes + first_word * 4 + at.index * 2;
  }
  return offsets;
}

constexpr int kMaxSharedBytes = 227 * 1024;  // the most that a block may ask for
alignas(1024) inline uint8_t dynamic_shared[kMaxCluster][kMaxSharedBytes + 1024];  // one for each block of a cluster
inline int shared_bytes = 0;            // as the launch asked for
inline bool waited[kMaxThreads];        // threads that have called pdl_wait
inline bool proxy_fenced[kMaxThreads];  // and have fenced since then, for copies of what they waited for

// Before pdl_wait, another kernel may still be writing what this thread is about to touch.
inline void need_wait() {
  if (!waited[self]) fail("results of the stream are touched before pdl_wait");
}

}  // namespace cuda_host

using cudaError_t = int;
enum { cudaErrorNoDevice = 100, cudaErrorMisalignedAddress = 716 };

using std::max;
using std::min;

inline float __fdividef(float a, float b) { return std::fabs(b) < 8.507059e37f ? a / b : a * 0.0f; }

inline int atomicAdd(int32_t* p, int32_t value) {
  cuda_host::need_wait();
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
inline void __stcg(float4* p, float4 value) {
  cuda_host::need_wait();
  *p = value;
}
namespace orthrus::cuda {

inline int add_acq_rel(int32_t* counter, int value) {
  cuda_host::need_wait();
  return __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
}
inline void load_l2_if(float4& v, const float4* p, bool wanted) {
  if (!wanted) return;
  cuda_host::need_wait();
  v = *p;
}

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }
inline uint8_t* dynamic_shared() { return cuda_host::dynamic_shared[cuda_host::rank()]; }

inline void named_barrier(int id, int threads) {
  const cuda_host::races::Unseen unseen;
  cuda_host::NamedBarrier& barrier = cuda_host::named_barriers[id + 16 * cuda_host::rank()];
  const int generation = barrier.generation;
  uint64_t* const place = &barrier.meeting.places[generation % 2];
  cuda_host::races::release(place);
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  cuda_host::poll([&] { return barrier.generation != generation; });
  cuda_host::races::acquire(place);
}

inline void copy16(SharedAddress dst, const void* src, bool valid) {
  cuda_host::need_wait();
  if (dst % 16 || (valid && reinterpret_cast<uintptr_t>(src) % 16)) cuda_host::fail("a copy that is not aligned");
  uint8_t* to = reinterpret_cast<uint8_t*>(dst);
  std::memset(to, 0xff, 16);
  if (valid) cuda_host::races::reads(src, 16);
  cuda_host::add_to_group(cuda_host::copy_groups, {to, valid ? src : nullptr});
}
inline uint64_t evict_first_policy() { return 0; }
inline void copy16(SharedAddress dst, const void* src, bool valid, uint64_t /*policy*/) { copy16(dst, src, valid); }
inline void copy_commit() { cuda_host::close_group(cuda_host::copy_groups); }
template <int kPending>
void copy_wait() {
  cuda_host::run_groups(cuda_host::copy_groups, kPending, [](const cuda_host::Copy& copy) {
    if (copy.src) {
      std::memcpy(copy.dst, copy.src, 16);
    } else {
      std::memset(copy.dst, 0, 16);
    }
  });
}

template <auto kLayout>
void load_elements(uint32_t (&r)[4], SharedAddress row) {
  const auto rows = cuda_host::Block::current().exchange(row);
  for (int i = 0; i < 8; ++i) {
    const auto [from, column] = kLayout(threadIdx.x % 32, i);
    std::memcpy(reinterpret_cast<uint8_t*>(r) + i * 2, reinterpret_cast<const uint8_t*>(rows[from]) + column * 2, 2);
  }
}
inline void load_matrices(uint32_t (&r)[4], SharedAddress row) { load_elements<cuda_host::load_matrix>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
  load_elements<cuda_host::load_matrix_transposed>(r, row);
}

inline void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const cuda_host::races::Unseen unseen;  // no device memory is touched
  const cuda_host::MmaOperands mine{{a[0], a[1], a[2], a[3], b0, b1}, {d[0], d[1], d[2], d[3]}};
  const auto lanes = cuda_host::Block::current().exchange(mine);
  // The first lane multiplies for all of them: none reaches the next mma before all have read their sums.
  using Row = float __attribute__((vector_size(32)));
  static Row sums_of_warps[cuda_host::kMaxThreads / 32][16];
  Row* const sums = sums_of_warps[cuda_host::self / 32];
  if (lanes.first()) {
    constexpr auto kA = cuda_host::offsets_in_lanes<16, cuda_host::mma_a>(0);
    constexpr auto kB = cuda_host::offsets_in_lanes<8, cuda_host::mma_b>(4);
    const auto* operands = reinterpret_cast<const uint8_t*>(lanes.values);
    Row columns[16];
    for (int i = 0; i < 8 * 16; ++i) columns[i % 16][i / 16] = cuda_host::widen(operands + kB[i]);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const auto [row, column] = cuda_host::mma_accumulator(lane, i);
        sums[row][column] = lanes[lane].sums[i];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) sums[row] += cuda_host::widen(operands + kA[row * 16 + k]) * columns[k];
    }
  }
  for (int i = 0; i < 4; ++i) {
    const auto [row, column] = cuda_host::mma_accumulator(threadIdx.x % 32, i);
    d[i] = sums[row][column];
  }
}

inline uint32_t pack_bf16(float lo, float hi) {
  auto round = [](float f) -> uint32_t {
    uint32_t word;
    std::memcpy(&word, &f, 4);
    if (f != f) return 0x7fff;
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
  };
  return round(lo) | round(hi) << 16;
}

}  // namespace orthrus::cuda
