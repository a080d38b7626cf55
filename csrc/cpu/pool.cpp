#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "orthrus/ops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace orthrus::cpu {
namespace {

// Ops of one pass follow each other within microseconds: workers spin that long, then sleep, so
// that idle workers leave the cores to torch's own threads.
constexpr int kSpins = 4000;

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int num_threads) {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t num_items, int num_ranges, void (*body)(void*, int64_t, int64_t), void* context) {
    num_items_ = num_items;
    num_ranges_ = num_ranges;
    body_ = body;
    context_ = context;
    pending_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);  // a worker about to sleep must not miss the change
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (num_sleeping_.load() > 0) wake_.notify_all();
    run_range(0);
    for (int spins = 0; pending_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < kSpins) pause_cpu(); else std::this_thread::yield();
    }
  }

 private:
  void run_range(int index) {
    if (index >= num_ranges_) return;
    const int64_t begin = num_items_ * index / num_ranges_;
    const int64_t end = num_items_ * (index + 1) / num_ranges_;
    if (begin < end) body_(context_, begin, end);
  }

  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      for (int spins = 0; generation_.load(std::memory_order_acquire) == seen; ++spins) {
        if (spins < kSpins) {
          pause_cpu();
          continue;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        num_sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        num_sleeping_.fetch_sub(1);
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stop_) return;
      run_range(index);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> num_sleeping_{0};
  std::atomic<int> pending_{0};
  bool stop_ = false;
  int64_t num_items_ = 0;
  int num_ranges_ = 0;
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

void parallel_ranges(int64_t num_items, int64_t min_items, void (*body)(void*, int64_t, int64_t), void* context) {
  if (num_items <= 0) return;
  const int wanted = wanted_threads.load(std::memory_order_relaxed);
  const int ranges = static_cast<int>(std::min<int64_t>(wanted, std::max<int64_t>(1, num_items / min_items)));
  std::unique_lock<std::mutex> lock(region, std::defer_lock);
  // Another Python thread inside an op keeps the pool; this one then works alone: same bits.
  if (ranges == 1 || !lock.try_lock()) return body(context, 0, num_items);
  if (pool == nullptr || pool->num_threads() != wanted) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
    (void)registered;
    delete pool;
    pool = new Pool(wanted);
  }
  pool->run(num_items, ranges, body, context);
}

}  // namespace orthrus::cpu
