// How the calling thread rounds: to nearest, subnormal numbers included. Some libraries make a thread flush subnormals
// to zero, but results must not depend on which thread computes them.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace orthrus::cpu {

// Sets the default mode while it lives, then restores the previous one.
class FloatMode {
 public:
  FloatMode() : before_(get()) {
    if (before_ != kDefault) set(kDefault);
  }
  ~FloatMode() {
    if (before_ != kDefault) set(before_);
  }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

  static void set_default() { set(kDefault); }

 private:
#if defined(__x86_64__)
  using Bits = uint32_t;
  static constexpr Bits kDefault = 0x1f80;  // exceptions masked
  static constexpr Bits kFlags = 0x3f;  // exceptions that have occurred
  static Bits get() { return _mm_getcsr() & ~kFlags; }
  static void set(Bits bits) { _mm_setcsr(bits); }
#elif defined(__aarch64__)
  using Bits = uint64_t;
  static constexpr Bits kDefault = 0;
  static Bits get() {
    Bits bits;
    asm volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static void set(Bits bits) { asm volatile("msr fpcr, %0" : : "r"(bits)); }
#else
  using Bits = uint32_t;
  static constexpr Bits kDefault = 0;
  static Bits get() { return kDefault; }
  static void set(Bits) {}
#endif

  const Bits before_;
};

}  // namespace orthrus::cpu
