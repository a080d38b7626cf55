// The variants avx512, avx512_bf16 and amx_bf16; the last two have the instructions for bf16.
#pragma once
#include <immintrin.h>

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr int kTileRows = 12, kWidenedTileRows = kTileRows, kWholeTileRows = kTileRows;
constexpr int kDecodingTileRows = 8, kCodedBlockSteps = 24;
constexpr int kTileQueries = 6, kTileVecs = 4;
constexpr bool kWidensAtUse = false;

using Vec = __m512;
using WordVec = __m512i;

ORTHRUS_INLINE Vec zero() { return _mm512_setzero_ps(); }
ORTHRUS_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
ORTHRUS_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
ORTHRUS_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
ORTHRUS_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
ORTHRUS_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
ORTHRUS_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
ORTHRUS_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
ORTHRUS_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
ORTHRUS_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
ORTHRUS_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
ORTHRUS_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
ORTHRUS_INLINE Vec scale_by_pow2(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
ORTHRUS_INLINE Vec truncate(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
ORTHRUS_INLINE Vec where_less(Vec x, float bound, Vec a, Vec b) {
  return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, set1(bound), _CMP_LT_OQ), a);
}
ORTHRUS_INLINE int32_t count_at_least(Vec x, float bound) {
  return __builtin_popcount(_mm512_cmp_ps_mask(x, set1(bound), _CMP_GE_OQ));
}
ORTHRUS_INLINE int32_t compress_between(float* out, Vec x, float low, float high) {
  const __mmask16 mask = _mm512_cmp_ps_mask(x, set1(low), _CMP_GE_OQ) & _mm512_cmp_ps_mask(x, set1(high), _CMP_LT_OQ);
  store(out, _mm512_maskz_compress_ps(mask, x));
  return __builtin_popcount(mask);
}
ORTHRUS_INLINE Vec exponent(Vec x) {
  const __m512i bits = _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x3f2aaaab));
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(bits, 23));
}
ORTHRUS_INLINE Vec replace_nan(Vec v, float x) {
  return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), set1(x));
}
ORTHRUS_INLINE Vec keep_first(Vec v, int64_t count, float x) {
  const __mmask16 mask = count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
  return _mm512_mask_mov_ps(set1(x), mask, v);
}

ORTHRUS_INLINE Vec load(const bf16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
ORTHRUS_INLINE WordVec round_to_bf16(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
}
#if defined(ORTHRUS_ISA_avx512)
ORTHRUS_INLINE void store(bf16_t* p, Vec v) {
  const __m512i halves = _mm512_srli_epi32(round_to_bf16(v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(halves));
}
#else
// Denormals become zero, as in dot2; where kernels write a row's tail element by element, they stay.
ORTHRUS_INLINE void store(bf16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}
#endif

ORTHRUS_INLINE WordVec load_words(const void* p) { return _mm512_loadu_si512(p); }
ORTHRUS_INLINE Vec as_floats(WordVec a) { return _mm512_castsi512_ps(a); }
ORTHRUS_INLINE WordVec set1_word(uint32_t word) { return _mm512_set1_epi32(static_cast<int32_t>(word)); }
ORTHRUS_INLINE Vec first_of(WordVec pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
ORTHRUS_INLINE Vec second_of(WordVec pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
#if !defined(ORTHRUS_ISA_avx512)
#define ORTHRUS_HAS_DOT2
ORTHRUS_INLINE WordVec zip_pairs(const bf16_t* p, const bf16_t* q) {
  const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  if (!q) return first;
  const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
  return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}
// acc + a.first * b.first + a.second * b.second, as vdpbf16ps rounds it (denormals count as zero).
ORTHRUS_INLINE Vec dot2(Vec acc, WordVec a, WordVec b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

#if !defined(ORTHRUS_ISA_amx_bf16)
#define ORTHRUS_DECODES_WORDS
ORTHRUS_INLINE void store_words(void* p, WordVec a) { _mm512_storeu_si512(p, a); }
ORTHRUS_INLINE WordVec low_nibbles(WordVec a) { return _mm512_and_si512(a, _mm512_set1_epi8(0xf)); }
ORTHRUS_INLINE WordVec high_nibbles(WordVec a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
ORTHRUS_INLINE WordVec look_up(WordVec table, WordVec index) { return _mm512_shuffle_epi8(table, index); }
ORTHRUS_INLINE WordVec zip_first(WordVec a, WordVec b) { return _mm512_unpacklo_epi8(a, b); }
ORTHRUS_INLINE WordVec zip_last(WordVec a, WordVec b) { return _mm512_unpackhi_epi8(a, b); }
#endif

ORTHRUS_INLINE WordVec bit_xor(WordVec a, WordVec b) { return _mm512_xor_si512(a, b); }
ORTHRUS_INLINE void multiply_wide(WordVec a, uint32_t m, WordVec* high, WordVec* low) {
  const __m512i factor = _mm512_set1_epi64(m);
  const __m512i even = _mm512_mul_epu32(a, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
  *high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  *low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}
ORTHRUS_INLINE Vec words_to_float(WordVec a) { return _mm512_cvtepu32_ps(a); }

ORTHRUS_INLINE float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
ORTHRUS_INLINE float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }
ORTHRUS_INLINE int32_t first_equal(Vec v, float x) {
  return __builtin_ctz(_mm512_cmp_ps_mask(v, set1(x), _CMP_EQ_OQ) | 0x10000u);
}

ORTHRUS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
#if defined(ORTHRUS_ISA_avx512_bf16)  // which Zen 4 and later run
ORTHRUS_INLINE void prefetch_once(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_NTA); }
#else
ORTHRUS_INLINE void prefetch_once(const void* p) { prefetch(p); }
#endif

ORTHRUS_INLINE void transpose16(const uint32_t* const* in, uint32_t* out, int64_t stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4q + j] holds columns j, j+4, j+8, j+12 (one per 128-bit lane) of rows 4q ... 4q+3.
  for (int j = 0; j < 4; ++j) {
    const __m512i lo01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44);
    const __m512i hi01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
    const __m512i lo23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
    const __m512i hi23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
    _mm512_storeu_si512(out + j * stride, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
    _mm512_storeu_si512(out + (j + 4) * stride, _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
    _mm512_storeu_si512(out + (j + 8) * stride, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
    _mm512_storeu_si512(out + (j + 12) * stride, _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
  }
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
