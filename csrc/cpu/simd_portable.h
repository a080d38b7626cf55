// The variant portable: plain C++, for any processor.
#pragma once

namespace orthrus::cpu::portable {

constexpr int kTileRows = 4, kWidenedTileRows = kTileRows, kWholeTileRows = kTileRows;
constexpr int kTileQueries = 2, kTileVecs = 4;
constexpr bool kWidensAtUse = false;

// Four lanes, as many as most processors' registers hold; elsewhere compilers take them one by one.
using Floats = float __attribute__((vector_size(16)));
using Integers = int32_t __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));

struct Vec {
  Floats part[4];
};
struct WordVec {
  Words part[4];
};

ORTHRUS_INLINE Vec zero() { return {}; }
ORTHRUS_INLINE Vec set1(float x) {
  const Floats four = {x, x, x, x};
  return {{four, four, four, four}};
}
ORTHRUS_INLINE WordVec set1_word(uint32_t word) {
  const Words four = {word, word, word, word};
  return {{four, four, four, four}};
}

#define ORTHRUS_EACH(Lanes, signature, expression)                      \
  ORTHRUS_INLINE Lanes signature {                                      \
    const auto part = [&](int i) ORTHRUS_LAMBDA { return expression; }; \
    return {{part(0), part(1), part(2), part(3)}};                      \
  }
ORTHRUS_EACH(Vec, add(Vec a, Vec b), a.part[i] + b.part[i])
ORTHRUS_EACH(Vec, sub(Vec a, Vec b), a.part[i] - b.part[i])
ORTHRUS_EACH(Vec, mul(Vec a, Vec b), a.part[i] * b.part[i])
ORTHRUS_EACH(Vec, div(Vec a, Vec b), a.part[i] / b.part[i])
// Rounds twice: a fused product is a library call on machines without the instruction.
ORTHRUS_EACH(Vec, fma(Vec a, Vec b, Vec c), a.part[i] * b.part[i] + c.part[i])
ORTHRUS_EACH(Vec, max(Vec a, Vec b), a.part[i] > b.part[i] ? a.part[i] : b.part[i])
ORTHRUS_EACH(Vec, min(Vec a, Vec b), a.part[i] < b.part[i] ? a.part[i] : b.part[i])
// Nearest even for |a| < 2^22, by the rounding of the addition itself.
ORTHRUS_EACH(Vec, round(Vec a), (a.part[i] + 12582912.f) - 12582912.f)
// The addition leaves n, a whole number, in the low bits; converting to an integer would be undefined for a NaN.
ORTHRUS_EACH(Vec, scale_by_pow2(Vec a, Vec n),
             a.part[i] * Floats((Words(n.part[i] + 12582912.f) - 0x4b400000u + 127u) << 23))
ORTHRUS_EACH(Vec, truncate(Vec a), __builtin_convertvector(__builtin_convertvector(a.part[i], Integers), Floats))
ORTHRUS_EACH(Vec, exponent(Vec x), __builtin_convertvector(Integers(Words(x.part[i]) - 0x3f2aaaabu) >> 23, Floats))
ORTHRUS_EACH(Vec, where_less(Vec x, float bound, Vec a, Vec b), x.part[i] < bound ? a.part[i] : b.part[i])
ORTHRUS_EACH(Vec, replace_nan(Vec v, float x), v.part[i] == v.part[i] ? v.part[i] : set1(x).part[i])

ORTHRUS_EACH(Vec, as_floats(WordVec a), Floats(a.part[i]))
ORTHRUS_EACH(Vec, first_of(WordVec pairs), Floats(pairs.part[i] << 16))
ORTHRUS_EACH(Vec, second_of(WordVec pairs), Floats(pairs.part[i] & 0xffff0000u))
ORTHRUS_EACH(WordVec, bit_xor(WordVec a, WordVec b), a.part[i] ^ b.part[i])
ORTHRUS_EACH(Vec, words_to_float(WordVec a), __builtin_convertvector(a.part[i], Floats))
ORTHRUS_INLINE Words round_to_bf16(Floats v) {
  const Words bits = Words(v);
  return v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
}
ORTHRUS_EACH(WordVec, round_to_bf16(Vec v), round_to_bf16(v.part[i]))
#undef ORTHRUS_EACH

ORTHRUS_INLINE Vec keep_first(Vec v, int64_t count, float x) {
  Integers lane = {0, 1, 2, 3};
  const int32_t bound = static_cast<int32_t>(count < 16 ? count : 16);
  for (int i = 0; i < 4; ++i, lane += 4) v.part[i] = lane < bound ? v.part[i] : set1(x).part[i];
  return v;
}

ORTHRUS_INLINE WordVec load_words(const void* p) {
  WordVec out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
ORTHRUS_INLINE Vec load(const float* p) { return as_floats(load_words(p)); }
ORTHRUS_INLINE Vec load(const bf16_t* p) {
  uint32_t lane[16];
  for (int i = 0; i < 16; ++i) lane[i] = uint32_t{p[i]} << 16;
  return as_floats(load_words(lane));
}
ORTHRUS_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
ORTHRUS_INLINE void store(bf16_t* p, Vec v) {
  const WordVec words = round_to_bf16(v);
  uint32_t lane[16];
  std::memcpy(lane, &words, sizeof lane);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<bf16_t>(lane[i] >> 16);
}

ORTHRUS_INLINE int32_t count_at_least(Vec x, float bound) {
  Integers found = {};
  for (int i = 0; i < 4; ++i) found -= x.part[i] >= bound;
  return found[0] + found[1] + found[2] + found[3];
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
ORTHRUS_INLINE void multiply_wide(WordVec a, uint32_t m, WordVec* high, WordVec* low) {
  uint32_t lane[16], upper[16], lower[16];
  std::memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < 16; ++i) {
    const uint64_t product = uint64_t{lane[i]} * m;
    upper[i] = static_cast<uint32_t>(product >> 32);
    lower[i] = static_cast<uint32_t>(product);
  }
  *high = load_words(upper);
  *low = load_words(lower);
}

ORTHRUS_INLINE float reduce_add(Vec v) {
  const Floats four = (v.part[0] + v.part[2]) + (v.part[1] + v.part[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
ORTHRUS_INLINE float reduce_max(Vec v) {
  float lane[16];
  store(lane, v);
  for (int i = 1; i < 16; ++i) lane[0] = lane[0] > lane[i] ? lane[0] : lane[i];
  return lane[0];
}
ORTHRUS_INLINE int32_t first_equal(Vec v, float x) {
  float lane[16];
  store(lane, v);
  int32_t i = 0;
  while (i < 16 && lane[i] != x) ++i;
  return i;
}

ORTHRUS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
ORTHRUS_INLINE void prefetch_once(const void* p) { prefetch(p); }

ORTHRUS_INLINE void transpose16(const uint32_t* const* in, uint32_t* out, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) out[j * stride + i] = in[i][j];
  }
}

}  // namespace orthrus::cpu::portable
