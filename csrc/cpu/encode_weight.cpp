#include "encode_weight.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "coded_weight.h"
#include "pool.h"

namespace orthrus::cpu {
namespace {

constexpr int kOther = kExponents;  // the number of an exponent that is not listed

int exponent_of(bf16_t element) { return (element & kExponentBits) >> 7; }

}  // namespace

WeightEncoder::WeightEncoder(const bf16_t* plain, int64_t num_strips, int64_t num_steps)
    : plain_(plain), num_steps_(num_steps), strips_(num_strips) {
  const int64_t num_elements = num_steps * kStepElements;
  parallel_each(num_strips, [&](int64_t s) {
    const bf16_t* strip = plain + s * num_elements;
    int64_t counts[4][256] = {};  // several, as an exponent comes again before its last count is stored
    for (int64_t i = 0; i < num_elements; ++i) ++counts[i % 4][exponent_of(strip[i])];
    for (int e = 0; e < 256; ++e) counts[0][e] += counts[1][e] + counts[2][e] + counts[3][e];
    std::array<uint8_t, 256> order;
    std::iota(order.begin(), order.end(), uint8_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return counts[0][a] > counts[0][b]; });
    strips_[s].num_exceptions = num_elements;
    for (int i = 0; i < kExponents; ++i) {
      strips_[s].exponents[i] = order[i];
      strips_[s].num_exceptions -= counts[0][order[i]];
    }
  });
}

int64_t WeightEncoder::nbytes() const {
  int64_t num_exceptions = 0;
  for (const Strip& strip : strips_) num_exceptions += strip.num_exceptions + 1;
  return static_cast<int64_t>(strips_.size()) * coded_strip_bytes(num_steps_) +
         num_exceptions * static_cast<int64_t>(sizeof(CodedException));
}

void WeightEncoder::write(char* out) const {
  const int64_t num_strips = static_cast<int64_t>(strips_.size()), strip_bytes = coded_strip_bytes(num_steps_);
  std::vector<char*> exceptions(num_strips);
  char* next = out + num_strips * strip_bytes;
  for (int64_t s = 0; s < num_strips; ++s) {
    exceptions[s] = next;
    next += (strips_[s].num_exceptions + 1) * static_cast<int64_t>(sizeof(CodedException));
  }
  parallel_each(num_strips, [&](int64_t s) { write_strip(s, out + s * strip_bytes, exceptions[s]); });
}

void WeightEncoder::write_strip(int64_t s, char* out, char* exceptions) const {
  CodedStrip strip{};
  strip.to_exceptions = exceptions - out;
  std::array<uint8_t, 256> number;
  number.fill(kOther);
  for (int i = 0; i < kExponents; ++i) {
    const uint8_t exponent = strips_[s].exponents[i];
    number[exponent] = static_cast<uint8_t>(i);
    strip.exponent[i] = strip.exponent[kExponents + i] = static_cast<bf16_t>(exponent << 7);
  }
  std::memcpy(out, &strip, sizeof strip);

  const auto except = [&](const CodedException& exception) {
    std::memcpy(exceptions, &exception, sizeof exception);
    exceptions += sizeof exception;
  };
  const bf16_t* plain = plain_ + s * num_steps_ * kStepElements;
  char* unit = out + sizeof strip;
  for (int64_t step = 0; step < num_steps_; step += kUnitSteps, unit += kUnitBytes) {
    uint16_t codes[kCodeBytes / sizeof(uint16_t)] = {};
    for (int i = 0; i < kUnitSteps * kStepElements; ++i) {
      const bf16_t element = plain[step * kStepElements + i];
      int code = number[exponent_of(element)];
      if (code == kOther) {
        code = 0;
        except({static_cast<int32_t>(step + i / kStepElements), static_cast<uint16_t>(i % kStepElements), element});
      }
      codes[i % 32] |= static_cast<uint16_t>(code << (i / 32 * 4));
      unit[kCodeBytes + i] = static_cast<char>((element >> 8 & 0x80) | (element & 0x7f));
    }
    std::memcpy(unit, codes, sizeof codes);
  }
  except({kNoStep, 0, 0});
}

}  // namespace orthrus::cpu
