// The part of CUDA that plain kernels use, as host C++: one fiber per thread of a block. Blocks, or clusters of them,
// run one after the other. Barriers and warp exchanges pass control to the next fiber, in ascending or descending
// thread order. A result that depends on the order is a race, and ThreadSanitizer, if available, finds those races on
// which no result depends (see races.h).
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "races.h"

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes)
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __uint_as_float(uint32_t word) {
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, 4);
  return word;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = selector >> 4 * i & 7;
    out |= ((byte < 4 ? x : y) >> byte % 4 * 8 & 0xff) << 8 * i;
  }
  return out;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

namespace cuda_host {

inline bool descending = false;
extern "C" {
inline bool last_cluster_only = false;  // launches leave out all others
}
constexpr int kMaxCluster = 2;
inline int self = 0;  // the running thread, among all of its cluster's
static_assert(kMaxCluster == 2);
inline int rank() { return self >= static_cast<int>(blockDim.x); }  // of the thread's block in the cluster
inline void* const kStream = reinterpret_cast<void*>(0x57ea);  // passed to launchers, which have to launch on it

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

// A thread of a cluster, reused for every cluster. Its context is entered once; from then on control passes by setjmp
// and longjmp, which, unlike swapcontext, need no system calls.
struct Fiber {
  enum State : uint8_t { kReady, kWarp, kBlock, kCluster, kDone };
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  static constexpr int kStackBytes = 1 << 18;
#else
  static constexpr int kStackBytes = 1 << 15;
#endif
  ucontext_t context;
  jmp_buf resume;
  bool entered = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  int exchanges = 0, met[2] = {};  // how often with its warp, with its block
  races::Thread seen_as{};
};

// Points at which the host and launches synchronise, see host_unseen() in __init__.py. The first: what the host has
// done before kernels run. The others: what the threads of a launch have done, alternating from launch to launch.
// Initialised to 1, as zeros would lie where static shared memory does.
extern "C" {
inline uint64_t cuda_host_meetings[3] = {1, 1, 1};
}

// Where threads synchronise, alternating between two places: none leaves the next meeting before all left this one.
struct Meeting {
  uint64_t places[2];
};

// The blocks of a cluster, which is usually a single block.
class Block {
  static constexpr int kMaxWarps = 32;

 public:
  static constexpr int kValueBytes = 40;  // the most that a lane may pass to an exchange
  static Block& current() {
    static Block* block = new Block;
    return *block;
  }

  // Clusters rotate among sets of fibers, lest one's threads look like another's continued; launches alternate too.
  static constexpr int kSets = races::kSought ? 3 : 1;

  // `first_block`: the first of the cluster's `blocks` blocks, neighbours in x, of blockDim.x threads each.
  void run(int launch, int cluster, dim3 first_block, int blocks, const std::function<void()>& kernel) {
    const int threads = blocks * blockDim.x;
    if (threads > kMaxWarps * 32 || (blocks > 1 && blockDim.x % 32)) fail("a cluster that is not modelled");
    set_ = launch % 2 * kSets + cluster % kSets;
    first_block_ = first_block;
    scheduler_seen_as_ = races::current();
    races::forget(meetings_, sizeof(meetings_));
    while (static_cast<int>(fibers().size()) < threads) make_fiber();
    threads_ = threads;
    kernel_ = &kernel;
    std::fill_n(states_, threads, Fiber::kReady);
    while (step()) {
    }
  }

  void wait(Fiber::State state) {
    const races::Unseen unseen;
    Fiber& fiber = fibers()[active_];
    states_[active_] = state;
    if (_setjmp(fiber.resume)) return;
    races::become(scheduler_seen_as_);
    _longjmp(scheduler_, 1);
  }

  // Waits for the whole warp or block. What its threads did before happens before what they do after.
  void meet(Fiber::State state) {
    const races::Unseen unseen;
    const bool all = state == Fiber::kBlock;
    const int turn = fibers()[active_].met[all]++ % 2;
    uint64_t* const place = &meetings_[all ? kMaxWarps + rank() : active_ / 32].places[turn];
    races::release(place);
    wait(state);
    races::acquire(place);
  }

  // Which of the sets of fibers runs.
  int set() const { return set_; }

  // Where threads that fence what they have initialised synchronise with threads that wait for their cluster.
  void* fenced() { return meetings_[kMaxWarps + kMaxCluster].places; }

  int blocks() const { return threads_ / static_cast<int>(blockDim.x); }

  // Whether all threads of the cluster's block `rank` have ended.
  bool has_ended(int rank) const {
    const auto* begin = states_ + rank * blockDim.x;
    return std::count(begin, begin + blockDim.x, Fiber::kDone) == static_cast<int>(blockDim.x);
  }

  // What the warp's lanes have passed to the same exchange; valid until the caller's next one. ``first()``: is the
  // caller the first lane to ask?
  template <typename T>
  struct Lanes {
    const char (*values)[kValueBytes];
    bool* asked;
    const T& operator[](int lane) const { return *reinterpret_cast<const T*>(values[lane]); }
    bool first() const { return !std::exchange(*asked, true); }
  };

  // It orders no other accesses.
  template <typename T>
  Lanes<T> exchange(T value) {
    static_assert(sizeof(T) <= kValueBytes);
    const races::Unseen unseen;
    const int warp = active_ / 32, turn = fibers()[active_].exchanges++ % 2;
    auto& values = values_[warp][turn];
    __builtin_memcpy(values[active_ % 32], &value, sizeof(T));
    asked_[warp][turn] = false;
    wait(Fiber::kWarp);
    return {values, &asked_[warp][turn]};
  }

 private:
  std::deque<Fiber>& fibers() { return sets_[set_]; }

  void make_fiber() {
    const std::string name = "CUDA thread " + std::to_string(fibers().size());
    Fiber& fiber = fibers().emplace_back();
    fiber.seen_as = races::make_thread(name.c_str());
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, [] { current().enter(); }, 0);
  }

  void enter() {
    while (true) {
      begin(fibers()[active_]);
      (*kernel_)();
      wait(Fiber::kDone);
    }
  }

  static void begin(Fiber& fiber) {
    const races::Unseen unseen;
    races::acquire(cuda_host_meetings);
    fiber.exchanges = fiber.met[0] = fiber.met[1] = 0;
  }

  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_)) return;
    races::become(fiber.seen_as);
    if (fiber.entered) _longjmp(fiber.resume, 1);
    fiber.entered = true;
    setcontext(&fiber.context);
  }

  // Runs every ready fiber once, then opens the warp exchanges or the barrier that all live fibers have reached.
  bool step() {
    bool ran = false;
    for (int i = 0; i < threads_; ++i) {
      const int t = descending ? threads_ - 1 - i : i;
      if (states_[t] != Fiber::kReady) continue;
      ran = true;
      active_ = self = t;
      threadIdx.x = t - rank() * blockDim.x;
      blockIdx = first_block_;
      blockIdx.x += rank();
      resume(fibers()[t]);
    }
    for (int first = 0; first < threads_; first += 32) ran |= open(Fiber::kWarp, first, std::min(first + 32, threads_));
    const int of_block = blockDim.x;
    if (!ran)
      for (int first = 0; first < threads_; first += of_block) ran |= open(Fiber::kBlock, first, first + of_block);
    if (!ran) ran = open(Fiber::kCluster, 0, threads_);
    if (!ran && std::count(states_, states_ + threads_, Fiber::kDone) < threads_) fail("threads wait for each other");
    return ran;
  }

  bool open(Fiber::State state, int first, int last) {
    const auto waiting = std::count(states_ + first, states_ + last, state);
    if (waiting + std::count(states_ + first, states_ + last, Fiber::kDone) < last - first) return false;
    std::replace(states_ + first, states_ + last, state, Fiber::kReady);
    return waiting > 0;
  }

  std::deque<Fiber> sets_[2 * kSets];  // deques, in which fibers never move
  Fiber::State states_[kMaxWarps * 32];
  int set_ = 0;
  races::Thread scheduler_seen_as_{};
  Meeting meetings_[kMaxWarps + kMaxCluster + 1];  // for the warps, for the blocks, and for the cluster
  // Of this and the previous exchange of each warp: a lane is at most one exchange ahead of its warp.
  alignas(64) char values_[kMaxWarps][2][32][kValueBytes] = {};
  bool asked_[kMaxWarps][2] = {};
  jmp_buf scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  int threads_ = 0;
  int active_ = 0;
  dim3 first_block_;
};

}  // namespace cuda_host

inline void __syncwarp() { cuda_host::Block::current().meet(cuda_host::Fiber::kWarp); }
inline void __syncthreads() { cuda_host::Block::current().meet(cuda_host::Fiber::kBlock); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = threadIdx.x % 32;
  return cuda_host::Block::current().exchange(value)[lane ^ mask];
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = threadIdx.x % 32;
  return cuda_host::Block::current().exchange(value)[lane < delta ? lane : lane - delta];
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_host::Block::current().exchange(value)[lane];
}

inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned bits = 0;
  const auto lanes = cuda_host::Block::current().exchange<int>(value);
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(lanes[i]) << i;
  return bits;
}

inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }

template <typename T, typename Both>
T reduce_lanes(T value, const Both& both) {
  const auto lanes = cuda_host::Block::current().exchange(value);
  T all = lanes[0];
  for (int i = 1; i < 32; ++i) all = both(all, lanes[i]);
  return all;
}

inline int __reduce_add_sync(unsigned, int value) { return reduce_lanes(value, std::plus<int>()); }
template <typename T>
T __reduce_max_sync(unsigned, T value) {
  return reduce_lanes(value, [](T a, T b) { return std::max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned, T value) {
  return reduce_lanes(value, [](T a, T b) { return std::min(a, b); });
}
