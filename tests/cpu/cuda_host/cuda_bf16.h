// bf16 pairs for host-compiled kernels; rounding to nearest even as on the device.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};

inline float bf16_to_float(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }

inline uint16_t float_to_bf16(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = __float_as_uint(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {bf16_to_float(pair.x), bf16_to_float(pair.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {float_to_bf16(x), float_to_bf16(y)}; }
