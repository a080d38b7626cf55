// Of the variant portable: C++ alone, for any processor.
#pragma once

namespace orthrus::cpu::portable {

constexpr int kTileRows = 8, kWidenedTileRows = kTileRows, kWholeTileRows = kTileRows;
constexpr int kTileQueries = 2, kTileVecs = 4;
constexpr bool kWidensAtUse = false;

struct Vec {
  float lane[16];
};
struct WordVec {
  uint32_t lane[16];
};

ORTHRUS_INLINE float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
ORTHRUS_INLINE uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

#define ORTHRUS_EACH(signature, expression) \
  ORTHRUS_INLINE Vec signature {            \
    Vec out;                                \
    for (int i = 0; i < 16; ++i) out.lane[i] = expression; \
    return out;                             \
  }
ORTHRUS_EACH(set1(float x), x)
ORTHRUS_EACH(load(const float* p), p[i])
ORTHRUS_EACH(add(Vec a, Vec b), a.lane[i] + b.lane[i])
ORTHRUS_EACH(sub(Vec a, Vec b), a.lane[i] - b.lane[i])
ORTHRUS_EACH(mul(Vec a, Vec b), a.lane[i] * b.lane[i])
ORTHRUS_EACH(div(Vec a, Vec b), a.lane[i] / b.lane[i])
// Rounds twice: a fused product is a library call on machines without the instruction.
ORTHRUS_EACH(fma(Vec a, Vec b, Vec c), a.lane[i] * b.lane[i] + c.lane[i])
// A NaN in b passes through max and min.
ORTHRUS_EACH(max(Vec a, Vec b), a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i])
ORTHRUS_EACH(min(Vec a, Vec b), a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i])
// Nearest even for |a| < 2^22, by the rounding of the addition itself.
ORTHRUS_EACH(round(Vec a), (a.lane[i] + 12582912.f) - 12582912.f)
// The addition leaves n, a whole number, in the low bits; converting to an integer would be undefined for a NaN.
ORTHRUS_EACH(scale_by_pow2(Vec a, Vec n),
             a.lane[i] * as_float((as_bits(n.lane[i] + 12582912.f) - 0x4b400000u + 127u) << 23))
ORTHRUS_EACH(truncate(Vec a), static_cast<float>(static_cast<int32_t>(a.lane[i])))  // |a| < 2^31
// Lanes of a where x < bound, else of b (also where x is NaN).
ORTHRUS_EACH(where_less(Vec x, float bound, Vec a, Vec b), x.lane[i] < bound ? a.lane[i] : b.lane[i])
// n of x = m * 2^n with m in [2/3, 4/3), for normal x > 0.
ORTHRUS_EACH(exponent(Vec x), static_cast<float>(static_cast<int32_t>(as_bits(x.lane[i]) - 0x3f2aaaabu) >> 23))
ORTHRUS_EACH(replace_nan(Vec v, float x), v.lane[i] == v.lane[i] ? v.lane[i] : x)
// Lanes 0 ... count-1 of v, the others x.
ORTHRUS_EACH(keep_first(Vec v, int64_t count, float x), i < count ? v.lane[i] : x)
ORTHRUS_EACH(load(const bf16_t* p), as_float(uint32_t{p[i]} << 16))
#undef ORTHRUS_EACH

ORTHRUS_INLINE Vec zero() { return set1(0.f); }
ORTHRUS_INLINE void store(float* p, Vec v) { std::memcpy(p, v.lane, sizeof v.lane); }
// In the upper half of each word.
ORTHRUS_INLINE WordVec round_to_bf16(Vec v) {
  WordVec out;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = as_bits(v.lane[i]);
    out.lane[i] = v.lane[i] == v.lane[i] ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
  }
  return out;
}
ORTHRUS_INLINE void store(bf16_t* p, Vec v) {
  const WordVec words = round_to_bf16(v);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<bf16_t>(words.lane[i] >> 16);
}

ORTHRUS_INLINE WordVec load_words(const void* p) {
  WordVec out;
  std::memcpy(out.lane, p, sizeof out.lane);
  return out;
}
ORTHRUS_INLINE Vec as_floats(WordVec a) {
  Vec out;
  std::memcpy(out.lane, a.lane, sizeof out.lane);
  return out;
}
ORTHRUS_INLINE WordVec set1_word(uint32_t word) {
  WordVec out;
  for (int i = 0; i < 16; ++i) out.lane[i] = word;
  return out;
}
ORTHRUS_INLINE Vec first_of(WordVec pairs) {
  Vec out;
  for (int i = 0; i < 16; ++i) out.lane[i] = as_float(pairs.lane[i] << 16);
  return out;
}
ORTHRUS_INLINE Vec second_of(WordVec pairs) {
  Vec out;
  for (int i = 0; i < 16; ++i) out.lane[i] = as_float(pairs.lane[i] & 0xffff0000u);
  return out;
}

// Lanes that are at least `bound`; a NaN is not.
ORTHRUS_INLINE int32_t count_at_least(Vec x, float bound) {
  int32_t count = 0;
  for (int i = 0; i < 16; ++i) count += x.lane[i] >= bound;
  return count;
}
// Packs the lanes with low <= x < high at out; returns how many. May overwrite 16 places.
ORTHRUS_INLINE int32_t compress_between(float* out, Vec x, float low, float high) {
  int32_t count = 0;
  for (int i = 0; i < 16; ++i) {
    out[count] = x.lane[i];
    count += x.lane[i] >= low && x.lane[i] < high;
  }
  return count;
}

// The same lanes as 32-bit words.
ORTHRUS_INLINE WordVec bit_xor(WordVec a, WordVec b) {
  for (int i = 0; i < 16; ++i) a.lane[i] ^= b.lane[i];
  return a;
}
// High and low word of a * m.
ORTHRUS_INLINE void multiply_wide(WordVec a, uint32_t m, WordVec* high, WordVec* low) {
  for (int i = 0; i < 16; ++i) {
    const uint64_t product = uint64_t{a.lane[i]} * m;
    high->lane[i] = static_cast<uint32_t>(product >> 32);
    low->lane[i] = static_cast<uint32_t>(product);
  }
}
// Unsigned words rounded to nearest even.
ORTHRUS_INLINE Vec words_to_float(WordVec a) {
  Vec out;
  for (int i = 0; i < 16; ++i) out.lane[i] = static_cast<float>(a.lane[i]);
  return out;
}

ORTHRUS_INLINE float reduce_add(Vec v) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v.lane[i] += v.lane[i + width];
  }
  return v.lane[0];
}
ORTHRUS_INLINE float reduce_max(Vec v) {
  for (int i = 1; i < 16; ++i) v.lane[0] = v.lane[0] > v.lane[i] ? v.lane[0] : v.lane[i];
  return v.lane[0];
}
// First lane equal to x.
ORTHRUS_INLINE int32_t first_equal(Vec v, float x) {
  int32_t i = 0;
  while (i < 16 && v.lane[i] != x) ++i;
  return i;
}

// Into L2: what is needed soon, but not before what L1 holds now.
ORTHRUS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// out[j][i] = in[i][j] of 16 x 16 words; row i of in starts at in[i], rows of out are `stride` words apart.
ORTHRUS_INLINE void transpose16(const uint32_t* const* in, uint32_t* out, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) out[j * stride + i] = in[i][j];
  }
}

}  // namespace orthrus::cpu::portable
