#include "encode_weight.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

#include "coded_weight.h"
#include "pool.h"

namespace orthrus::cpu {
namespace {

constexpr int kOther = kExponents;  // the number of an exponent that is not listed

int exponent_of(bf16_t element) { return (element & kExponentBits) >> 7; }

struct StripPlan {
  std::array<uint8_t, kExponents> exponents;
  int64_t num_exceptions;
};

StripPlan plan_strip(const bf16_t* strip, int64_t num_elements) {
  int64_t counts[4][256] = {};  // several, as the same exponent comes again before its last count is stored
  for (int64_t i = 0; i < num_elements; ++i) ++counts[i % 4][exponent_of(strip[i])];
  for (int e = 0; e < 256; ++e) counts[0][e] += counts[1][e] + counts[2][e] + counts[3][e];
  std::array<uint8_t, 256> order;
  std::iota(order.begin(), order.end(), uint8_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return counts[0][a] > counts[0][b]; });
  StripPlan plan{{}, num_elements};
  for (int i = 0; i < kExponents; ++i) {
    plan.exponents[i] = order[i];
    plan.num_exceptions -= counts[0][order[i]];
  }
  return plan;
}

std::vector<StripPlan> plan_strips(const bf16_t* plain, int64_t num_strips, int64_t num_elements) {
  std::vector<StripPlan> plans(num_strips);
  parallel_for(num_strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) plans[s] = plan_strip(plain + s * num_elements, num_elements);
  });
  return plans;
}

void encode_strip(const bf16_t* plain, int64_t num_steps, const StripPlan& plan, char* out, CodedException* exceptions) {
  std::array<uint8_t, 256> number;
  number.fill(kOther);
  CodedStrip strip{};
  for (int i = 0; i < kExponents; ++i) {
    number[plan.exponents[i]] = static_cast<uint8_t>(i);
    strip.exponent[i] = strip.exponent[kExponents + i] = static_cast<bf16_t>(plan.exponents[i] << 7);
  }
  strip.to_exceptions = reinterpret_cast<char*>(exceptions) - out;
  std::memcpy(out, &strip, sizeof strip);
  char* unit = out + sizeof strip;
  for (int64_t step = 0; step < num_steps; step += kUnitSteps, unit += kUnitBytes) {
    uint16_t codes[32] = {};
    for (int i = 0; i < kUnitSteps * kStepElements; ++i) {
      const bf16_t element = plain[step * kStepElements + i];
      int code = number[exponent_of(element)];
      if (code == kOther) {
        code = 0;
        *exceptions++ = {static_cast<int32_t>(step + i / kStepElements), static_cast<uint16_t>(i % kStepElements),
                         element};
      }
      codes[i % 32] |= static_cast<uint16_t>(code << (i / 32 * 4));
      unit[sizeof codes + i] = static_cast<char>((element >> 8 & 0x80) | (element & 0x7f));
    }
    std::memcpy(unit, codes, sizeof codes);
  }
  *exceptions = {kNoStep, 0, 0};
}

}  // namespace

int64_t coded_weight_bytes(const bf16_t* plain, int64_t num_strips, int64_t num_steps) {
  int64_t num_exceptions = num_strips;  // the last of each strip
  for (const StripPlan& plan : plan_strips(plain, num_strips, num_steps * kStepElements)) {
    num_exceptions += plan.num_exceptions;
  }
  return num_strips * coded_strip_bytes(num_steps) + num_exceptions * static_cast<int64_t>(sizeof(CodedException));
}

void encode_weight(const bf16_t* plain, int64_t num_strips, int64_t num_steps, char* out) {
  const int64_t num_elements = num_steps * kStepElements, strip_bytes = coded_strip_bytes(num_steps);
  const std::vector<StripPlan> plans = plan_strips(plain, num_strips, num_elements);
  std::vector<CodedException*> exceptions(num_strips);
  auto* next = reinterpret_cast<CodedException*>(out + num_strips * strip_bytes);
  for (int64_t s = 0; s < num_strips; ++s) {
    exceptions[s] = next;
    next += plans[s].num_exceptions + 1;
  }
  parallel_for(num_strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      encode_strip(plain + s * num_elements, num_steps, plans[s], out + s * strip_bytes, exceptions[s]);
    }
  });
}

}  // namespace orthrus::cpu
