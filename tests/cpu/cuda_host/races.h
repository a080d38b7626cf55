// What ThreadSanitizer is told of kernels on the host, so that it finds the races that a device could have: to it every
// thread of a cluster is a thread, as are those that copy and multiply in its stead, and nothing orders their accesses
// but what does on a device. Not modelled are fences between memory's proxies; clusters of a launch that are kSets
// apart are one to it; and of many accesses to a word it remembers a few. Without it, nothing happens here.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>

extern "C" {
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
void __tsan_java_alloc(unsigned long begin, unsigned long bytes);
void __tsan_java_free(unsigned long begin, unsigned long bytes);
void __tsan_read_range(void* begin, unsigned long bytes);
}

namespace cuda_host::races {

constexpr bool kSought = true;
using Thread = void*;

inline Thread current() { return __tsan_get_current_fiber(); }
inline Thread make_thread(const char* name) {
  const Thread thread = __tsan_create_fiber(0);
  __tsan_set_fiber_name(thread, name);
  return thread;
}
inline void become(Thread thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }

// What a thread did before it releases `at` comes before what others do after they acquire it.
inline void release(void* at) { __tsan_release(at); }
inline void acquire(void* at) { __tsan_acquire(at); }

// This thread reads here, now.
inline void reads(const void* begin, size_t bytes) { __tsan_read_range(const_cast<void*>(begin), bytes); }

// The accesses of this thread are the shim's own.
struct Unseen {
  Unseen() { __tsan_ignore_thread_begin(); }
  ~Unseen() { __tsan_ignore_thread_end(); }
  Unseen(const Unseen&) = delete;
};

// Nobody has accessed this memory yet.
inline void forget(void* begin, size_t bytes) {
  if (bytes == 0) return;
  const auto address = reinterpret_cast<unsigned long>(begin);
  __tsan_java_free(address, bytes);
  __tsan_java_alloc(address, bytes);
}

}  // namespace cuda_host::races

#else

namespace cuda_host::races {

constexpr bool kSought = false;
using Thread = int;

inline Thread current() { return 0; }
inline Thread make_thread(const char*) { return 0; }
inline void become(Thread) {}
inline void release(void*) {}
inline void acquire(void*) {}
inline void reads(const void*, size_t) {}
struct Unseen {
  Unseen() {}
  ~Unseen() {}  // not trivial: a name that is not used is none to warn of
};
inline void forget(void*, size_t) {}

}  // namespace cuda_host::races
#endif
