// The bounds of torch's CPU tensors, including those of tests/sparse.py: this library is loaded before all others and
// sees the calls that allocate them.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <utility>

namespace ptx {
namespace {

constexpr size_t kAlignment = 64;  // of tensors
std::mutex lock;
thread_local bool inside = false;  // the table allocates too

std::map<uintptr_t, uintptr_t>& allocations() {
  static auto& all = *new std::map<uintptr_t, uintptr_t>;
  return all;
}

template <class Body>
void change(Body body) {
  if (inside) return;
  inside = true;
  {
    const std::lock_guard<std::mutex> guard(lock);
    body(allocations());
  }
  inside = false;
}

void add(const void* p, size_t bytes) {
  change([&](auto& all) {
    const auto begin = reinterpret_cast<uintptr_t>(p);
    all.erase(all.lower_bound(begin), all.lower_bound(begin + bytes));  // freed by calls that are not seen here
    all[begin] = begin + bytes;
  });
}

void remove(const void* p) {
  change([&](auto& all) { all.erase(reinterpret_cast<uintptr_t>(p)); });
}

}  // namespace

std::pair<uintptr_t, uintptr_t> allocation(uintptr_t address) {
  const std::lock_guard<std::mutex> guard(lock);
  const auto after = allocations().upper_bound(address);
  if (after == allocations().begin() || address >= std::prev(after)->second) return {1, 0};
  return *std::prev(after);
}

}  // namespace ptx

extern "C" {

int posix_memalign(void** out, size_t alignment, size_t bytes) {
  static const auto real = reinterpret_cast<int (*)(void**, size_t, size_t)>(dlsym(RTLD_NEXT, "posix_memalign"));
  const int error = real(out, alignment, bytes);
  if (!error && alignment >= ptx::kAlignment) ptx::add(*out, bytes);
  return error;
}

void free(void* p) {
  static const auto real = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_NEXT, "free"));
  if (p && reinterpret_cast<uintptr_t>(p) % ptx::kAlignment == 0) ptx::remove(p);
  real(p);
}

void* mmap64(void* at, size_t bytes, int protection, int flags, int file, off64_t offset) {
  using Function = void* (*)(void*, size_t, int, int, int, off64_t);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "mmap64"));
  void* const p = real(at, bytes, protection, flags, file, offset);
  if (p != MAP_FAILED && flags & MAP_NORESERVE) ptx::add(p, bytes);
  return p;
}

int munmap(void* p, size_t bytes) {
  static const auto real = reinterpret_cast<int (*)(void*, size_t)>(dlsym(RTLD_NEXT, "munmap"));
  ptx::remove(p);
  return real(p, bytes);
}
}
