// The best of pairs (value, id), for every choice among tokens: the larger value, on ties the lower id.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace orthrus::cuda {

struct Best {
  float value = -INFINITY;
  int32_t id = INT32_MAX;
};

// NaN compares false and so never wins. Branch-free.
__device__ __forceinline__ bool beats(const Best& a, const Best& b) {
  return (a.value > b.value) | ((a.value == b.value) & (a.id < b.id));
}

// The best of kWidth neighbouring lanes, known to all of them. Warp-collective.
template <int kWidth>
__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
  for (int mask = kWidth / 2; mask > 0; mask /= 2) {
    const Best other{__shfl_xor_sync(~0u, best.value, mask), __shfl_xor_sync(~0u, best.id, mask)};
    if (beats(other, best)) best = other;
  }
  return best;
}

}  // namespace orthrus::cuda
