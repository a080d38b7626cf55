#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <array>
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

// Ops of one pass follow each other within microseconds: workers spin for about 100 microseconds, then sleep, which
// leaves the cores to torch's own threads.
constexpr int kSpins = 4000;
// With more threads, some share a stretch.
constexpr int kMostStretches = 256;

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The chunks of a region that no thread has claimed yet; they are contiguous.
class alignas(64) Stretch {
 public:
  static constexpr int64_t kNone = -1;

  void set(int64_t first, int64_t last) { ends_.store(pack(first, last), std::memory_order_release); }

  // Claims a chunk from the front or the back; kNone if there is none.
  int64_t claim(bool front) {
    uint64_t ends = ends_.load(std::memory_order_relaxed);
    while (true) {
      const int64_t first = static_cast<int64_t>(ends >> 32), last = static_cast<int64_t>(ends & 0xffffffffu);
      if (first == last) return kNone;
      const uint64_t rest = front ? pack(first + 1, last) : pack(first, last - 1);
      if (ends_.compare_exchange_weak(ends, rest, std::memory_order_acquire, std::memory_order_relaxed)) {
        return front ? first : last - 1;
      }
    }
  }

 private:
  static uint64_t pack(int64_t first, int64_t last) {
    return static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(last);
  }

  std::atomic<uint64_t> ends_{0};
};

// A thread of the pool. It takes no part in regions of `place` threads or fewer.
struct Worker {
  const int place;  // 1 ...; the caller is 0
  std::atomic<bool> asleep{false};
  std::condition_variable wake;

  explicit Worker(int at) : place(at) {}
};

// Lives as long as the process and only grows: callers that alternate between thread counts find their threads ready.
class Pool {
 public:
  // Throws if the system does not start that many; those that it did start stay, and the next call tries again.
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
  // preempted, delays only the chunk that it is in: the others take the rest.
  void run(int num_threads, int64_t num_items, int64_t num_chunks, HandOut hand_out,
           void (*body)(void*, int64_t, int64_t), void* context) {
    num_items_ = num_items;
    num_chunks_ = num_chunks;
    body_ = body;
    context_ = context;
    wanted_.store(num_threads, std::memory_order_relaxed);
    unfinished_.store(num_chunks, std::memory_order_relaxed);
    const int64_t most = hand_out == HandOut::kInOrder ? 1 : std::min<int64_t>(num_threads, kMostStretches);
    const int64_t num_stretches = std::min(most, num_chunks);
    num_stretches_.store(static_cast<int>(num_stretches), std::memory_order_relaxed);
    for (int64_t i = 0; i < num_stretches; ++i) {
      stretches_[i].set(num_chunks * i / num_stretches, num_chunks * (i + 1) / num_stretches);
    }
    const uint64_t region = regions_.fetch_add(1) + 1;
    wake(num_threads);
    run_chunks(0, region);
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

  int64_t begin_of(int64_t chunk) const { return num_items_ * chunk / num_chunks_; }

  // Until no chunk is left to claim, or until the next region begins, where the thread's own stretch comes first again.
  void run_chunks(int place, uint64_t region) {
    const int num_stretches = num_stretches_.load(std::memory_order_relaxed);
    for (int i = 0; i < num_stretches && regions_.load(std::memory_order_relaxed) == region; ++i) {
      Stretch& stretch = stretches_[(place + i) % num_stretches];
      int64_t done = 0;
      for (int64_t chunk; (chunk = stretch.claim(i == 0)) != Stretch::kNone; ++done) run_chunk(chunk);
      if (done) unfinished_.fetch_sub(done, std::memory_order_release);
    }
  }

  // Runs a chunk that is claimed and not yet counted as finished: until then the region's fields do not change.
  void run_chunk(int64_t chunk) {
    try {
      body_(context_, begin_of(chunk), begin_of(chunk + 1));
    } catch (...) {  // no memory for scratch
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void work(Worker& worker) {
    FloatMode::set_default();  // or it would inherit that of the thread that started it
    uint64_t seen = 0;
    // Thread count and stretches may be another region's by now: then a thread too many takes chunks, or one too few,
    // which does no harm.
    const auto is_called = [&] {
      return regions_.load() != seen && worker.place < wanted_.load(std::memory_order_relaxed);
    };
    while (true) {
      for (int spins = 0; spins < kSpins; ++spins) {
        if (is_called()) {
          seen = regions_.load();
          run_chunks(worker.place, seen);
          spins = 0;
        }
        pause_cpu();
      }
      std::unique_lock<std::mutex> lock(mutex_);
      worker.asleep.store(true);
      worker.wake.wait(lock, is_called);
      worker.asleep.store(false);
    }
  }

  std::deque<Worker> workers_;  // its elements stay in place as it grows
  std::mutex mutex_;
  std::exception_ptr error_;
  std::atomic<int> wanted_{1};  // threads, the caller included
  std::atomic<int> num_stretches_{0};
  std::array<Stretch, kMostStretches> stretches_;
  alignas(64) std::atomic<uint64_t> regions_{0};  // begun so far
  alignas(64) std::atomic<int64_t> unfinished_{0};  // chunks
  int64_t num_items_ = 0;
  int64_t num_chunks_ = 0;
  void (*body_)(void*, int64_t, int64_t) = nullptr;
  void* context_ = nullptr;
};

std::atomic<int> wanted_threads{1};
std::mutex region;  // held while a parallel region runs
Pool* pool = nullptr;

// The threads do not survive a fork, and in the child the lock may stay held for ever.
void forget_pool_in_child() {
  pool = nullptr;
  new (&region) std::mutex;
}

}  // namespace

void set_num_threads(int32_t num_threads) { wanted_threads = std::max(1, num_threads); }

void parallel_chunks(int64_t num_items, int64_t num_chunks, HandOut hand_out, void (*body)(void*, int64_t, int64_t),
                     void* context) {
  if (num_items <= 0) return;
  const int wanted = wanted_threads.load(std::memory_order_relaxed);
  std::unique_lock<std::mutex> lock(region, std::defer_lock);
  // While another Python thread's op has the pool, this one runs on the calling thread alone: same bits.
  if (wanted == 1 || num_chunks <= 1 || !lock.try_lock()) return body(context, 0, num_items);
  if (pool == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
    (void)registered;
    pool = new Pool;
  }
  pool->grow(wanted);
  pool->run(wanted, num_items, num_chunks, hand_out, body, context);
}

float* thread_scratch(int64_t num_floats) {
  struct alignas(64) Line {
    float values[16];
  };
  thread_local std::vector<Line> scratch;
  const size_t lines = (num_floats + 15) / 16;
  if (scratch.size() < lines) {
    scratch.clear();  // or it grows to twice its size, and copies what nobody reads
    scratch.resize(lines);
  }
  return reinterpret_cast<float*>(scratch.data());
}

int32_t num_threads() { return wanted_threads.load(std::memory_order_relaxed); }

}  // namespace orthrus::cpu
