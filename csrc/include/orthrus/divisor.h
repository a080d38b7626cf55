// Division by a number that the host knows. On a GPU, dividing two variables takes over 100 clocks, and the compiler
// places all of them after the wait for the previous kernel.
#pragma once
#include <cstdint>

#include "orthrus/host_device.h"

namespace orthrus {

// Exact for every n >= 0 below 2^31. Method: the reciprocal rounded down, times n + 1 instead of n (Robison, N-bit
// unsigned division via N-bit multiply-add, ARITH 2005). With m = (2^64 - 1 - e) / d, e < d, and n = q * d + s, the
// product (n + 1) * m / 2^64 is below q + (s + 1) / d by at most (n + 1) / 2^64, which is less than 1 / d. So it is at
// least q and below q + 1.
struct Divisor {
  int32_t d;
  uint32_t low, high;  // of floor((2^64 - 1) / d)

  Divisor() = default;
  explicit Divisor(int32_t divisor) : d(divisor) {
    const uint64_t reciprocal = ~uint64_t{0} / static_cast<uint32_t>(divisor);
    low = static_cast<uint32_t>(reciprocal);
    high = static_cast<uint32_t>(reciprocal >> 32);
  }
  ORTHRUS_HD operator int32_t() const { return d; }
};

ORTHRUS_HD int32_t operator/(int32_t n, const Divisor& by) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(n));  // recomputed at each use: in loops, registers are scarcer than time
#endif
  const uint64_t m = static_cast<uint32_t>(n) + 1u;
  return static_cast<int32_t>((m * by.high + (m * by.low >> 32)) >> 32);
}
ORTHRUS_HD int32_t operator%(int32_t n, const Divisor& by) { return n - n / by * by.d; }

}  // namespace orthrus
