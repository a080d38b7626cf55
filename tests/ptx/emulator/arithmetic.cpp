// Integer and floating-point arithmetic, comparisons and logic, lane by lane.
#include "lanes.h"
#include "parsed.h"

namespace ptx {
namespace {

// Handlers by type. Integer arithmetic wraps (-fwrapv).
template <class Make>
Handler of_integers(std::string_view t, Make make) {
  if (t == "s32") return make.template operator()<int32_t>();
  if (t == "u32" || t == "b32") return make.template operator()<uint32_t>();
  if (t == "s64") return make.template operator()<int64_t>();
  if (t == "u64" || t == "b64") return make.template operator()<uint64_t>();
  if (t == "s16") return make.template operator()<int16_t>();
  if (t == "u16" || t == "b16") return make.template operator()<uint16_t>();
  if (t == "pred") return make.template operator()<bool>();
  return nullptr;
}
template <class Make>
Handler of_floats(std::string_view t, Make make) {
  if (t == "f32") return make.template operator()<float>();
  if (t == "f64") return make.template operator()<double>();
  return nullptr;
}
template <class Make>
Handler of_any(std::string_view t, Make make) {
  return t[0] == 'f' ? of_floats(t, make) : of_integers(t, make);
}
template <auto F>
Handler int2(std::string_view t) {
  return of_integers(t, []<class T>() -> Handler { return map2<F, T, T, T>; });
}
template <auto F>
Handler float2(std::string_view t) {
  return of_floats(t, []<class T>() -> Handler { return map2<F, T, T, T>; });
}
template <auto F>
Handler any2(std::string_view t) {
  return of_any(t, []<class T>() -> Handler { return map2<F, T, T, T>; });
}
template <auto F>
Handler any1(std::string_view t) {
  return of_any(t, []<class T>() -> Handler { return map1<F, T, T>; });
}
template <auto F>
Handler compare(std::string_view t) {
  return of_any(t, []<class T>() -> Handler { return map2<F, bool, T, T>; });
}

template <class T>
bool unordered(T a, T b) {
  return a != a || b != b;
}
Handler comparison(const std::string& op, std::string_view t) {
  if (op == "eq") return compare<[](auto a, auto b) { return a == b; }>(t);
  if (op == "ne") return compare<[](auto a, auto b) { return a != b && !unordered(a, b); }>(t);
  if (op == "lt" || op == "lo") return compare<[](auto a, auto b) { return a < b; }>(t);
  if (op == "le" || op == "ls") return compare<[](auto a, auto b) { return a <= b; }>(t);
  if (op == "gt" || op == "hi") return compare<[](auto a, auto b) { return (a > b); }>(t);
  if (op == "ge" || op == "hs") return compare<[](auto a, auto b) { return a >= b; }>(t);
  if (op == "equ") return compare<[](auto a, auto b) { return a == b || unordered(a, b); }>(t);
  if (op == "neu") return compare<[](auto a, auto b) { return a != b; }>(t);
  if (op == "ltu") return compare<[](auto a, auto b) { return !(a >= b); }>(t);
  if (op == "leu") return compare<[](auto a, auto b) { return !(a > b); }>(t);
  if (op == "gtu") return compare<[](auto a, auto b) { return !(a <= b); }>(t);
  if (op == "geu") return compare<[](auto a, auto b) { return !(a < b); }>(t);
  if (op == "num") return compare<[](auto a, auto b) { return !unordered(a, b); }>(t);
  if (op == "nan") return compare<[](auto a, auto b) { return unordered(a, b); }>(t);
  return nullptr;
}

template <class T>
T smaller(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}

// fma rounded towards minus infinity.
float fma_down(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c, back = sum - product;
  const double error = (product - (sum - back)) + (c - back);
  const float rounded = static_cast<float>(sum);
  const bool above = rounded > sum || (rounded == sum && error < 0);
  return above && std::isfinite(rounded) ? std::nextafter(rounded, -INFINITY) : rounded;
}

template <class T>
T divide(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    if (b == 0) return static_cast<T>(-1);
    if constexpr (std::is_signed_v<T>)
      if (b == -1) return static_cast<T>(-a);
  }
  return static_cast<T>(a / b);
}
template <class T>
T remainder_of(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return static_cast<T>(a % b);
}

constexpr auto add = [](auto a, auto b) -> decltype(a) { return a + b; };
constexpr auto subtract = [](auto a, auto b) -> decltype(a) { return a - b; };
constexpr auto multiply = [](auto a, auto b) -> decltype(a) { return static_cast<decltype(a)>(a * b); };
constexpr auto negate = [](auto a) -> decltype(a) { return -a; };
constexpr auto magnitude = [](auto a) -> decltype(a) { return a < 0 || (a == 0 && std::signbit(double(a))) ? -a : a; };
template <auto F>
constexpr auto flushed = [](float a, float b) { return flush(F(flush(a), flush(b))); };

template <class T, class Wide>
Handler high() {
  return map2<[](T a, T b) { return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (sizeof(T) * 8)); },
              T, T, T>;
}

Handler multiplication(const Parsed& p, const std::string& t) {
  if (p.has("hi")) {
    if (t == "u16") return high<uint16_t, uint32_t>();
    if (t == "u32") return high<uint32_t, uint64_t>();
    if (t == "s32") return high<int32_t, int64_t>();
    if (t == "u64") return high<uint64_t, unsigned __int128>();
    return nullptr;
  }
  if (p.has("wide")) {
    if (t == "s32") return map2<[](int32_t a, int32_t b) { return int64_t(a) * b; }, int64_t, int32_t, int32_t>;
    if (t == "u32") return map2<[](uint32_t a, uint32_t b) { return uint64_t(a) * b; }, uint64_t, uint32_t, uint32_t>;
    if (t == "u16") return map2<[](uint16_t a, uint16_t b) { return uint32_t(a) * b; }, uint32_t, uint16_t, uint16_t>;
    return nullptr;
  }
  return p.has("ftz") ? float2<flushed<multiply>>(t) : any2<multiply>(t);
}

Handler multiply_add(const Parsed& p, const std::string& t) {
  if (p.has("wide")) {
    if (t == "s32")
      return map3<[](int32_t a, int32_t b, int64_t c) { return int64_t(a) * b + c; }, int64_t, int32_t, int32_t,
                  int64_t>;
    if (t == "u32")
      return map3<[](uint32_t a, uint32_t b, uint64_t c) { return uint64_t(a) * b + c; }, uint64_t, uint32_t, uint32_t,
                  uint64_t>;
    return nullptr;
  }
  constexpr auto low = [](auto a, auto b, auto c) -> decltype(a) { return a * b + c; };
  if (t == "s32" || t == "u32") return map3<low, uint32_t, uint32_t, uint32_t, uint32_t>;
  if (t == "s64" || t == "u64") return map3<low, uint64_t, uint64_t, uint64_t, uint64_t>;
  if (t == "s16" || t == "u16") return map3<low, uint16_t, uint16_t, uint16_t, uint16_t>;
  return nullptr;
}

Handler fused(const Parsed& p, const std::string& t) {
  constexpr auto nearest = [](auto a, auto b, auto c) { return std::fma(a, b, c); };
  constexpr auto ftz = [](float a, float b, float c) { return flush(std::fma(flush(a), flush(b), flush(c))); };
  if (t == "f64") return map3<nearest, double, double, double, double>;
  if (p.has("rm")) return map3<fma_down, float, float, float, float>;
  return p.has("ftz") ? map3<ftz, float, float, float, float> : map3<nearest, float, float, float, float>;
}

Handler of_one_float(const Parsed& p, const std::string& op) {
  constexpr auto exp2 = [](float x) { return std::exp2(x); };
  constexpr auto exp2_flushed = [](float x) { return flush(std::exp2(flush(x))); };
  if (op == "ex2") return p.has("ftz") ? map1<exp2_flushed, float, float> : map1<exp2, float, float>;
  if (op == "rsqrt") return map1<[](float x) { return static_cast<float>(1 / std::sqrt(double(x))); }, float, float>;
  if (op == "rcp") return map1<[](float x) { return 1 / x; }, float, float>;
  if (op == "lg2") return map1<[](float x) { return std::log2(x); }, float, float>;
  if (op == "sqrt") return map1<[](float x) { return std::sqrt(x); }, float, float>;
  return nullptr;
}

}  // namespace

bool decode_arithmetic(Parsed& p) {
  const std::string &op = p.parts[0], &t = p.type();
  Instruction& o = p.out;
  const int bytes = register_bytes(t);
  const bool ftz = p.has("ftz");
  if (op == "setp") {
    if (p.parts.size() != (ftz ? 4u : 3u) || p.operands.size() != 3) return false;
    o.run = comparison(p.parts[1], t);
    return p.places(4, bytes, bytes);
  }
  if (op == "mul") {
    const bool wide = p.has("wide");
    o.run = multiplication(p, t);
    return p.places(wide && t != "u16" ? 8 : bytes, bytes, bytes);
  }
  if (op == "mad") {
    const bool wide = p.has("wide");
    o.run = multiply_add(p, t);
    return p.places(wide ? 8 : bytes, bytes, bytes, wide ? 8 : bytes);
  }
  if (op == "fma") {
    o.run = fused(p, t);
    return p.places(bytes, bytes, bytes, bytes);
  }
  if (Handler run = t == "f32" ? of_one_float(p, op) : nullptr) {
    o.run = run;
    return p.places(4, 4);
  }
  if (op == "neg" || op == "not" || op == "abs") {
    o.run = op == "neg"   ? any1<negate>(t)
            : op == "abs" ? (t == "f32" ? map1<magnitude, float, float> : nullptr)
            : t == "pred" ? map1<[](bool x) { return !x; }, bool, bool>
            : bytes == 8  ? map1<[](uint64_t x) { return ~x; }, uint64_t, uint64_t>
                          : map1<[](uint32_t x) { return ~x; }, uint32_t, uint32_t>;
    return p.places(bytes, bytes);
  }
  if (op == "add") o.run = ftz ? float2<flushed<add>>(t) : any2<add>(t);
  if (op == "sub") o.run = ftz ? float2<flushed<subtract>>(t) : any2<subtract>(t);
  if (op == "div") o.run = any2<[](auto a, auto b) { return divide(a, b); }>(t);
  if (op == "rem") o.run = int2<[](auto a, auto b) { return remainder_of(a, b); }>(t);
  if (op == "min") o.run = any2<[](auto a, auto b) { return smaller(a, b); }>(t);
  if (op == "max") o.run = any2<[](auto a, auto b) { return larger(a, b); }>(t);
  if (op == "and") o.run = int2<[](auto a, auto b) -> decltype(a) { return a & b; }>(t);
  if (op == "or") o.run = int2<[](auto a, auto b) -> decltype(a) { return a | b; }>(t);
  if (op == "xor") o.run = int2<[](auto a, auto b) -> decltype(a) { return a ^ b; }>(t);
  if (o.run) return p.places(bytes, bytes, bytes);
  return false;
}

}  // namespace ptx
