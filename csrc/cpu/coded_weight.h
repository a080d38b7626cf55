// bf16 weights in 12 bits, without loss: a pass over few rows takes as long as reading the weights does.
//
// An element's upper byte is its sign and all but the last bit of its exponent. Nearly all upper bytes of a strip (see
// row_linear.h) are among its 16 commonest: in the embedded model, all but 5 in 100,000. So an element is stored as its
// lower byte and a 4-bit code, which selects one of 16 upper bytes; elements with another upper byte are listed
// separately. Unpacking, a lookup and a zip, restores every bit. (The length is fixed, unlike in DFloat11, whose 11
// bits are Huffman codes: Zhang et al., arXiv 2504.11651.)
//
// A pass over one row then takes 0.8 times as long. Where products take most of the time it takes longer: on two cores
// of Zen 3 from some 6 rows on, by up to 7%, of Zen 4 from 64 on, by up to 3%, of Zen 5 from 16 on, by up to 8%
// (bench_cpu_pass). With AVX2 and more memory bandwidth per core than on Zen 3, so do 2 and 4 rows, by up to 13%.
//
// A weight: all strips, each a CodedStrip and then one unit for every two steps over k; then all exceptions. A unit: 64
// bytes of codes, then the first step's lower bytes, then the second's. Byte i of the codes holds the code of the first
// step's element at i in its lower nibble, that of the second step's in its upper nibble. Elements are in the order of
// the zip: each 16 bytes hold 8 elements of the step's first WordVec, then 8 of its second.
#pragma once
#include <cstdint>

#include "orthrus/params.h"  // nothing here may be merged across variants: see variant.h

namespace orthrus::cpu {

constexpr int kUpperBytes = 16;    // those that have a code
constexpr int kStepElements = 64;  // of two WordVecs
constexpr int64_t kUnitSteps = 2;
constexpr int64_t kUnitBytes = kStepElements + kUnitSteps * kStepElements;

// Element `element` of step `step`, in ascending order. Behind a strip's last exception is one with step kNoStep.
struct CodedException {
  int32_t step;
  uint16_t element;
  bf16_t value;
};
constexpr int32_t kNoStep = INT32_MAX;

struct alignas(64) CodedStrip {
  uint8_t upper[4][kUpperBytes];  // the same table four times, for lookups by 16 bytes
  int64_t to_exceptions;          // bytes from the start of this struct

  __attribute__((always_inline)) const char* units() const { return reinterpret_cast<const char*>(this + 1); }
  __attribute__((always_inline)) const CodedException* exceptions() const {
    return reinterpret_cast<const CodedException*>(reinterpret_cast<const char*>(this) + to_exceptions);
  }
};

inline __attribute__((always_inline)) int64_t coded_strip_bytes(int64_t num_steps) {
  return static_cast<int64_t>(sizeof(CodedStrip)) + num_steps / kUnitSteps * kUnitBytes;
}

}  // namespace orthrus::cpu
