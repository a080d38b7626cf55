// Prints what the functions of simd.h over vectors give on one instruction set: a line of bits for each call. Every NaN
// prints the same, and results whose sign of zero is arbitrary are added to zero. What they read and write ends right
// before memory that must not be touched.
#include "simd.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace simd = orthrus::cpu::ORTHRUS_ISA;
using orthrus::bf16_t;
using simd::Vec;
using simd::WordVec;

namespace {

constexpr int kLanes = simd::kLanes;

#if defined(ORTHRUS_HAS_DOT2)
using simd::zip_pairs;
Vec dot(Vec acc, WordVec a, WordVec b) { return simd::dot<bf16_t>(acc, a, b); }
#else  // what they stand for
WordVec zip_pairs(const bf16_t* p, const bf16_t* q) {
  uint32_t words[kLanes];
  for (int i = 0; i < kLanes; ++i) words[i] = p[i] | (q ? uint32_t{q[i]} << 16 : 0u);
  return simd::load_words(words);
}
Vec dot(Vec acc, WordVec a, WordVec b) {
  return simd::fma(simd::second_of(a), simd::second_of(b), simd::fma(simd::first_of(a), simd::first_of(b), acc));
}
#endif

// Room for `count` elements right before a page that must not be touched.
template <typename T>
T* at_edge(int count) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* pages = mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED || mprotect(static_cast<char*>(pages) + page, page, PROT_NONE)) std::abort();
  return reinterpret_cast<T*>(static_cast<char*>(pages) + page) - count;
}

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

// Any bits, and every few lanes a special value.
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
// Of any exponent, some right at 4/3, where the exponent that log uses changes.
float positive_normal() {
  const uint32_t bits = 0x00800000u + next_word() % 0x7f000000u;
  return as_float(next_word() % 4 ? bits : (bits & 0x7f800000u) + 0x2aaaaau + next_word() % 2);
}

template <typename Make>
Vec fill(Make make) {
  static float* const lane = at_edge<float>(kLanes);
  for (int i = 0; i < kLanes; ++i) lane[i] = make();
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
  static float* const lane = at_edge<float>(kLanes);
  uint32_t bits[kLanes];
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
  static float lanes[4][kLanes];
  for (int i = 0; i < 3; ++i) simd::store(lanes[i], i == 0 ? a : i == 1 ? b : c);
  for (int i = 0; i < kLanes; ++i) lanes[3][i] = std::fma(lanes[0][i], lanes[1][i], lanes[2][i]);
  print("fused", simd::load(lanes[3]));
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
  const Vec left = fill(in(8.f)), right = fill(in(8.f));
  print("reduce_add", simd::reduce_add(simd::mul(left, right)));
  print("reduce_max", simd::reduce_max(simd::replace_nan(a, 0.f)));
  print("exp", simd::exp(fill(in(100.f))));
  print("exp", simd::exp(a));
  print("log", simd::log(fill([] { return 0.25f * positive_normal() + 1e-37f; })));
}

void counting() {
  const Vec few = fill([] { return next_word() % 4 ? whole(3) : any(); });
  const float low = whole(3), high = whole(3);
  std::printf("count_at_least %d %d\n", simd::count_at_least(few, low), simd::count_at_least(fill(any), low));
  static float* const out = at_edge<float>(kLanes);
  const int32_t count = simd::compress_between(out, few, low, high);
  std::printf("compress_between %d", count);
  for (int i = 0; i < count; ++i) std::printf(" %a", out[i] + 0.f);
  std::printf("\nfirst_equal %d\n", simd::first_equal(few, low));
}

void words() {
  static uint32_t *const in = at_edge<uint32_t>(kLanes), *const other = at_edge<uint32_t>(kLanes);
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
  static bf16_t *const p = at_edge<bf16_t>(kLanes), *const q = at_edge<bf16_t>(kLanes);
  static bf16_t* const out = at_edge<bf16_t>(kLanes);
  for (int i = 0; i < kLanes; ++i) {
    p[i] = simd::to_bf16(within(4.f));
    q[i] = simd::to_bf16(within(4.f));
  }
  print("load", simd::load(p));
  const Vec wide = fill(any);
  simd::store(out, wide);
  print("store_any", out, kLanes);
  simd::store(out, simd::where_less(simd::mul(wide, wide), 1e-37f, simd::set1(1.f), wide));
  print("store", out, kLanes);
  const WordVec pairs = zip_pairs(p, q), more = zip_pairs(q, p);
  print("zip_pairs", pairs);
  print("zip_pairs", zip_pairs(p, nullptr));
  print("first_of", simd::first_of(pairs));
  print("second_of", simd::second_of(pairs));
  print("dot", dot(fill([] { return within(4.f); }), pairs, more));
}

void transposition() {
  constexpr int kStride = 20, kWords = 15 * kStride + kLanes;
  static uint32_t *const in = at_edge<uint32_t>(kLanes * kLanes), *const out = at_edge<uint32_t>(kWords);
  const uint32_t* rows[kLanes];
  for (int i = 0; i < kLanes * kLanes; ++i) in[i] = next_word();
  for (int i = 0; i < kLanes; ++i) rows[i] = in + (7 * i + 3) % kLanes * kLanes;
  simd::transpose16(rows, out, kStride);
  print("transpose16", out, kWords);
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
