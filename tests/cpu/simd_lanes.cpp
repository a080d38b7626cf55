// Prints what every function of simd.h gives on one instruction set: a line of bits for each call. NaN of any kind
// prints as one; results at which a sign of zero is free are added to zero.
#include "simd.h"

#include <cstdio>
#include <vector>

namespace simd = orthrus::cpu::ORTHRUS_ISA;
using orthrus::bf16_t;
using simd::Vec;
using simd::WordVec;

namespace {

constexpr int kLanes = simd::kLanes;

uint32_t next_word() {  // xorshift
  static uint32_t state = 2463534242u;
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}
float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Any bits, and every few lanes what is special.
float any() {
  constexpr uint32_t kSpecial[] = {0u,          0x80000000u, 1u,          0x807fffffu, 0x7f800000u, 0xff800000u,
                                   0x7fc00000u, 0xffc01234u, 0x7f800001u, 0x7f7fffffu, 0x3f808000u, 0x3f818000u};
  const uint32_t word = next_word();
  return as_float(word % 4 ? word : kSpecial[word / 4 % 12]);
}
// Uniform in [-bound, bound), half of it multiples of one half.
float within(float bound) {
  const float x = (static_cast<float>(next_word() >> 8) / 8388608.f - 1.f) * bound;
  return next_word() % 2 ? x : static_cast<float>(static_cast<int32_t>(2.f * x)) / 2.f;
}
float whole(int bound) { return static_cast<float>(static_cast<int32_t>(next_word() % (2 * bound + 1)) - bound); }
float positive_normal() { return as_float(0x00800000u + next_word() % 0x7f000000u); }

template <typename Make>
Vec fill(Make make) {
  float lane[kLanes];
  for (float& x : lane) x = make();
  return simd::load(lane);
}

void print_word(uint32_t word) { std::printf(" %08x", word); }
void print(const char* name, float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  std::printf("%s", name);
  print_word(f == f ? bits : 0x7fc00000u);
  std::puts("");
}
void print(const char* name, Vec v) {
  uint32_t bits[kLanes];
  float lane[kLanes];
  simd::store(lane, v);
  std::memcpy(bits, lane, sizeof bits);
  std::printf("%s", name);
  for (int i = 0; i < kLanes; ++i) print_word(lane[i] == lane[i] ? bits[i] : 0x7fc00000u);
  std::puts("");
}
void print(const char* name, const uint32_t* words, int count) {
  std::printf("%s", name);
  for (int i = 0; i < count; ++i) print_word(words[i]);
  std::puts("");
}
void print(const char* name, WordVec v) {  // a product with one is exact
  WordVec high, low;
  simd::multiply_wide(v, 1, &high, &low);
  uint32_t words[kLanes];
  std::memcpy(words, &low, sizeof words);
  print(name, words, kLanes);
}
void print(const char* name, const bf16_t* elements, int count) {
  std::printf("%s", name);
  for (int i = 0; i < count; ++i) {
    const bool is_nan = (elements[i] & 0x7fff) > 0x7f80;
    print_word(is_nan ? 0x7fc0 : elements[i]);
  }
  std::puts("");
}

void arithmetic() {
  const Vec a = fill(any), b = fill(any), c = fill(any);
  print("set1", simd::set1(any()));
  print("zero", simd::zero());
  print("add", simd::add(a, b));
  print("sub", simd::sub(a, b));
  print("mul", simd::mul(a, b));
  print("div", simd::div(a, b));
  print("fma", simd::fma(a, b, c));
  print("max", simd::max(a, b));
  print("min", simd::min(a, b));
  print("where_less", simd::where_less(a, any(), b, c));
  print("replace_nan", simd::replace_nan(a, 2.f));
  for (int64_t count = -3; count < 20; ++count) print("keep_first", simd::keep_first(a, count, -1.f));
  const auto in = [](float bound) { return [bound] { return within(bound); }; };
  print("round", simd::add(simd::round(fill(in(1000.f))), simd::zero()));
  print("truncate", simd::add(simd::truncate(fill(in(1000.f))), simd::zero()));
  const Vec mantissa = fill(in(8.f)), exponent = fill([] { return whole(120); });
  print("scale_by_pow2", simd::scale_by_pow2(mantissa, exponent));
  print("exponent", simd::exponent(fill(positive_normal)));
  print("reduce_add", simd::reduce_add(fill(in(8.f))));
  print("reduce_max", simd::reduce_max(simd::replace_nan(a, 0.f)));
  print("exp", simd::exp(fill(in(100.f))));
  print("exp", simd::exp(a));
  print("log", simd::log(fill([] { return 0.25f * positive_normal() + 1e-37f; })));
}

void counting() {
  const Vec few = fill([] { return whole(3); });
  const float low = whole(3), high = whole(3);
  std::printf("count_at_least %d %d\n", simd::count_at_least(few, low), simd::count_at_least(fill(any), low));
  float out[2 * kLanes];
  const int32_t count = simd::compress_between(out, few, low, high);
  std::printf("compress_between %d", count);
  for (int i = 0; i < count; ++i) std::printf(" %g", out[i]);
  std::printf("\nfirst_equal %d\n", simd::first_equal(few, low));
}

void words() {
  uint32_t in[kLanes], other[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    in[i] = next_word();
    other[i] = next_word();
  }
  const WordVec a = simd::load_words(in), b = simd::load_words(other);
  WordVec high, low;
  print("words", a);
  print("bit_xor", simd::bit_xor(a, b));
  simd::multiply_wide(a, next_word(), &high, &low);
  print("high", high);
  print("low", low);
  print("words_to_float", simd::words_to_float(a));
  print("set1_word", simd::set1_word(next_word()));
  print("as_floats", simd::as_floats(a));
}

void elements() {
  bf16_t p[kLanes], q[kLanes], out[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    p[i] = simd::to_bf16(within(4.f));
    q[i] = simd::to_bf16(within(4.f));
  }
  print("load", simd::load(p));
  // Where pairs are multiplied at once, denormals become zero.
  const Vec normal = fill([] {
    const float x = any();
    return x * x < 1e-37f ? 1.f : x;
  });
  simd::store(out, normal);
  print("store", out, kLanes);
  const WordVec pairs = simd::zip_pairs(p, q), more = simd::zip_pairs(q, p);
  print("zip_pairs", pairs);
  print("zip_pairs", simd::zip_pairs(p, nullptr));
  print("first_of", simd::first_of(pairs));
  print("second_of", simd::second_of(pairs));
  print("dot", simd::dot<bf16_t>(fill([] { return within(4.f); }), pairs, more));
}

void transposition() {
  uint32_t in[kLanes][kLanes], out[kLanes * 20] = {};
  const uint32_t* rows[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = in[i];
    for (uint32_t& word : in[i]) word = next_word();
  }
  simd::transpose16(rows, out, 20);
  print("transpose16", out, kLanes * 20);
}

}  // namespace

int main() {
  for (int i = 0; i < 200; ++i) {
    arithmetic();
    counting();
    words();
    elements();
    transposition();
  }
}
