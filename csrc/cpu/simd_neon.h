// The variants neon, which every AArch64 processor runs, and neon_bf16, which has the product of bf16 pairs.
#pragma once
#include <arm_neon.h>

namespace orthrus::cpu::ORTHRUS_ISA {

// Not measured: by LLVM's models of Neoverse N1 and Apple M1, these give the most products per cycle.
constexpr int kTileRows = 3, kWidenedTileRows = kTileRows, kWholeTileRows = kTileRows;
constexpr int kTileQueries = 5, kTileVecs = 1;
constexpr bool kWidensAtUse = false;

// Lanes 0 ... 3, 4 ... 7, 8 ... 11 and 12 ... 15.
struct Vec {
  float32x4_t a, b, c, d;
};
struct WordVec {
  uint32x4_t a, b, c, d;
};

ORTHRUS_INLINE float32x4_t as_floats(uint32x4_t v) { return vreinterpretq_f32_u32(v); }
ORTHRUS_INLINE uint32x4_t as_words(float32x4_t v) { return vreinterpretq_u32_f32(v); }

#define ORTHRUS_EACH(name, call) \
  ORTHRUS_INLINE Vec name(Vec x, Vec y) { return {call(x.a, y.a), call(x.b, y.b), call(x.c, y.c), call(x.d, y.d)}; }
ORTHRUS_EACH(add, vaddq_f32)
ORTHRUS_EACH(sub, vsubq_f32)
ORTHRUS_EACH(mul, vmulq_f32)
ORTHRUS_EACH(div, vdivq_f32)
ORTHRUS_INLINE float32x4_t max4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
ORTHRUS_INLINE float32x4_t min4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
// A NaN in y passes through max and min, one in x does not: fmax and fmin would pass both.
ORTHRUS_EACH(max, max4)
ORTHRUS_EACH(min, min4)
ORTHRUS_INLINE float32x4_t scale_by_pow2(float32x4_t x, float32x4_t n) {
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
  return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}
ORTHRUS_EACH(scale_by_pow2, scale_by_pow2)
#undef ORTHRUS_EACH

#define ORTHRUS_EACH(name, call) \
  ORTHRUS_INLINE Vec name(Vec x) { return {call(x.a), call(x.b), call(x.c), call(x.d)}; }
ORTHRUS_EACH(round, vrndnq_f32)
ORTHRUS_EACH(truncate, vrndq_f32)
ORTHRUS_INLINE float32x4_t exponent4(float32x4_t x) {
  const int32x4_t bits = vsubq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x3f2aaaab));
  return vcvtq_f32_s32(vshrq_n_s32(bits, 23));
}
ORTHRUS_EACH(exponent, exponent4)
#undef ORTHRUS_EACH

ORTHRUS_INLINE Vec set1(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {v, v, v, v};
}
ORTHRUS_INLINE Vec zero() { return set1(0.f); }
ORTHRUS_INLINE Vec load(const float* p) {
  return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
ORTHRUS_INLINE void store(float* p, Vec v) {
  vst1q_f32(p, v.a);
  vst1q_f32(p + 4, v.b);
  vst1q_f32(p + 8, v.c);
  vst1q_f32(p + 12, v.d);
}
ORTHRUS_INLINE Vec fma(Vec x, Vec y, Vec z) {
  return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}

// Lanes of x where the mask is set, else of y.
ORTHRUS_INLINE Vec select(WordVec mask, Vec x, Vec y) {
  return {vbslq_f32(mask.a, x.a, y.a), vbslq_f32(mask.b, x.b, y.b), vbslq_f32(mask.c, x.c, y.c),
          vbslq_f32(mask.d, x.d, y.d)};
}
#define ORTHRUS_COMPARE(name, call) \
  ORTHRUS_INLINE WordVec name(Vec x, Vec y) { return {call(x.a, y.a), call(x.b, y.b), call(x.c, y.c), call(x.d, y.d)}; }
ORTHRUS_COMPARE(is_less, vcltq_f32)
ORTHRUS_COMPARE(is_at_least, vcgeq_f32)
ORTHRUS_COMPARE(is_equal, vceqq_f32)
#undef ORTHRUS_COMPARE

ORTHRUS_INLINE Vec where_less(Vec x, float bound, Vec a, Vec b) { return select(is_less(x, set1(bound)), a, b); }
ORTHRUS_INLINE Vec replace_nan(Vec v, float x) { return select(is_equal(v, v), v, set1(x)); }
ORTHRUS_INLINE Vec keep_first(Vec v, int64_t count, float x) {
  constexpr float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(is_less(load(kLane), set1(static_cast<float>(count))), v, set1(x));
}
ORTHRUS_INLINE int32_t count_at_least(Vec x, float bound) {
  const WordVec mask = is_at_least(x, set1(bound));  // -1 per lane
  const uint32x4_t sum = vaddq_u32(vaddq_u32(mask.a, mask.b), vaddq_u32(mask.c, mask.d));
  return -static_cast<int32_t>(vaddvq_u32(sum));
}
ORTHRUS_INLINE int32_t compress_between(float* out, Vec x, float low, float high) {
  float lane[16];
  store(lane, x);
  int32_t count = 0;
  for (int i = 0; i < 16; ++i) {
    out[count] = lane[i];
    count += lane[i] >= low && lane[i] < high;
  }
  return count;
}

ORTHRUS_INLINE WordVec zip(uint16x8_t first_a, uint16x8_t first_b, uint16x8_t second_a, uint16x8_t second_b) {
  return {vreinterpretq_u32_u16(vzip1q_u16(first_a, second_a)), vreinterpretq_u32_u16(vzip2q_u16(first_a, second_a)),
          vreinterpretq_u32_u16(vzip1q_u16(first_b, second_b)), vreinterpretq_u32_u16(vzip2q_u16(first_b, second_b))};
}
ORTHRUS_INLINE Vec as_floats(WordVec v) { return {as_floats(v.a), as_floats(v.b), as_floats(v.c), as_floats(v.d)}; }
ORTHRUS_INLINE Vec load(const bf16_t* p) {
  const uint16x8_t none = vdupq_n_u16(0);
  return as_floats(zip(none, none, vld1q_u16(p), vld1q_u16(p + 8)));
}
ORTHRUS_INLINE uint32x4_t round_to_bf16(float32x4_t v) {
  const uint32x4_t bits = as_words(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vbslq_u32(vceqq_f32(v, v), rounded, quiet);
}
ORTHRUS_INLINE WordVec round_to_bf16(Vec v) {
  return {round_to_bf16(v.a), round_to_bf16(v.b), round_to_bf16(v.c), round_to_bf16(v.d)};
}
ORTHRUS_INLINE void store(bf16_t* p, Vec v) {
  const WordVec words = round_to_bf16(v);
  const auto upper = [](uint32x4_t a, uint32x4_t b) ORTHRUS_LAMBDA {
    return vuzp2q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
  };
  vst1q_u16(p, upper(words.a, words.b));
  vst1q_u16(p + 8, upper(words.c, words.d));
}

ORTHRUS_INLINE WordVec load_words(const void* p) {
  const uint8_t* bytes = static_cast<const uint8_t*>(p);
  const auto quarter = [&](int i) ORTHRUS_LAMBDA { return vreinterpretq_u32_u8(vld1q_u8(bytes + 16 * i)); };
  return {quarter(0), quarter(1), quarter(2), quarter(3)};
}
ORTHRUS_INLINE WordVec set1_word(uint32_t word) {
  const uint32x4_t v = vdupq_n_u32(word);
  return {v, v, v, v};
}
#if defined(ORTHRUS_ISA_neon_bf16)
#define ORTHRUS_HAS_DOT2
ORTHRUS_INLINE WordVec zip_pairs(const bf16_t* p, const bf16_t* q) {
  const uint16x8_t none = vdupq_n_u16(0);
  return zip(vld1q_u16(p), vld1q_u16(p + 8), q ? vld1q_u16(q) : none, q ? vld1q_u16(q + 8) : none);
}
// acc + a.first * b.first + a.second * b.second, rounded as that instruction does.
ORTHRUS_INLINE float32x4_t dot2(float32x4_t acc, uint32x4_t a, uint32x4_t b) {
  return vbfdotq_f32(acc, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
}
ORTHRUS_INLINE Vec dot2(Vec acc, WordVec a, WordVec b) {
  return {dot2(acc.a, a.a, b.a), dot2(acc.b, a.b, b.b), dot2(acc.c, a.c, b.c), dot2(acc.d, a.d, b.d)};
}
#endif
ORTHRUS_INLINE float32x4_t first_of(uint32x4_t pairs) { return as_floats(vshlq_n_u32(pairs, 16)); }
ORTHRUS_INLINE float32x4_t second_of(uint32x4_t pairs) {
  return as_floats(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
}
ORTHRUS_INLINE Vec first_of(WordVec v) { return {first_of(v.a), first_of(v.b), first_of(v.c), first_of(v.d)}; }
ORTHRUS_INLINE Vec second_of(WordVec v) { return {second_of(v.a), second_of(v.b), second_of(v.c), second_of(v.d)}; }

ORTHRUS_INLINE WordVec bit_xor(WordVec x, WordVec y) {
  return {veorq_u32(x.a, y.a), veorq_u32(x.b, y.b), veorq_u32(x.c, y.c), veorq_u32(x.d, y.d)};
}
ORTHRUS_INLINE void multiply_wide(uint32x4_t x, uint32_t m, uint32x4_t* high, uint32x4_t* low) {
  const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), vdup_n_u32(m)));
  const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_u32(x, vdupq_n_u32(m)));
  *high = vuzp2q_u32(first, second);
  *low = vuzp1q_u32(first, second);
}
ORTHRUS_INLINE void multiply_wide(WordVec x, uint32_t m, WordVec* high, WordVec* low) {
  multiply_wide(x.a, m, &high->a, &low->a);
  multiply_wide(x.b, m, &high->b, &low->b);
  multiply_wide(x.c, m, &high->c, &low->c);
  multiply_wide(x.d, m, &high->d, &low->d);
}
ORTHRUS_INLINE Vec words_to_float(WordVec v) {
  return {vcvtq_f32_u32(v.a), vcvtq_f32_u32(v.b), vcvtq_f32_u32(v.c), vcvtq_f32_u32(v.d)};
}

ORTHRUS_INLINE float reduce_add(Vec v) {
  const float32x4_t four = vaddq_f32(vaddq_f32(v.a, v.c), vaddq_f32(v.b, v.d));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
ORTHRUS_INLINE float reduce_max(Vec v) {
  const float32x4_t four = max4(max4(v.a, v.b), max4(v.c, v.d));
  const float32x4_t two = max4(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(max4(two, vextq_f32(two, two, 1)), 0);
}
ORTHRUS_INLINE int32_t first_equal(Vec v, float x) {
  const WordVec mask = is_equal(v, set1(x));
  const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(mask.a), vreinterpretq_u16_u32(mask.b));
  const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(mask.c), vreinterpretq_u16_u32(mask.d));
  const uint8x16_t bytes = vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
  const uint8x8_t halves = vshrn_n_u16(vreinterpretq_u16_u8(bytes), 4);  // of bytes, one per lane
  const uint64_t lanes = vget_lane_u64(vreinterpret_u64_u8(halves), 0);
  return lanes ? __builtin_ctzll(lanes) / 4 : 16;
}

ORTHRUS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
ORTHRUS_INLINE void prefetch_once(const void* p) { prefetch(p); }

ORTHRUS_INLINE void transpose16(const uint32_t* const* in, uint32_t* out, int64_t stride) {
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 16; j += 4) {
      const uint32x4_t r0 = vld1q_u32(in[i] + j), r1 = vld1q_u32(in[i + 1] + j);
      const uint32x4_t r2 = vld1q_u32(in[i + 2] + j), r3 = vld1q_u32(in[i + 3] + j);
      const uint32x4_t even_low = vzip1q_u32(r0, r2), even_high = vzip2q_u32(r0, r2);
      const uint32x4_t odd_low = vzip1q_u32(r1, r3), odd_high = vzip2q_u32(r1, r3);
      vst1q_u32(out + j * stride + i, vzip1q_u32(even_low, odd_low));
      vst1q_u32(out + (j + 1) * stride + i, vzip2q_u32(even_low, odd_low));
      vst1q_u32(out + (j + 2) * stride + i, vzip1q_u32(even_high, odd_high));
      vst1q_u32(out + (j + 3) * stride + i, vzip2q_u32(even_high, odd_high));
    }
  }
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
