// The part of CUDA that plain kernels use, as host C++: one fiber per thread of a block, blocks one
// after the other. Barriers and warp exchanges hand control to the next fiber, in ascending or
// descending thread order; a result that depends on the order is a race.
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
#include <vector>

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

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

namespace cuda_host {

inline bool descending = false;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

// A thread of a block, of every block in turn. Its context is entered once; from then on control passes by setjmp and
// longjmp, which, unlike swapcontext, ask nothing of the system.
struct Fiber {
  enum State { kReady, kWarp, kBlock, kDone };
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int kStackBytes = 1 << 18;
#else
  static constexpr int kStackBytes = 1 << 15;
#endif
  ucontext_t context;
  jmp_buf resume;
  bool entered = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = kDone;
  int exchanges = 0;
};

class Block {
  static constexpr int kMaxWarps = 32, kValueBytes = 32;

 public:
  static Block& current() {
    static Block* block = new Block;
    return *block;
  }

  void run(int threads, const std::function<void()>& kernel) {
    while (static_cast<int>(fibers_.size()) < threads) make_fiber();
    threads_ = threads;
    kernel_ = &kernel;
    for (int t = 0; t < threads; ++t) fibers_[t].state = Fiber::kReady;
    while (step()) {
    }
  }

  void wait(Fiber::State state) {
    fibers_[active_].state = state;
    if (!_setjmp(fibers_[active_].resume)) _longjmp(scheduler_, 1);
  }

  // What the warp's lanes have passed to the same exchange; until the caller's next one.
  template <typename T>
  struct Lanes {
    const char (*values)[kValueBytes];
    const T& operator[](int lane) const { return *reinterpret_cast<const T*>(values[lane]); }
  };

  template <typename T>
  Lanes<T> exchange(T value) {
    static_assert(sizeof(T) <= kValueBytes);
    auto& values = values_[active_ / 32][fibers_[active_].exchanges++ % 2];
    __builtin_memcpy(values[active_ % 32], &value, sizeof(T));
    wait(Fiber::kWarp);
    return {values};
  }

 private:
  void make_fiber() {
    Fiber& fiber = fibers_.emplace_back();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, [] { current().enter(); }, 0);
  }

  void enter() {
    while (true) {
      fibers_[active_].exchanges = 0;
      (*kernel_)();
      wait(Fiber::kDone);
    }
  }

  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_)) return;
    if (fiber.entered) _longjmp(fiber.resume, 1);
    fiber.entered = true;
    setcontext(&fiber.context);
  }

  // Runs every ready fiber once, then opens the warp exchanges or the barrier that all live ones reached.
  bool step() {
    bool ran = false;
    for (int i = 0; i < threads_; ++i) {
      const int t = descending ? threads_ - 1 - i : i;
      if (fibers_[t].state != Fiber::kReady) continue;
      ran = true;
      active_ = t;
      threadIdx.x = t;
      resume(fibers_[t]);
    }
    for (int first = 0; first < threads_; first += 32) ran |= open(Fiber::kWarp, first, std::min(first + 32, threads_));
    if (!ran) ran = open(Fiber::kBlock, 0, threads_);
    for (int t = 0; t < threads_; ++t) {
      if (!ran && fibers_[t].state != Fiber::kDone) fail("threads wait for each other");
    }
    return ran;
  }

  bool open(Fiber::State state, int first, int last) {
    int waiting = 0;
    for (int t = first; t < last; ++t) {
      if (fibers_[t].state == state) {
        ++waiting;
      } else if (fibers_[t].state != Fiber::kDone) {
        return false;
      }
    }
    for (int t = first; t < last; ++t) {
      if (fibers_[t].state == state) fibers_[t].state = Fiber::kReady;
    }
    return waiting > 0;
  }

  std::deque<Fiber> fibers_;  // which stay where they are
  // Of this and the previous exchange of each warp: a lane runs at most one ahead of its warp.
  alignas(64) char values_[kMaxWarps][2][32][kValueBytes] = {};
  jmp_buf scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  int threads_ = 0;
  int active_ = 0;
};

}  // namespace cuda_host

inline void __syncwarp() { cuda_host::Block::current().wait(cuda_host::Fiber::kWarp); }
inline void __syncthreads() { cuda_host::Block::current().wait(cuda_host::Fiber::kBlock); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = threadIdx.x % 32;
  return cuda_host::Block::current().exchange(value)[lane ^ mask];
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

inline int __reduce_add_sync(unsigned, int value) {
  const auto lanes = cuda_host::Block::current().exchange(value);
  int sum = 0;
  for (int i = 0; i < 32; ++i) sum += lanes[i];
  return sum;
}

inline int __reduce_max_sync(unsigned, int value) {
  const auto lanes = cuda_host::Block::current().exchange(value);
  int most = lanes[0];
  for (int i = 1; i < 32; ++i) most = std::max(most, lanes[i]);
  return most;
}
