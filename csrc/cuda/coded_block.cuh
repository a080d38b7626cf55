// A block of a bf16 weight in 12 bits an element, without loss: three quarters of the bytes that a pass reads.
//
// An element's upper byte is its sign and the upper seven bits of its exponent. Eight such sevens cover a range of
// 2^16, and nearly all elements of a block lie within its own commonest eight. So an element is its lower byte, and a
// code of 4 bits, its sign and which of the eight; what has another exponent is listed apart, an exception.
//
// Elements lie as wgmma wants them in registers: thread t of a group, for a step over 16 inputs, has elements 0 ... 7,
// of features f and f + 8 in turns of two, f = 16*(t/32) + (t%32)/4, and of inputs 2*(t%4) + {0,1}, then those plus 8.
// A prmt looks four of them up at a time, by a selector of codes without signs; signs are put so that one mask and at
// most one shift bring four of them to the top of their bytes: of elements 0 ... 3 they are the top of nibbles 1, 3, 5
// and 7, of elements 4 ... 7 of nibbles 0, 2, 4 and 6. Eleven instructions give eight elements back.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "row_linear_plan.h"

namespace orthrus::cuda {

constexpr int kListed = 28;  // exceptions that have room in their block

struct alignas(16) CodedBlock {
  uint32_t upper[2];      // a byte each: upper seven bits of eight exponents
  int32_t num_exceptions;
  int32_t elsewhere;      // if there are more than kListed: where they lie, in 4 bytes from the weight's begin
  uint32_t exceptions[kListed];  // bits 0-15: the element, 16-22: thread, 23-26: register, 27: upper half
  uint4 codes[kGroupThreads];    // of thread t, a word for each step over 16 inputs
  uint4 lower[2][kGroupThreads];  // of thread t, eight bytes for each step: steps 0 and 1, then 2 and 3
};
static_assert(sizeof(CodedBlock) == kCodedBlockBytes);

// The registers of A for the block's four steps.
struct Fragment {
  uint32_t a[4][4];
};

// Registers have constant names.
__device__ __forceinline__ void put_exception(Fragment& f, uint32_t exception, int thread) {
  const uint32_t at = exception >> 23 & 15;
  const bool mine = (exception >> 16 & 127) == static_cast<uint32_t>(thread);
  const bool is_upper = exception >> 27 & 1;
#pragma unroll
  for (uint32_t r = 0; r < 16; ++r) {
    uint32_t& word = f.a[r / 4][r % 4];
    if (mine && r == at) word = __byte_perm(word, exception, is_upper ? 0x5410 : 0x3254);
  }
}

__device__ __forceinline__ void decode_step(uint32_t (&a)[4], uint32_t codes, uint32_t lower_0, uint32_t lower_4,
                                            const uint32_t (&table)[2]) {
  const uint32_t selectors = codes & 0x77777777u;
  const uint32_t upper_0 = __byte_perm(table[0], table[1], selectors) | (codes & 0x80808080u);
  const uint32_t upper_4 = __byte_perm(table[0], table[1], selectors >> 16) | (codes << 4 & 0x80808080u);
  a[0] = __byte_perm(lower_0, upper_0, 0x5140);
  a[1] = __byte_perm(lower_0, upper_0, 0x7362);
  a[2] = __byte_perm(lower_4, upper_4, 0x5140);
  a[3] = __byte_perm(lower_4, upper_4, 0x7362);
}

// `weight`: the begin of all blocks.
__device__ __forceinline__ void decode(Fragment& f, const CodedBlock& block, const void* weight) {
  const int thread = threadIdx.x % kGroupThreads;
  const uint4 head = *reinterpret_cast<const uint4*>(&block), codes = block.codes[thread];
  const uint4 low = block.lower[0][thread], high = block.lower[1][thread];
  const uint32_t table[2] = {head.x, head.y};
  decode_step(f.a[0], codes.x, low.x, low.y, table);
  decode_step(f.a[1], codes.y, low.z, low.w, table);
  decode_step(f.a[2], codes.z, high.x, high.y, table);
  decode_step(f.a[3], codes.w, high.z, high.w, table);
  const int count = static_cast<int>(head.z);
  if (count <= kListed) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) put_exception(f, block.exceptions[i], thread);
  } else {
    const uint32_t* list = static_cast<const uint32_t*>(weight) + static_cast<int32_t>(head.w);
#pragma unroll 1
    for (int i = 0; i < count; ++i) put_exception(f, list[i], thread);
  }
}

}  // namespace orthrus::cuda
