// The part of CUDA that plain kernels use, as host C++: one fiber per thread of a block, blocks one
// after the other. Barriers and warp exchanges hand control to the next fiber, in ascending or
// descending thread order; a result that depends on the order is a race.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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

// A thread of a block. A context is entered once; from then on control passes by setjmp and longjmp, which, unlike
// swapcontext, ask nothing of the system.
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
  State state = kReady;
  int exchanges = 0;
  // Of this and the previous warp exchange: a lane runs at most one ahead of its warp.
  alignas(16) char value[2][32] = {};
};

class Block {
 public:
  static Block& current() {
    static Block* block = new Block;
    return *block;
  }

  void run(int threads, const std::function<void()>& kernel) {
    fibers_.resize(threads);
    kernel_ = &kernel;
    for (Fiber& fiber : fibers_) {
      fiber.state = Fiber::kReady;
      fiber.entered = false;
      fiber.exchanges = 0;
      ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), Fiber::kStackBytes);  // its last kernel's frames, never returned
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, [] { current().enter(); }, 0);
    }
    while (step()) {
    }
  }

  void wait(Fiber::State state) {
    fibers_[active_].state = state;
    if (!_setjmp(fibers_[active_].resume)) _longjmp(scheduler_, 1);
  }

  // What the warp's lanes pass to the same exchange.
  template <typename T>
  std::array<T, 32> exchange(T value) {
    Fiber& self = fibers_[active_];
    const int slot = self.exchanges++ % 2, first = active_ / 32 * 32;
    static_assert(sizeof(T) <= sizeof(self.value[slot]));
    __builtin_memcpy(self.value[slot], &value, sizeof(T));
    wait(Fiber::kWarp);
    std::array<T, 32> lanes{};
    for (int i = 0; i < 32 && first + i < static_cast<int>(fibers_.size()); ++i)
      __builtin_memcpy(&lanes[i], fibers_[first + i].value[slot], sizeof(T));
    return lanes;
  }

 private:
  void enter() {
    (*kernel_)();
    fibers_[active_].state = Fiber::kDone;
    _longjmp(scheduler_, 1);
  }

  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_)) return;
    if (fiber.entered) _longjmp(fiber.resume, 1);
    fiber.entered = true;
    setcontext(&fiber.context);
  }

  // Runs every ready fiber once, then opens the warp exchanges or the barrier that all live ones reached.
  bool step() {
    const int n = static_cast<int>(fibers_.size());
    bool ran = false;
    for (int i = 0; i < n; ++i) {
      const int t = descending ? n - 1 - i : i;
      if (fibers_[t].state != Fiber::kReady) continue;
      ran = true;
      active_ = t;
      threadIdx.x = t;
      resume(fibers_[t]);
    }
    for (int first = 0; first < n; first += 32) ran |= open(Fiber::kWarp, first, first + 32 < n ? first + 32 : n);
    if (!ran) ran = open(Fiber::kBlock, 0, n);
    for (const Fiber& fiber : fibers_) {
      if (!ran && fiber.state != Fiber::kDone) fail("threads wait for each other");
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

  std::vector<Fiber> fibers_;
  jmp_buf scheduler_;
  const std::function<void()>* kernel_ = nullptr;
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
  int sum = 0;
  for (const int lane : cuda_host::Block::current().exchange(value)) sum += lane;
  return sum;
}

inline int __reduce_max_sync(unsigned, int value) {
  const auto lanes = cuda_host::Block::current().exchange(value);
  return *std::max_element(lanes.begin(), lanes.end());
}
