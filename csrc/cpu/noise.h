// The noise of sampled choices: Philox 4x32-10 (Salmon et al. 2011), keyed by seed, position, purpose and token id,
// so that it depends on nothing else. The uniforms are the same bits in every implementation.
#pragma once
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr int64_t kNoiseTokens = 64;

// fp32 uniforms in (0, 1) of tokens first ... first + 63, `first` a multiple of 64. Word w of counter (token / 4,
// position, purpose, 0) belongs to token 4 * (token / 4) + w.
ORTHRUS_INLINE void uniforms(int64_t seed, int32_t position, int32_t purpose, int64_t first, float* out) {
  alignas(64) uint32_t quad[kLanes];
  for (int i = 0; i < kLanes; ++i) quad[i] = static_cast<uint32_t>(first / 4 + i);
  WordVec c0, c1 = set1_word(position), c2 = set1_word(purpose), c3 = set1_word(0);
  std::memcpy(&c0, quad, sizeof quad);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < 10; ++i) {
    WordVec high0, low0, high2, low2;
    multiply_wide(c0, 0xD2511F53u, &high0, &low0);
    multiply_wide(c2, 0xCD9E8D57u, &high2, &low2);
    c0 = bit_xor(bit_xor(high2, c1), set1_word(key0));
    c2 = bit_xor(bit_xor(high0, c3), set1_word(key1));
    c1 = low2;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  alignas(64) float word[4][kLanes];
  const WordVec counter[4] = {c0, c1, c2, c3};
  for (int w = 0; w < 4; ++w) {
    const Vec u = mul(add(words_to_float(counter[w]), set1(0.5f)), set1(0x1p-32f));
    store(word[w], min(u, set1(1 - 0x1p-24f)));
  }
  for (int i = 0; i < kLanes; ++i) {
    for (int w = 0; w < 4; ++w) out[4 * i + w] = word[w][i];
  }
}

// -ln(1 - u), with full relative precision near 0, where samples are decided. -ln of it is Gumbel noise, at most 22.9.
ORTHRUS_INLINE Vec exponential(Vec u) {
  Vec series = fma(u, set1(1.f / 4), set1(1.f / 3));
  series = fma(series, u, set1(1.f / 2));
  series = mul(fma(series, u, set1(1.f)), u);
  return where_less(u, 0x1p-7f, series, sub(zero(), log(sub(set1(1.f), u))));
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
