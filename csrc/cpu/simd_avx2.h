// The variant avx2: registers of eight fp32 lanes, bf16 widened.
#pragma once
#include <immintrin.h>

namespace orthrus::cpu::avx2 {

// Sums take at most 12 of 16 registers; 3 rows times 32 outputs would leave too few for a step's weights.
constexpr int kTileRows = 3, kWidenedTileRows = 6, kWholeTileRows = 2;
constexpr int kDecodingTileRows = 1, kCodedBlockSteps = 48;
constexpr int kTileQueries = 6, kTileVecs = 1;
constexpr bool kWidensAtUse = true;

struct Vec {
  __m256 lo, hi;
};
struct WordVec {
  __m256i lo, hi;
};

#define ORTHRUS_EACH(name, call) \
  ORTHRUS_INLINE Vec name(Vec a, Vec b) { return {call(a.lo, b.lo), call(a.hi, b.hi)}; }
ORTHRUS_EACH(add, _mm256_add_ps)
ORTHRUS_EACH(sub, _mm256_sub_ps)
ORTHRUS_EACH(mul, _mm256_mul_ps)
ORTHRUS_EACH(div, _mm256_div_ps)
ORTHRUS_EACH(max, _mm256_max_ps)
ORTHRUS_EACH(min, _mm256_min_ps)
#undef ORTHRUS_EACH

ORTHRUS_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
ORTHRUS_INLINE Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ORTHRUS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
ORTHRUS_INLINE void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
ORTHRUS_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) {
#if defined(__clang__)
  return _mm256_fmadd_ps(a, b, c);
#else  // into c's registers: else g++ moves and spills sums where they take nearly all registers
  asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "xm"(b));
  return c;
#endif
}
ORTHRUS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)}; }
ORTHRUS_INLINE Vec round(Vec a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
ORTHRUS_INLINE __m256 pow2(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
ORTHRUS_INLINE Vec scale_by_pow2(Vec a, Vec n) { return mul(a, {pow2(n.lo), pow2(n.hi)}); }
ORTHRUS_INLINE Vec truncate(Vec a) {
  constexpr int kMode = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
ORTHRUS_INLINE Vec where_less(Vec x, float bound, Vec a, Vec b) {
  const __m256 v = _mm256_set1_ps(bound);
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, v, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, v, _CMP_LT_OQ))};
}
ORTHRUS_INLINE uint32_t lanes_at_least(Vec x, float bound) {
  const __m256 v = _mm256_set1_ps(bound);
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(x.lo, v, _CMP_GE_OQ));
  return static_cast<uint32_t>(lo | _mm256_movemask_ps(_mm256_cmp_ps(x.hi, v, _CMP_GE_OQ)) << 8);
}
ORTHRUS_INLINE int32_t count_at_least(Vec x, float bound) { return __builtin_popcount(lanes_at_least(x, bound)); }
ORTHRUS_INLINE int32_t compress_between(float* out, Vec x, float low, float high) {
  float lane[16];
  store(lane, x);
  int32_t count = 0;
  for (uint32_t set = lanes_at_least(x, low) & ~lanes_at_least(x, high); set; set &= set - 1) {
    out[count++] = lane[__builtin_ctz(set)];
  }
  return count;
}
ORTHRUS_INLINE __m256 exponent(__m256 x) {
  const __m256i bits = _mm256_sub_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(0x3f2aaaab));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(bits, 23));
}
ORTHRUS_INLINE Vec exponent(Vec x) { return {exponent(x.lo), exponent(x.hi)}; }
ORTHRUS_INLINE Vec replace_nan(Vec v, float x) {
  const __m256 b = _mm256_set1_ps(x);
  return {_mm256_blendv_ps(v.lo, b, _mm256_cmp_ps(v.lo, v.lo, _CMP_UNORD_Q)),
          _mm256_blendv_ps(v.hi, b, _mm256_cmp_ps(v.hi, v.hi, _CMP_UNORD_Q))};
}
ORTHRUS_INLINE __m256 first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int32_t bound = static_cast<int32_t>(count < 0 ? 0 : count > 8 ? 8 : count);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(bound), lane));
}
ORTHRUS_INLINE Vec keep_first(Vec v, int64_t count, float x) {
  const __m256 b = _mm256_set1_ps(x);
  return {_mm256_blendv_ps(b, v.lo, first_lanes(count)), _mm256_blendv_ps(b, v.hi, first_lanes(count - 8))};
}

ORTHRUS_INLINE __m256 widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
ORTHRUS_INLINE Vec load(const bf16_t* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
ORTHRUS_INLINE __m256i round_to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
ORTHRUS_INLINE WordVec round_to_bf16(Vec v) { return {round_to_bf16(v.lo), round_to_bf16(v.hi)}; }
ORTHRUS_INLINE void store(bf16_t* p, Vec v) {
  const WordVec words = round_to_bf16(v);
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(words.lo, 16), _mm256_srli_epi32(words.hi, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

ORTHRUS_INLINE WordVec load_words(const void* p) {
  const __m256i* half = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)};
}
ORTHRUS_INLINE Vec as_floats(WordVec a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
ORTHRUS_INLINE WordVec set1_word(uint32_t word) {
  const __m256i v = _mm256_set1_epi32(static_cast<int32_t>(word));
  return {v, v};
}
ORTHRUS_INLINE __m256 first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
ORTHRUS_INLINE __m256 second_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
ORTHRUS_INLINE Vec first_of(WordVec pairs) { return {first_of(pairs.lo), first_of(pairs.hi)}; }
ORTHRUS_INLINE Vec second_of(WordVec pairs) { return {second_of(pairs.lo), second_of(pairs.hi)}; }

#define ORTHRUS_DECODES_WORDS
ORTHRUS_INLINE void store_words(void* p, WordVec a) {
  __m256i* half = static_cast<__m256i*>(p);
  _mm256_storeu_si256(half, a.lo);
  _mm256_storeu_si256(half + 1, a.hi);
}
ORTHRUS_INLINE WordVec low_nibbles(WordVec a) {
  const __m256i mask = _mm256_set1_epi8(0xf);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
ORTHRUS_INLINE WordVec high_nibbles(WordVec a) {
  return low_nibbles({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)});
}
ORTHRUS_INLINE WordVec look_up(WordVec table, WordVec index) {
  return {_mm256_shuffle_epi8(table.lo, index.lo), _mm256_shuffle_epi8(table.hi, index.hi)};
}
ORTHRUS_INLINE WordVec zip_first(WordVec a, WordVec b) {
  return {_mm256_unpacklo_epi8(a.lo, b.lo), _mm256_unpacklo_epi8(a.hi, b.hi)};
}
ORTHRUS_INLINE WordVec zip_last(WordVec a, WordVec b) {
  return {_mm256_unpackhi_epi8(a.lo, b.lo), _mm256_unpackhi_epi8(a.hi, b.hi)};
}

ORTHRUS_INLINE WordVec bit_xor(WordVec a, WordVec b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
ORTHRUS_INLINE void multiply_wide(__m256i a, uint32_t m, __m256i* high, __m256i* low) {
  const __m256i factor = _mm256_set1_epi64x(m);
  const __m256i even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
ORTHRUS_INLINE void multiply_wide(WordVec a, uint32_t m, WordVec* high, WordVec* low) {
  multiply_wide(a.lo, m, &high->lo, &low->lo);
  multiply_wide(a.hi, m, &high->hi, &low->hi);
}
ORTHRUS_INLINE __m256 words_to_float(__m256i a) {  // both halves convert exactly: their sum rounds once
  const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 16));
  const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(a, _mm256_set1_epi32(0xffff)));
  return _mm256_add_ps(_mm256_mul_ps(high, _mm256_set1_ps(65536.f)), low);
}
ORTHRUS_INLINE Vec words_to_float(WordVec a) { return {words_to_float(a.lo), words_to_float(a.hi)}; }

ORTHRUS_INLINE float reduce_add(Vec v) {
  const __m256 eight = _mm256_add_ps(v.lo, v.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
ORTHRUS_INLINE float reduce_max(Vec v) {
  const __m256 eight = _mm256_max_ps(v.lo, v.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
ORTHRUS_INLINE int32_t first_equal(Vec v, float x) {
  const __m256 b = _mm256_set1_ps(x);
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(v.lo, b, _CMP_EQ_OQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(v.hi, b, _CMP_EQ_OQ));
  return __builtin_ctz(static_cast<uint32_t>(lo | (hi << 8)) | 0x10000u);
}

ORTHRUS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
ORTHRUS_INLINE void prefetch_once(const void* p) { prefetch(p); }

// out[j][i] = in[i][j] of 8 x 8 words at in[i] + from.
ORTHRUS_INLINE void transpose8(const uint32_t* const* in, int from, uint32_t* out, int64_t stride) {
  for (int j = 0; j < 8; j += 4) {
    __m256 a[4], b[4];  // a[i]: columns j ... j+3 of row i, in the upper half of row i+4
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm256_loadu2_m128(reinterpret_cast<const float*>(in[i + 4] + from + j),
                                reinterpret_cast<const float*>(in[i] + from + j));
    }
    for (int i = 0; i < 4; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      const __m256 column = i % 2 ? _mm256_shuffle_ps(b[i / 2], b[i / 2 + 2], 0xee)
                                  : _mm256_shuffle_ps(b[i / 2], b[i / 2 + 2], 0x44);
      _mm256_storeu_ps(reinterpret_cast<float*>(out + (j + i) * stride), column);
    }
  }
}
ORTHRUS_INLINE void transpose16(const uint32_t* const* in, uint32_t* out, int64_t stride) {
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 16; j += 8) transpose8(in + i, j, out + j * stride + i, stride);
  }
}

}  // namespace orthrus::cpu::avx2
