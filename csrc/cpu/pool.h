// A small thread pool for the CPU ops: one parallel region at a time, the caller takes part.
#pragma once
#include <cstdint>

namespace orthrus::cpu {

// Splits [0, num_items) into one contiguous range per thread and calls body(context, begin, end) on
// each non-empty range; returns when all are done. `min_items` per thread keeps small regions on
// fewer threads. Which thread runs an item never changes a result: no item depends on another.
void parallel_ranges(int64_t num_items, int64_t min_items, void (*body)(void*, int64_t, int64_t), void* context);

// The same for a callable; no std::function, so that variant.cpp may use it.
template <typename Body>
inline __attribute__((always_inline)) void parallel_for(int64_t num_items, int64_t min_items, const Body& body) {
  parallel_ranges(
      num_items, min_items,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// Calls body(item) once for each item, handing items out in order to whichever thread is free: for
// items of uneven cost.
template <typename Body>
inline __attribute__((always_inline)) void parallel_each(int64_t num_items, const Body& body) {
  int64_t next = 0;
  parallel_for(num_items, 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= num_items) return;
      body(item);
    }
  });
}

}  // namespace orthrus::cpu
