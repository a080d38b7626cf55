// A block of a bf16 weight in 12 bits per element, without loss: three quarters of the bytes that a pass reads. Or in 8
// for drafts.
//
// An element's upper byte is its sign and the upper seven bits of its exponent. Eight values of these bits cover a
// range of 2^16, and nearly all elements of a block have one of its eight commonest: in the embedded model, all but 4
// in 100,000. So an element is stored as its lower byte and a 4-bit code: its sign, and which of the eight. Elements
// with any other exponent are listed separately, as exceptions. 94 of 100 of that model's blocks have none.
//
// Drafts need only the part of each block that leads: a pass that only drafts reads no more, and the diffusion view's
// own weights, in 8 bits per element, consist of nothing else. This part lacks the last four of an element's seven
// mantissa bits, and drafts have their middle, 1000, in their place; cpu/coded_weight.h has what this costs and brings.
// Zero becomes 7e-40, and infinity NaN. Exceptions stay exact.
//
// Elements are in the order in which wgmma and mma.sync want them in registers. For a step over 16 inputs, thread t of
// a group has elements 0 ... 7: two of feature f and two of f + 8 for inputs 2*(t%4) + {0,1}, then the same for those
// plus 8, with f = 16*(t/32) + (t%32)/4. One prmt looks up four of them, with their codes without signs as the
// selector. Signs are placed so that one mask and at most one shift bring four of them to the top of their bytes: those
// of elements 0 ... 3 are the top bits of nibbles 1, 3, 5 and 7, those of elements 4 ... 7 of nibbles 0, 2, 4 and 6.
// The upper halves of lower bytes have the same nibbles as the signs. Of the lower halves, elements 0 ... 3 have
// nibbles 0, 2, 4 and 6, and elements 5, 6, 7 and 4 nibbles 1, 3, 5 and 7: one select between the two words puts the
// halves of four bytes together, and for elements 4 ... 7 one rotation by four bits.
//
// DFloat11 (Zhang et al., arXiv 2504.11651) codes exponents by Huffman in 11 bits per element; a fixed length is
// unpacked in place, in a few instructions.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "row_linear_plan.h"

namespace orthrus::cuda {

constexpr int kListed = 12;  // exceptions that fit in their block
constexpr uint32_t kMiddleOfTrailing = 0x88888888;  // what drafts have instead of a word of `trailing`

struct alignas(16) CodedBlock {
  uint32_t upper[2];      // a byte each: upper seven bits of eight exponents
  int32_t num_exceptions;
  int32_t elsewhere;      // with more than kListed exceptions: their offset from the weight's start, in 4 bytes
  uint32_t exceptions[kListed];   // bits 0-15: the element, 16-22: thread, 23-26: register, 27: upper half
  uint4 codes[kGroupThreads];     // of thread t, one word per step
  uint4 leading[kGroupThreads];   // the same: upper halves of the elements' lower bytes
  uint4 trailing[kGroupThreads];  // the same: their lower halves; no block of a weight in 8 bits has them
};
static_assert(sizeof(CodedBlock) == kCodedBlockBytes);
static_assert(offsetof(CodedBlock, trailing) == kLeadingBytes);

// A thread's part of a block, and what it shares with the others.
struct CodedPart {
  uint32_t upper[2], codes[4], leading[4], trailing[4];
  int num_exceptions;
};

__device__ __forceinline__ CodedPart load_part(const CodedBlock& block, bool leading_only) {
  const uint32_t thread = thread_here();
  const uint4 head = *reinterpret_cast<const uint4*>(&block), codes = block.codes[thread];
  const uint4 leading = block.leading[thread];
  uint4 trailing{kMiddleOfTrailing, kMiddleOfTrailing, kMiddleOfTrailing, kMiddleOfTrailing};
  if (!leading_only) trailing = block.trailing[thread];
  return {{head.x, head.y},
          {codes.x, codes.y, codes.z, codes.w},
          {leading.x, leading.y, leading.z, leading.w},
          {trailing.x, trailing.y, trailing.z, trailing.w},
          static_cast<int>(head.z)};
}

// Unpacks step `k`.
__device__ __forceinline__ void decode_step(uint32_t (&a)[4], const CodedPart& part, int k) {
  const uint32_t codes = part.codes[k], selectors = codes & 0x77777777u;
  const uint32_t upper_0 = __byte_perm(part.upper[0], part.upper[1], selectors) | (codes & 0x80808080u);
  const uint32_t upper_4 = __byte_perm(part.upper[0], part.upper[1], selectors >> 16) | (codes << 4 & 0x80808080u);
  const uint32_t leading = part.leading[k], trailing = part.trailing[k];
  const uint32_t lower_0 = (leading & 0xf0f0f0f0u) | (trailing & 0x0f0f0f0fu);
  const uint32_t mixed = (leading & 0x0f0f0f0fu) | (trailing & 0xf0f0f0f0u);
  const uint32_t lower_4 = mixed << 4 | mixed >> 28;
  a[0] = __byte_perm(lower_0, upper_0, 0x5140);
  a[1] = __byte_perm(lower_0, upper_0, 0x7362);
  a[2] = __byte_perm(lower_4, upper_4, 0x5140);
  a[3] = __byte_perm(lower_4, upper_4, 0x7362);
}

__device__ __forceinline__ void put_exceptions(uint32_t (&a)[4][4], const CodedPart& part, const CodedBlock& block,
                                               const void* weight) {
  const uint32_t thread = thread_here();
#pragma unroll 1
  for (int i = 0; i < part.num_exceptions; ++i) {
    const uint32_t exception = part.num_exceptions <= kListed
                                   ? block.exceptions[i]
                                   : static_cast<const uint32_t*>(weight)[static_cast<int64_t>(block.elsewhere) + i];
    if ((exception >> 16 & 127) != thread) continue;
    const uint32_t bytes = exception >> 27 & 1 ? 0x5410 : 0x3254;
#pragma unroll
    for (uint32_t r = 0; r < 16; ++r) {  // registers have constant names
      uint32_t& word = a[r / 4][r % 4];
      if ((exception >> 23 & 15) == r) word = __byte_perm(word, exception, bytes);
    }
  }
}

// Unpacks the registers of A for all steps. `weight`: where its blocks begin.
__device__ __forceinline__ void decode(uint32_t (&a)[4][4], const CodedPart& part, const CodedBlock& block,
                                       const void* weight) {
#pragma unroll
  for (int k = 0; k < 4; ++k) decode_step(a[k], part, k);
  put_exceptions(a, part, block, weight);
}

}  // namespace orthrus::cuda
