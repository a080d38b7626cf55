// Describes kernels on the host to ThreadSanitizer so that it finds the races that a device could have. To it every
// thread of a cluster is a thread, as are the units that copy and multiply on its behalf, and only what orders accesses
// on a device orders them here. Fences between memory's proxies are not modelled, clusters of a launch that are kSets
// apart look like one, and of many accesses to a word it remembers a few. Without it, nothing happens here.
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

// What a thread did before it releases `at` happens before what others do after they acquire it.
inline void release(void* at) { __tsan_release(at); }
inline void acquire(void* at) { __tsan_acquire(at); }

// This thread reads here, now.
inline void reads(const void* begin, size_t bytes) { __tsan_read_range(const_cast<void*>(begin), bytes); }

// Accesses of this thread belong to the shim, not to a kernel.
struct Unseen {
  Unseen() { __tsan_ignore_thread_begin(); }
  ~Unseen() { __tsan_ignore_thread_end(); }
  Unseen(const Unseen&) = delete;
};

// Treats this memory as accessed by no thread yet.
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
  ~Unseen() {}  // not trivial, so that compilers do not warn of an unused name
};
inline void forget(void*, size_t) {}

}  // namespace cuda_host::races
#endif
