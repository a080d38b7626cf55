// bf16 weights in 12 bits, without loss: a pass over few rows takes as long as reading the weights does.
//
// An element's upper byte is its sign and all but the last bit of its exponent. Nearly all upper bytes of a strip (see
// row_linear.h) are among its 16 commonest: in the embedded model, all but 5 in 100,000. So an element is stored as its
// lower byte and a 4-bit code, which selects one of 16 upper bytes; elements with another upper byte are listed
// separately. Unpacking, mostly a lookup and a zip, restores every bit. (The length is fixed, unlike in DFloat11, whose
// 11 bits are Huffman codes: Zhang et al., arXiv 2504.11651.)
//
// With AVX-512 BF16 a pass over one row then takes 0.8 times as long. Where products take most of the time it takes
// longer: on two cores of Zen 5 from 24 rows on, by up to 5%; with AVX2 and much memory bandwidth per core from 2 rows
// on, by up to 14%; on two cores of a Xeon with plain AVX-512 from 12 rows on, by up to 12% (bench_cpu_pass; of Zen 3
// and 4 it measured an earlier layout).
//
// Drafts need no exact weights, as whatever they propose is verified. So they do without the last four of an element's
// seven mantissa bits, which lie apart: a pass that only drafts reads 8 bits of 12, and the diffusion view's own
// weights are stored in 8. In place of the four bits drafts have their middle, 1000 (see draft_value), so that elements
// which are neither tiny nor huge are at most a sixteenth off. In `two_pass` the embedded model then gives 2% fewer
// tokens per cycle on average (of whole blocks, by kind of prompt and instruction set, 6% fewer to 2% more: the pins of
// test_lossless.py). In `one_pass`, where only the diffusion view's own weights are inexact, it gives 0.1% fewer (by
// plan and kind of prompt, 2.4% fewer to 1.5% more: bench_one_pass).
//
// A weight: the leading parts of all strips, then, in 12 bits, their trailing parts, then all exceptions.
// - A leading part: a CodedStrip, then 64 bytes for each step over k. Byte i holds the code of the step's element at i
//   in its lower nibble, and in its upper nibble the upper half of that element's lower byte.
// - A trailing part: 64 bytes for each unit of two steps. Byte i holds the last four bits of the first step's element
//   at i in its lower nibble, of the second step's in its upper nibble, both xor the element's code: xor with the
//   leading byte, they give the lower byte.
// Both are contiguous, since hardware prefetchers would fetch what lies between two pieces of a few KB. Elements are in
// the order of the zip: each 16 bytes hold 8 elements of the step's first WordVec, then 8 of its second.
#pragma once
#include <cstdint>

#include "orthrus/params.h"  // nothing here may be merged across variants: see variant.h

namespace orthrus::cpu {

constexpr int kUpperBytes = 16;    // those that have a code
constexpr int kStepElements = 64;  // of two WordVecs
constexpr int64_t kUnitSteps = 2;
constexpr int64_t kLeadingBytes = kUnitSteps * kStepElements, kTrailingBytes = kStepElements;  // per unit of two steps

// Element `element` of step `step`, in ascending order. Behind a strip's last exception is one with step kNoStep.
struct CodedException {
  int32_t step;
  uint16_t element;
  bf16_t value;
};
constexpr int32_t kNoStep = INT32_MAX;

struct alignas(64) CodedStrip {
  // By code, each table four times, for lookups by 16 bytes: the upper byte, and in drafts, the last four bits xor the
  // code.
  uint8_t upper[4][kUpperBytes], last[4][kUpperBytes];
  // Bytes from the start of this struct. In 8 bits there is no trailing part, and to_trailing is 0.
  int64_t to_trailing, to_exceptions;

  __attribute__((always_inline)) const char* leading() const { return reinterpret_cast<const char*>(this + 1); }
  __attribute__((always_inline)) const char* trailing() const {
    return reinterpret_cast<const char*>(this) + to_trailing;
  }
  __attribute__((always_inline)) const CodedException* exceptions() const {
    return reinterpret_cast<const CodedException*>(reinterpret_cast<const char*>(this) + to_exceptions);
  }
};

// Bytes of a strip's two parts.
inline __attribute__((always_inline)) int64_t leading_strip_bytes(int64_t num_steps) {
  return static_cast<int64_t>(sizeof(CodedStrip)) + num_steps / kUnitSteps * kLeadingBytes;
}
inline __attribute__((always_inline)) int64_t trailing_strip_bytes(int64_t num_steps) {
  return num_steps / kUnitSteps * kTrailingBytes;
}

// What stands for the last four bits of elements with this upper byte in drafts. Zero stays zero, and does not become a
// subnormal number, with which some processors multiply very slowly. Infinity stays infinity, though a NaN may become
// it.
inline __attribute__((always_inline)) int draft_last_bits(int upper) {
  const int exponent = upper & 0x7f;
  return exponent == 0 || exponent == 0x7f ? 0 : 0x8;
}
inline __attribute__((always_inline)) bf16_t draft_value(bf16_t value) {
  return static_cast<bf16_t>((value & 0xfff0) | draft_last_bits(value >> 8));
}

}  // namespace orthrus::cpu
