// The words that the steps over a strip load, whether it is coded (see coded_weight.h) or not.
#pragma once
#include "coded_weight.h"
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr int kStepBytes = kStepElements * sizeof(bf16_t);

// One step over k: two vectors, 32 outputs.
struct StepWords {
  WordVec lo, hi;
};

struct PlainWords {
  static constexpr int kSteps = 1;  // that are read at a time
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

// Step kStep of a unit, without exceptions.
template <int kStep>
ORTHRUS_INLINE StepWords decode_step(const char* unit, WordVec table) {
  const WordVec codes = load_words(unit), lower = load_words(unit + (1 + kStep) * kStepElements);
  const WordVec upper = look_up(table, kStep ? high_nibbles(codes) : low_nibbles(codes));
  return {zip_first(lower, upper), zip_last(lower, upper)};
}

ORTHRUS_INLINE void store_step(char* out, StepWords words) {
  store_words(out, words.lo);
  store_words(out + kStepBytes / 2, words.hi);
}

struct CodedUnits {
  const char* unit;
  WordVec table;
  const CodedException* next;

  explicit CodedUnits(const char* at) {
    const auto* strip = reinterpret_cast<const CodedStrip*>(at);
    unit = strip->units();
    table = load_words(strip->upper);
    next = strip->exceptions();
  }
};

// Unpacked on the fly, with steps in order.
struct CodedWords : CodedUnits {
  static constexpr int kSteps = kUnitSteps;
  int64_t next_step;

  explicit CodedWords(const char* at) : CodedUnits(at), next_step(next->step) {}

  // kStep: which of the unit's two steps.
  template <int kStep>
  ORTHRUS_INLINE StepWords words(int64_t k) {
    StepWords out = decode_step<kStep>(unit, table);
    if (__builtin_expect(next_step == k, 0)) {
      alignas(64) bf16_t element[kStepElements];
      store_step(reinterpret_cast<char*>(element), out);
      for (; next->step == k; ++next) element[next->element] = next->value;
      next_step = next->step;
      out = {load_words(element), load_words(element + kStepElements / 2)};
    }
    if (kStep + 1 == kSteps) unit += kUnitBytes;
    return out;
  }
};

// Unpacked in runs of an even number of steps each, in order.
struct CodedRuns : CodedUnits {
  int64_t done = 0;  // steps

  using CodedUnits::CodedUnits;

  ORTHRUS_INLINE bool has_exception(int64_t num_steps) const { return next->step < done + num_steps; }
  ORTHRUS_INLINE void skip(int64_t num_steps) {
    unit += num_steps / kUnitSteps * kUnitBytes;
    done += num_steps;
  }
  // Unpacks num_steps steps to `out`, in the layout of a plain strip.
  ORTHRUS_INLINE void decode(int64_t num_steps, char* out) {
    const CodedRuns from = *this;  // a copy, which no store to `out` can change
    for (int64_t k = 0; k < num_steps; k += kUnitSteps) {
      const char* at = from.unit + k / kUnitSteps * kUnitBytes;
      const StepWords first = decode_step<0>(at, from.table), second = decode_step<1>(at, from.table);
      store_step(out + k * kStepBytes, first);
      store_step(out + (k + 1) * kStepBytes, second);
    }
    for (; has_exception(num_steps); ++next) {
      char* step = out + (next->step - done) * kStepBytes;
      std::memcpy(step + next->element * sizeof(bf16_t), &next->value, sizeof(bf16_t));
    }
    skip(num_steps);
  }
};
#else
constexpr bool kDecodesWords = false;
#endif

}  // namespace orthrus::cpu::ORTHRUS_ISA
