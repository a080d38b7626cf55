// The words that the steps over a strip load, whether it is coded (see coded_weight.h) or not.
#pragma once
#include "coded_weight.h"
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr int kStepBytes = kStepElements * sizeof(bf16_t);

// Of two vectors, 32 outputs: one step over k.
struct StepWords {
  WordVec lo, hi;
};

struct PlainWords {
  static constexpr int kSteps = 1;  // that are read together
  const char* strip;

  explicit PlainWords(const char* strip) : strip(strip) {}

  template <int kStep>
  ORTHRUS_INLINE StepWords words(int64_t k) {
    const char* at = strip + kStepBytes * k;
    return {load_words(at), load_words(at + kStepBytes / 2)};
  }
};

#if defined(ORTHRUS_DECODES_WORDS)
constexpr bool kDecodesWords = true;

// Decoded on the way, with steps in order.
struct CodedWords {
  static constexpr int kSteps = kUnitSteps;
  const char* unit;
  WordVec exponents;
  const CodedException* next;
  int64_t next_step;

  explicit CodedWords(const char* at) {
    const auto* strip = reinterpret_cast<const CodedStrip*>(at);
    unit = strip->units();
    exponents = load_words(strip->exponent);
    next = strip->exceptions();
    next_step = next->step;
  }

  // kStep: of the unit's two.
  template <int kStep>
  ORTHRUS_INLINE StepWords words(int64_t k) {
    const WordVec codes = load_words(unit);
    const char* rest = unit + kCodeBytes + kStep * kStepElements;
    const WordVec lo = kStep ? shift_halves_right<8>(codes) : codes;
    StepWords out{decode_words(rest, lo, exponents),
                  decode_words(rest + kStepElements / 2, shift_halves_right<8 * kStep + 4>(codes), exponents)};
    if (__builtin_expect(next_step == k, 0)) {
      alignas(64) bf16_t element[kStepElements];
      store_words(element, out.lo);
      store_words(element + kStepElements / 2, out.hi);
      for (; next->step == k; ++next) element[next->element] = next->value;
      next_step = next->step;
      out = {load_words(element), load_words(element + kStepElements / 2)};
    }
    if (kStep + 1 == kSteps) unit += kUnitBytes;
    return out;
  }
};

// A coded strip as a plain one at `out`.
ORTHRUS_INLINE void decode_strip(const char* at, int64_t num_steps, char* out) {
  CodedWords strip(at);
  const auto store = [&](StepWords words) ORTHRUS_LAMBDA {
    store_words(out, words.lo);
    store_words(out + kStepBytes / 2, words.hi);
    out += kStepBytes;
  };
  for (int64_t k = 0; k < num_steps; k += kUnitSteps) {
    store(strip.words<0>(k));
    store(strip.words<1>(k + 1));
  }
}
#else
constexpr bool kDecodesWords = false;
#endif

}  // namespace orthrus::cpu::ORTHRUS_ISA
