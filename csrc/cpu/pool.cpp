#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "float_mode.h"
#include "orthrus/ops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace orthrus::cpu {
namespace {

// Ops of one pass follow each other within microseconds: workers spin for some tens of them, then sleep,
// which leaves the cores to torch's own threads.
constexpr int kSpins = 4000;

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A thread of the pool. It takes no part in regions of `place` threads or fewer.
struct Worker {
  const int place;  // 1 ...; the caller is 0
  std::atomic<bool> asleep{false};
  std::condition_variable wake;

  explicit Worker(int at) : place(at) {}
};

// It lives as long as the process and only grows: callers that alternate between numbers of threads find theirs ready.
class Pool {
 public:
  // Throws where the system does not start that many; those that it did start stay, and the next call tries again.
  void grow(int num_threads) {
    while (this->num_threads() < num_threads) {
      Worker& worker = workers_.emplace_back(this->num_threads());
      try {
        std::thread([this, &worker] { work(worker); }).detach();
      } catch (const std::system_error& error) {
        workers_.pop_back();
        throw std::runtime_error("the CPU ops cannot have " + std::to_string(num_threads) +
                                 " threads (torch.set_num_threads): the system started " +
                                 std::to_string(this->num_threads() - 1) + " beside the caller's, then " +
                                 error.code().message());
      } catch (...) {
        workers_.pop_back();
        throw;
      }
    }
  }

  // Returns when every chunk is done; rethrows the first exception. A worker that the system has not woken yet, or has
  // preempted, holds up no more than the chunk that it is in: the others take the rest.
  void run(int num_threads, int64_t num_items, int64_t num_chunks, void (*body)(void*, int64_t, int64_t),
           void* context) {
    num_items_ = num_items;
    num_chunks_ = num_chunks;
    body_ = body;
    context_ = context;
    wanted_.store(num_threads, std::memory_order_relaxed);
    unfinished_.store(num_chunks, std::memory_order_relaxed);
    unclaimed_.store(num_chunks);
    wake(num_threads);
    while (run_chunk()) {
    }
    for (int spins = 0; unfinished_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < kSpins) pause_cpu(); else std::this_thread::yield();
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  void wake(int num_threads) {
    for (Worker& worker : workers_) {
      if (worker.place >= num_threads) return;
      if (!worker.asleep.load()) continue;
      { std::lock_guard<std::mutex> lock(mutex_); }  // a worker that is falling asleep must not miss the wake-up
      worker.wake.notify_one();
    }
  }

  // The larger chunks come first, so that threads of one pace end together.
  int64_t begin_of(int64_t chunk) const {
    return num_items_ / num_chunks_ * chunk + std::min(num_items_ % num_chunks_, chunk);
  }

  // Claims the next chunk and runs it; false if none is left. The region's fields do not change from
  // a successful claim until that chunk is counted as finished.
  bool run_chunk() {
    int64_t left = unclaimed_.load(std::memory_order_acquire);
    do {
      if (left == 0) return false;
    } while (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acquire));
    const int64_t chunk = num_chunks_ - left;
    try {
      body_(context_, begin_of(chunk), begin_of(chunk + 1));
    } catch (...) {  // no memory for scratch
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    unfinished_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  void work(Worker& worker) {
    FloatMode::set_default();  // or it would have that of the thread which started it
    // The number may still be that of the region before: then a thread too many takes a chunk, which does no harm.
    const auto takes_part = [&] { return worker.place < wanted_.load(std::memory_order_relaxed); };
    while (true) {
      for (int spins = 0; spins < kSpins; ++spins) {
        if (takes_part() && run_chunk()) spins = 0;
        pause_cpu();
      }
      std::unique_lock<std::mutex> lock(mutex_);
      worker.asleep.store(true);
      worker.wake.wait(lock, [&] { return unclaimed_.load() > 0 && takes_part(); });
      worker.asleep.store(false);
    }
  }

  std::deque<Worker> workers_;  // which stay in place as it grows
  std::mutex mutex_;
  std::exception_ptr error_;
  std::atomic<int> wanted_{1};  // threads, the caller included
  alignas(64) std::atomic<int64_t> unclaimed_{0};
  alignas(64) std::atomic<int64_t> unfinished_{0};
  int64_t num_items_ = 0;
  int64_t num_chunks_ = 0;
  void (*body_)(void*, int64_t, int64_t) = nullptr;
  void* context_ = nullptr;
};

std::atomic<int> wanted_threads{1};
std::mutex region;  // held while a parallel region runs
Pool* pool = nullptr;

// The threads do not survive a fork, and the lock may be held in the child for ever.
void forget_pool_in_child() {
  pool = nullptr;
  new (&region) std::mutex;
}

}  // namespace

void set_num_threads(int32_t num_threads) { wanted_threads = std::max(1, num_threads); }

void parallel_chunks(int64_t num_items, int64_t num_chunks, void (*body)(void*, int64_t, int64_t), void* context) {
  if (num_items <= 0) return;
  const int wanted = wanted_threads.load(std::memory_order_relaxed);
  std::unique_lock<std::mutex> lock(region, std::defer_lock);
  // While another Python thread's op has the pool, this one works alone: same bits.
  if (wanted == 1 || num_chunks <= 1 || !lock.try_lock()) return body(context, 0, num_items);
  if (pool == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
    (void)registered;
    pool = new Pool;
  }
  pool->grow(wanted);
  pool->run(wanted, num_items, num_chunks, body, context);
}

float* thread_scratch(int64_t num_floats) {
  constexpr uintptr_t kLine = 64;
  thread_local std::vector<float> scratch;
  const int64_t size = num_floats + static_cast<int64_t>(kLine / sizeof(float));
  if (static_cast<int64_t>(scratch.size()) < size) scratch.resize(size);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + kLine - 1) / kLine * kLine);
}

int32_t num_threads() { return wanted_threads.load(std::memory_order_relaxed); }

}  // namespace orthrus::cpu
