// bf16 weights in 12 bits, without loss: a pass over few rows takes as long as reading them does.
//
// Nearly all exponents of a strip (see row_linear.h) are among its 16 commonest: of the embedded model's, all but 2 in
// 100,000. So an element is a byte of sign and mantissa, and 4 bits that say which of 16 exponents; what has another
// one is listed apart. Decoding gives every bit back.
//
// On Zen 5 a pass then takes 0.8 of its time at 1 to 8 rows, as long at some 20, and up to 1.05 beyond, where products
// are what takes time (bench_cpu_pass).
//
// A weight: all strips, each a CodedStrip and then a unit for every two steps over k; then all exceptions. A unit: 32
// words of 16 bits, whose nibble v says the exponents in the v-th of the steps' four WordVecs, element by element; then
// the bytes of sign and mantissa of those four, 32 each.
#pragma once
#include <cstdint>

#include "orthrus/params.h"  // nothing here may be merged across variants: see variant.h

namespace orthrus::cpu {

constexpr int kExponents = 16;
constexpr int kStepElements = 64;  // of two WordVecs
constexpr int64_t kUnitSteps = 2;
constexpr int64_t kCodeBytes = 64;  // of a unit
constexpr int64_t kUnitBytes = kCodeBytes + kUnitSteps * kStepElements;
constexpr bf16_t kExponentBits = 0x7f80;

// Element `element` of step `step`. Behind a strip's last one is one of kNoStep.
struct CodedException {
  int32_t step;
  uint16_t element;
  bf16_t value;
};
constexpr int32_t kNoStep = -1;

struct alignas(64) CodedStrip {
  bf16_t exponent[2 * kExponents];  // in their place in an element; twice, for a lookup that takes 5 bits
  int64_t to_exceptions;            // bytes from here

  __attribute__((always_inline)) const char* units() const { return reinterpret_cast<const char*>(this + 1); }
  __attribute__((always_inline)) const CodedException* exceptions() const {
    return reinterpret_cast<const CodedException*>(reinterpret_cast<const char*>(this) + to_exceptions);
  }
};

inline __attribute__((always_inline)) int64_t coded_strip_bytes(int64_t num_steps) {
  return static_cast<int64_t>(sizeof(CodedStrip)) + num_steps / kUnitSteps * kUnitBytes;
}

}  // namespace orthrus::cpu
