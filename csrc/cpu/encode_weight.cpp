#include "encode_weight.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "coded_weight.h"
#include "pool.h"

namespace orthrus::cpu {
namespace {

constexpr int kOther = kUpperBytes;  // stands for a byte that has no code

// This many of a step's elements stay side by side; first_of_run: the first of those that are stored as run `run`.
constexpr int kRun = 8;
constexpr int first_of_run(int run) { return run / 2 * kRun + run % 2 * (kStepElements / 2); }

}  // namespace

WeightEncoder::WeightEncoder(const bf16_t* plain, int64_t num_strips, int64_t num_steps, int bits)
    : plain_(plain),
      num_steps_(num_steps),
      leading_bytes_(leading_strip_bytes(num_steps)),
      trailing_bytes_(bits == kDraftBits ? 0 : trailing_strip_bytes(num_steps)),
      strips_(num_strips) {
  const int64_t num_elements = num_steps * kStepElements;
  parallel_each(num_strips, [&](int64_t s) {
    const bf16_t* strip = plain + s * num_elements;
    int64_t counts[4][256] = {};  // several, as a byte may recur before its last count is stored
    for (int64_t i = 0; i < num_elements; ++i) ++counts[i % 4][strip[i] >> 8];
    for (int b = 0; b < 256; ++b) counts[0][b] += counts[1][b] + counts[2][b] + counts[3][b];
    std::array<uint8_t, 256> order;
    std::iota(order.begin(), order.end(), uint8_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return counts[0][a] > counts[0][b]; });
    strips_[s].num_exceptions = num_elements;
    for (int i = 0; i < kUpperBytes; ++i) {
      strips_[s].upper[i] = order[i];
      strips_[s].num_exceptions -= counts[0][order[i]];
    }
  });
}

int64_t WeightEncoder::nbytes() const {
  int64_t num_exceptions = 0;
  for (const Strip& strip : strips_) num_exceptions += strip.num_exceptions + 1;
  return static_cast<int64_t>(strips_.size()) * (leading_bytes_ + trailing_bytes_) +
         num_exceptions * static_cast<int64_t>(sizeof(CodedException));
}

void WeightEncoder::write(char* out) const {
  const int64_t num_strips = static_cast<int64_t>(strips_.size());
  std::vector<char*> exceptions(num_strips);
  char* trailing = out + num_strips * leading_bytes_;
  char* next = trailing + num_strips * trailing_bytes_;
  for (int64_t s = 0; s < num_strips; ++s) {
    exceptions[s] = next;
    next += (strips_[s].num_exceptions + 1) * static_cast<int64_t>(sizeof(CodedException));
  }
  parallel_each(num_strips, [&](int64_t s) {
    write_strip(s, out + s * leading_bytes_, trailing + s * trailing_bytes_, exceptions[s]);
  });
}

void WeightEncoder::write_strip(int64_t s, char* out, char* trailing, char* exceptions) const {
  CodedStrip strip{};
  strip.to_trailing = trailing_bytes_ ? trailing - out : 0;
  strip.to_exceptions = exceptions - out;
  std::array<uint8_t, 256> code_of;
  code_of.fill(kOther);
  for (int i = 0; i < kUpperBytes; ++i) {
    code_of[strips_[s].upper[i]] = static_cast<uint8_t>(i);
    for (auto& table : strip.upper) table[i] = strips_[s].upper[i];
    for (auto& table : strip.last) table[i] = static_cast<uint8_t>(i ^ draft_last_bits(strips_[s].upper[i]));
  }
  std::memcpy(out, &strip, sizeof strip);

  const auto except = [&](const CodedException& exception) {
    std::memcpy(exceptions, &exception, sizeof exception);
    exceptions += sizeof exception;
  };
  const bool has_trailing = trailing_bytes_ > 0;
  const bf16_t* first = plain_ + s * num_steps_ * kStepElements;
  char* leading = out + sizeof strip;
  for (int64_t step = 0; step < num_steps_; step += kUnitSteps, leading += kLeadingBytes) {
    const bf16_t* second = first + kStepElements;
    int all_codes = 0;
    for (int run = 0; run < kStepElements / kRun; ++run) {
      for (int i = 0; i < kRun; ++i) {
        const int place = run * kRun + i, element = first_of_run(run) + i;
        const int code_a = code_of[first[element] >> 8], code_b = code_of[second[element] >> 8];
        all_codes |= code_a | code_b;
        const int a = (first[element] & 0xf0) | code_a % kOther, b = (second[element] & 0xf0) | code_b % kOther;
        leading[place] = static_cast<char>(a);
        leading[kStepElements + place] = static_cast<char>(b);
        const int last = ((a ^ first[element]) & 0xf) | ((b ^ second[element]) & 0xf) << 4;
        if (has_trailing) trailing[place] = static_cast<char>(last);
      }
    }
    if (has_trailing) trailing += kTrailingBytes;
    if (all_codes >= kOther) {
      for (int i = 0; i < kUnitSteps * kStepElements; ++i) {
        if (code_of[first[i] >> 8] != kOther) continue;
        except({static_cast<int32_t>(step + i / kStepElements), static_cast<uint16_t>(i % kStepElements), first[i]});
      }
    }
    first += kUnitSteps * kStepElements;
  }
  except({kNoStep, 0, 0});
}

}  // namespace orthrus::cpu
