// A small thread pool for the CPU ops: one parallel region at a time, in which the caller takes part.
#pragma once
#include <cstdint>

namespace orthrus::cpu {

int32_t num_threads();

// The calling thread's own memory, aligned to a cache line and valid until the thread's next call; it only grows. A
// region's body can read the caller's scratch only if the body itself takes none.
float* thread_scratch(int64_t num_floats);

// Which chunks of a region a thread takes.
enum class HandOut {
  kInOrder,      // the next one that is left; if they are uneven, the longest should come first
  kByStretches,  // those of its own stretch in order, then others' from the back: a thread streams memory without jumps
};

// Splits [0, num_items) into num_chunks contiguous ranges of nearly equal size and calls body(context, begin, end) on
// each; returns when all are done. Which thread runs an item never changes a result: no item depends on another.
void parallel_chunks(int64_t num_items, int64_t num_chunks, HandOut hand_out, void (*body)(void*, int64_t, int64_t),
                     void* context);

// Chunks per thread, to even out the threads' pace.
constexpr int64_t kChunksPerThread = 4;

// body(begin, end) over ranges of at least `min_items`. No std::function, so that variant.cpp may use it.
template <typename Body>
inline __attribute__((always_inline)) void parallel_for(int64_t num_items, int64_t min_items, const Body& body,
                                                        int64_t chunks_per_thread = kChunksPerThread) {
  const int64_t most = num_threads() * chunks_per_thread;
  const int64_t chunks = num_items / min_items < most ? num_items / min_items : most;
  parallel_chunks(
      num_items, chunks, HandOut::kByStretches,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// body(item), for few items of uneven cost.
template <typename Body>
inline __attribute__((always_inline)) void parallel_each(int64_t num_items, const Body& body) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) body(item);
  };
  using Range = decltype(range);
  parallel_chunks(
      num_items, num_items, HandOut::kInOrder,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Range*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&range)));
}

}  // namespace orthrus::cpu
