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
  const char* ahead;

  PlainWords(const char* strip, const char* ahead) : strip(strip), ahead(ahead) {}

  // The next kLines lines from `ahead` on, two for one use.
  template <int kLines>
  ORTHRUS_INLINE void prefetch_lines() {
    for (int i = 0; i < kLines; ++i, ahead += kLineBytes) kLines == 2 ? prefetch_once(ahead) : prefetch(ahead);
  }

  template <int kStep>
  ORTHRUS_INLINE StepWords words(int64_t k) {
    const char* at = strip + kStepBytes * k;
    return {load_words(at), load_words(at + kStepBytes / 2)};
  }
};

#if defined(ORTHRUS_DECODES_WORDS)
constexpr bool kDecodesWords = true;

// A strip, from some unit of two steps on. Unless kExact, as drafts see it, by its leading part.
template <bool kExact>
struct CodedUnits {
  const char *leading, *trailing;
  WordVec upper_of, last_of;

  explicit CodedUnits(const CodedStrip* strip)
      : leading(strip->leading()),
        trailing(strip->trailing()),
        upper_of(load_words(strip->upper)),
        last_of(load_words(strip->last)) {}

  ORTHRUS_INLINE void advance(int64_t units) {
    leading += units * kLeadingBytes;
    trailing += units * kTrailingBytes;
  }
  // Step kStep of the first unit, without exceptions.
  template <int kStep>
  ORTHRUS_INLINE StepWords step() const {
    const WordVec bytes = load_words(leading + kStep * kStepElements), code = low_nibbles(bytes);
    WordVec last;  // four bits, xor the code
    if constexpr (kExact) {
      last = load_words(trailing);
      last = kStep ? high_nibbles(last) : low_nibbles(last);
    } else {
      last = look_up(last_of, code);
    }
    const WordVec lower = bit_xor(bytes, last), upper = look_up(upper_of, code);
    return {zip_first(lower, upper), zip_last(lower, upper)};
  }
};

template <bool kExact>
ORTHRUS_INLINE bf16_t value_of(const CodedException& exception) {
  return kExact ? exception.value : draft_value(exception.value);
}

ORTHRUS_INLINE void store_step(char* out, StepWords words) {
  store_words(out, words.lo);
  store_words(out + kStepBytes / 2, words.hi);
}

// Unpacked on the fly, with steps in order.
template <bool kExact>
struct CodedWords {
  static constexpr int kSteps = kUnitSteps;
  CodedUnits<kExact> units;
  int64_t ahead_leading, ahead_trailing;  // bytes from a unit to the one to prefetch; across strips nearly
  const CodedException* next;
  int64_t next_step;

  CodedWords(const char* strip, const char* ahead)
      : CodedWords(reinterpret_cast<const CodedStrip*>(strip), ahead - strip) {}
  CodedWords(const CodedStrip* strip, int64_t ahead)
      : units(strip),
        ahead_leading(ahead),
        ahead_trailing(ahead / kLeadingBytes * kTrailingBytes),
        next(strip->exceptions()),
        next_step(next->step) {}

  // All lines of a unit, unless kLines is 0: with 1 into L2, with 2 for one use.
  template <int kLines>
  ORTHRUS_INLINE void prefetch_lines() const {
    if (kLines == 0) return;
    const auto fetch = [](const char* at) ORTHRUS_LAMBDA { kLines == 1 ? prefetch(at) : prefetch_once(at); };
    for (int64_t i = 0; i < kLeadingBytes; i += kLineBytes) fetch(units.leading + ahead_leading + i);
    if (kExact) fetch(units.trailing + ahead_trailing);
  }
  // kStep: which of the unit's two steps.
  template <int kStep>
  ORTHRUS_INLINE StepWords words(int64_t k) {
    StepWords out = units.template step<kStep>();
    if (__builtin_expect(next_step == k, 0)) {
      alignas(64) bf16_t element[kStepElements];
      store_step(reinterpret_cast<char*>(element), out);
      for (; next->step == k; ++next) element[next->element] = value_of<kExact>(*next);
      next_step = next->step;
      out = {load_words(element), load_words(element + kStepElements / 2)};
    }
    if (kStep + 1 == kSteps) units.advance(1);
    return out;
  }
};

// Unpacked in runs of an even number of steps each, in order.
template <bool kExact>
struct CodedRuns {
  CodedUnits<kExact> units;
  const CodedException* next;
  int64_t done = 0;  // steps

  explicit CodedRuns(const char* strip) : CodedRuns(reinterpret_cast<const CodedStrip*>(strip)) {}
  explicit CodedRuns(const CodedStrip* strip) : units(strip), next(strip->exceptions()) {}

  ORTHRUS_INLINE bool has_exception(int64_t num_steps) const { return next->step < done + num_steps; }
  ORTHRUS_INLINE void skip(int64_t num_steps) {
    units.advance(num_steps / kUnitSteps);
    done += num_steps;
  }
  // Unpacks num_steps steps to `out`, in the layout of a plain strip.
  ORTHRUS_INLINE void decode(int64_t num_steps, char* out) {
    CodedUnits<kExact> from = units;  // a copy, which no store to `out` can change
    for (int64_t k = 0; k < num_steps; k += kUnitSteps, from.advance(1)) {
      const StepWords first = from.template step<0>(), second = from.template step<1>();
      store_step(out + k * kStepBytes, first);
      store_step(out + (k + 1) * kStepBytes, second);
    }
    for (; has_exception(num_steps); ++next) {
      char* step = out + (next->step - done) * kStepBytes;
      const bf16_t value = value_of<kExact>(*next);
      std::memcpy(step + next->element * sizeof(bf16_t), &value, sizeof(bf16_t));
    }
    skip(num_steps);
  }
};
#else
constexpr bool kDecodesWords = false;
#endif

}  // namespace orthrus::cpu::ORTHRUS_ISA
