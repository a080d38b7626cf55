#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "orthrus/ops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace orthrus::cpu {
namespace {

// Ops of one pass follow each other within microseconds: workers spin some tens of them, then sleep,
// so that idle workers leave the cores to torch's own threads.
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
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Returns when every chunk is done; throws what the first that failed has thrown. A worker that the system has not
  // woken yet, or has put aside for another process, holds up no more than the chunk that it is in: the others take the
  // rest.
  void run(int64_t num_items, int64_t num_chunks, void (*body)(void*, int64_t, int64_t), void* context) {
    num_items_ = num_items;
    num_chunks_ = num_chunks;
    body_ = body;
    context_ = context;
    unfinished_.store(num_chunks, std::memory_order_relaxed);
    unclaimed_.store(num_chunks);
    if (num_sleeping_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }  // a worker that is falling asleep must not miss the news
      wake_.notify_all();
    }
    while (run_chunk()) {
    }
    for (int spins = 0; unfinished_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < kSpins) pause_cpu(); else std::this_thread::yield();
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // Claims the next chunk and runs it; false if none is left. The region's fields hold still from
  // a successful claim until that chunk is counted as finished.
  bool run_chunk() {
    int64_t left = unclaimed_.load(std::memory_order_acquire);
    do {
      if (left == 0) return false;
    } while (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acquire));
    const int64_t chunk = num_chunks_ - left;
    try {
      body_(context_, num_items_ * chunk / num_chunks_, num_items_ * (chunk + 1) / num_chunks_);
    } catch (...) {  // no memory for scratch
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    unfinished_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  void work() {
    while (true) {
      for (int spins = 0; spins < kSpins; ++spins) {
        if (run_chunk()) spins = 0;
        pause_cpu();
      }
      std::unique_lock<std::mutex> lock(mutex_);
      num_sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return stop_ || unclaimed_.load() > 0; });
      num_sleeping_.fetch_sub(1);
      if (stop_) return;
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> num_sleeping_{0};
  bool stop_ = false;
  std::exception_ptr error_;
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
  // Another Python thread inside an op keeps the pool; this one then works alone: same bits.
  if (wanted == 1 || num_chunks <= 1 || !lock.try_lock()) return body(context, 0, num_items);
  if (pool == nullptr || pool->num_threads() != wanted) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
    (void)registered;
    delete pool;
    pool = new Pool(wanted);
  }
  pool->run(num_items, num_chunks, body, context);
}

float* thread_scratch(int64_t num_floats) {
  thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < num_floats) scratch.resize(num_floats);
  return scratch.data();
}

int32_t num_threads() { return wanted_threads.load(std::memory_order_relaxed); }

}  // namespace orthrus::cpu
