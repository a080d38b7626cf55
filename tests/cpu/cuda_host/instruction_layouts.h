// Where instructions find matrix elements, and where they leave them: the layouts used by the twins of
// csrc/include/orthrus. tests/compile/test_cute.py checks every line against CuTe.
#pragma once
#include <cstdint>

namespace cuda_host {

struct Element {
  int row, column;
};

// An element held in a register: which lane of the warp, and which of the lane's elements.
struct Place {
  int lane, index;
};

// The 128-byte swizzle of tensor copies and matrix descriptors: address bits 4-6 are permuted by bits 7-9.
constexpr uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// A descriptor of a K-major operand under that swizzle: start in bits 0-13 and stride of 8 rows in bits 32-45, both in
// 16 bytes; leading offset (bits 16-29) unused and 1; base offset (49-51) 0, as the pattern begins at multiples of 1024
// bytes; swizzle 1 in bits 62-63. The start is within the first 128 bytes of such a pattern.
constexpr bool is_swizzled_128(uint64_t descriptor) {
  return (descriptor & ~0x00003fff00003fffull) == (1ull << 62 | 1ull << 16) && (descriptor & 0x38) == 0;
}

// Shared-memory address of element (row, k) of a bf16 operand.
constexpr uint32_t operand_address(uint64_t descriptor, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  return swizzle_128(start + row / 8 * stride + row % 8 * 128 + k * 2);
}

// The same for an operand whose rows lie along k: there the leading offset leads from 64 elements of a row to the next.
constexpr bool is_transposed_128(uint64_t descriptor) {
  return is_swizzled_128((descriptor & ~(0x3fffull << 16)) | 1ull << 16) && (descriptor & 0x3f) == 0;
}
constexpr uint32_t transposed_address(uint64_t descriptor, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  return swizzle_128(start + row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128);
}

// Accumulator i of thread t of a warpgroup, wgmma m64nNk16.
constexpr Element wgmma_accumulator(int t, int i) {
  return {t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + t % 4 * 2 + i % 2};
}

// mma m16n8k16: A is [16 x 16], B [8 x 16] (both K-major), two bf16 a register.
constexpr Place mma_a(int row, int k) { return {row % 8 * 4 + k % 8 / 2, k / 8 * 4 + row / 8 * 2 + k % 2}; }
constexpr Place mma_b(int row, int k) { return {row * 4 + k % 8 / 2, k / 8 * 2 + k % 2}; }
constexpr Element mma_accumulator(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// Where ldmatrix takes 16-bit element i of a lane from: the row that lane `row` named, and the element within it.
constexpr Element load_matrix(int lane, int i) { return {i / 2 * 8 + lane / 4, lane % 4 * 2 + i % 2}; }
constexpr Element load_matrix_transposed(int lane, int i) { return {i / 2 * 8 + lane % 4 * 2 + i % 2, lane / 4}; }

}  // namespace cuda_host
