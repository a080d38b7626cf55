// The 64-bit descriptor that gives wgmma the location of an operand in shared memory. Kept apart from the instructions,
// so that host tests can decode the bits that the kernels pass.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace orthrus::cuda::sm90 {

constexpr uint64_t kSwizzle128 = 1ull << 62;
constexpr uint64_t kStrideOf8Rows = static_cast<uint64_t>(1024 >> 4) << 32;

// K-major operand in rows of 64 bf16 under the 128-byte swizzle, 8 rows per 1024 bytes. `address` is a multiple of
// 1024; a step along K, within the 128 bytes, is added to the descriptor.
__host__ __device__ constexpr uint64_t matrix_descriptor_at(uint32_t address) {
  constexpr uint64_t kUnusedLeading = 1ull << 16;
  return kSwizzle128 | kStrideOf8Rows | kUnusedLeading | ((address & 0x3ffff) >> 4);
}

// The same memory as an operand whose rows lie along K. Columns from the 64th on are `bytes_to_next_columns` further;
// a step along K is some rows, a multiple of 8.
__host__ __device__ constexpr uint64_t transposed_descriptor_at(uint32_t address, int bytes_to_next_columns) {
  const uint64_t leading = static_cast<uint64_t>(bytes_to_next_columns >> 4) << 16;
  return kSwizzle128 | kStrideOf8Rows | leading | ((address & 0x3ffff) >> 4);
}

__host__ __device__ constexpr uint64_t descriptor_offset(int bytes) { return bytes >> 4; }

}  // namespace orthrus::cuda::sm90
