// Vec: 16 fp32 lanes, and WordVec: 16 lanes of one 32-bit word each, two bf16 elements or one float, on the instruction
// set that this translation unit is compiled for. Lane count and words are the same everywhere, so kernels and packed
// layouts are written once, for both element types. The sets differ in how a product of bf16 pairs is rounded, and in
// the register tiles that suit them:
// - kTileRows rows of row_linear times 32 outputs,
// - kWidenedTileRows rows of row_linear_widened.h; if more than kWholeTileRows, then times 16 outputs; if at most
//   kDecodingTileRows, coded weights are unpacked in registers. A coded block has up to kCodedBlockSteps steps (on a
//   Xeon with avx512, 1 to 8 rows take 5% longer with 48 steps, and up to 20% longer with 8),
// - kTileQueries queries of dual_attn times kTileVecs vectors of keys, then of values; kWidensAtUse: bf16 is widened on
//   ports that products leave idle.
//
// Each set provides, lane by lane where nothing else is said:
// - zero, set1, add, sub, mul, div, fma; load and store of 16 floats or bf16, rounded to nearest even
// - max(a, b), min(a, b): a NaN in b passes through
// - round: to nearest even, |a| < 2^22; truncate: |a| < 2^31; scale_by_pow2(a, n): a * 2^n for whole n
// - exponent(x): n of x = m * 2^n with m in [2/3, 4/3), for normal x > 0
// - where_less(x, bound, a, b): a where x < bound, else b, also where x is NaN
// - replace_nan(v, x); keep_first(v, count, x): lanes 0 ... count-1 of v, the others x
// - count_at_least(x, bound): how many lanes are at least `bound`; a NaN is not
// - compress_between(out, x, low, high): packs the lanes with low <= x < high at out, and returns how many; it may
//   overwrite 16 places
// - reduce_add, in a fixed order; reduce_max; first_equal(v, x): the first lane equal to x, or 16
// - load_words, set1_word, as_floats, bit_xor; first_of, second_of: an element of each pair, widened; round_to_bf16: in
//   the upper half of each word
// - multiply_wide(a, m, high, low): both words of the product; words_to_float: of unsigned words, to nearest even
// - prefetch: into L2, for what is needed soon, but after what L1 holds now. prefetch_once: the same, for what is used
//   once and very soon; in avx512_bf16, which Zen 4 and later run, into L1 alone. On a Xeon (family 6, model 207),
//   whose cores can wait for 16 lines in L1 and for 48 in L2, that made passes over 1, 4 and 16 rows take 2.2, 1.4 and
//   1.4 times as long.
// - transpose16(in, out, stride): out[j][i] = in[i][j] of 16 x 16 words; row i of in starts at in[i], rows of out are
//   `stride` words apart
// - with ORTHRUS_HAS_DOT2: dot2(acc, a, b), which adds the products of pairs; zip_pairs(p, q): lane i is p[i] and
//   q[i], or p[i] and 0 without q
// - with ORTHRUS_DECODES_WORDS, for coded weights (coded_weight.h): store_words; and on bytes, within each 16,
//   low_nibbles, high_nibbles, look_up(table, index) of indices below 16, and zip_first and zip_last:
//   the first, or last, 8 bytes of a and b, interleaved
#pragma once
#include <cstdint>
#include <cstring>

#include "orthrus/params.h"

#define ORTHRUS_INLINE inline __attribute__((always_inline))
#define ORTHRUS_LAMBDA __attribute__((always_inline))
#define ORTHRUS_UNROLL _Pragma("GCC unroll 16")  // keeps arrays of vectors in registers

#if defined(ORTHRUS_ISA_avx512) || defined(ORTHRUS_ISA_avx512_bf16) || defined(ORTHRUS_ISA_amx_bf16)
#include "simd_avx512.h"
#elif defined(ORTHRUS_ISA_avx2)
#include "simd_avx2.h"
#elif defined(ORTHRUS_ISA_neon) || defined(ORTHRUS_ISA_neon_bf16)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr int kLanes = 16;
constexpr int kLineBytes = 64;  // of cache

ORTHRUS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
ORTHRUS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
ORTHRUS_INLINE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

ORTHRUS_INLINE float to_float(float x) { return x; }
ORTHRUS_INLINE float to_float(bf16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Round to nearest even; a NaN stays one.
ORTHRUS_INLINE bf16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16_t>((bits >> 16) | 0x40u);
  return static_cast<bf16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <typename T>
ORTHRUS_INLINE T from_float(float f) {
  if constexpr (sizeof(T) == sizeof f) {
    return f;
  } else {
    return to_bf16(f);
  }
}

// Elements of a 32-bit word: two bf16 (the first in the low half), or one float.
template <typename T>
constexpr int kPerWord = sizeof(uint32_t) / sizeof(T);

template <typename T>
ORTHRUS_INLINE uint32_t load_word(const T* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

#if defined(ORTHRUS_HAS_DOT2)
constexpr bool kHasDot2 = true;
#else
constexpr bool kHasDot2 = false;
#endif

// acc + the products of a's and b's elements, in their order; as pairs only where an instruction multiplies pairs.
template <typename T>
ORTHRUS_INLINE Vec dot(Vec acc, WordVec a, WordVec b) {
#if defined(ORTHRUS_HAS_DOT2)
  if constexpr (kPerWord<T> == 2) return dot2(acc, a, b);
#endif
  static_assert(kHasDot2 || kPerWord<T> == 1);
  return fma(as_floats(a), as_floats(b), acc);
}

// e^x to 2 ulp; 0 below -87.3, finite above 88.3. The polynomial is the Taylor series on |r| <= ln2/2.
ORTHRUS_INLINE Vec exp(Vec x) {
  const Vec bounded = min(set1(88.3f), max(set1(-87.3f), x));
  const Vec n = round(mul(bounded, set1(1.44269504f)));
  Vec r = fma(n, set1(-0.693145752f), bounded);
  r = fma(n, set1(-1.42860677e-6f), r);
  Vec p = set1(1.f / 5040);
  p = fma(p, r, set1(1.f / 720));
  p = fma(p, r, set1(1.f / 120));
  p = fma(p, r, set1(1.f / 24));
  p = fma(p, r, set1(1.f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.f));
  p = fma(p, r, set1(1.f));
  return where_less(x, -87.3f, zero(), scale_by_pow2(p, n));
}

// ln(x) to 2 ulp of the larger of |ln(x)| and 0.3, for normal 0 < x < 2^126: of its mantissa m, 2 atanh((m-1) / (m+1)).
ORTHRUS_INLINE Vec log(Vec x) {
  const Vec n = exponent(x);
  const Vec m = scale_by_pow2(x, sub(zero(), n));
  const Vec s = div(sub(m, set1(1.f)), add(m, set1(1.f)));
  const Vec square = mul(s, s);
  Vec p = set1(2.f / 9);
  p = fma(p, square, set1(2.f / 7));
  p = fma(p, square, set1(2.f / 5));
  p = fma(p, square, set1(2.f / 3));
  const Vec rest = fma(mul(p, square), s, mul(n, set1(1.42860677e-6f)));
  return fma(n, set1(0.693145752f), add(add(s, s), rest));
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
