// Moves, conversions, selections, shifts and bit fields, lane by lane.
#include "lanes.h"
#include "parsed.h"

namespace ptx {
namespace {

template <class T>
T shift_left(T a, uint32_t by) {
  return by >= sizeof(T) * 8 ? T(0) : static_cast<T>(a << by);
}
template <class T>
T shift_right(T a, uint32_t by) {
  constexpr uint32_t bits = sizeof(T) * 8;
  if (by < bits) return static_cast<T>(a >> by);
  return a < 0 ? static_cast<T>(-1) : T(0);
}
template <auto F>
Handler shift(std::string_view t) {
  if (t == "b16" || t == "u16") return map2<F, uint16_t, uint16_t, uint32_t>;
  if (t == "s16") return map2<F, int16_t, int16_t, uint32_t>;
  if (t == "b32" || t == "u32") return map2<F, uint32_t, uint32_t, uint32_t>;
  if (t == "s32") return map2<F, int32_t, int32_t, uint32_t>;
  if (t == "b64" || t == "u64") return map2<F, uint64_t, uint64_t, uint32_t>;
  if (t == "s64") return map2<F, int64_t, int64_t, uint32_t>;
  return nullptr;
}

template <class T>
T extract(T a, uint32_t from, uint32_t count) {
  from &= 255, count &= 255;
  constexpr uint32_t bits = sizeof(T) * 8;
  T result = 0;
  const uint32_t sign_at = std::min(from + count - 1, bits - 1);
  const bool sign = std::is_signed_v<T> && count > 0 && (a >> sign_at & 1);
  for (uint32_t k = 0; k < bits; ++k) {
    const bool bit = k < count && from + k < bits ? (a >> (from + k) & 1) : sign;
    result |= static_cast<T>(static_cast<T>(bit) << k);
  }
  return result;
}
template <class T>
void insert(Warp& w, const Instruction& i, Mask m) {
  Lanes<T> d(w, i.d);
  const Lanes<T> a(w, i.a), b(w, i.b);
  const Lanes<uint32_t> from(w, i.c), count(w, i.mask);
  for_lanes(m, [&](int l) {
    T result = b[l];
    for (uint32_t k = 0; k < (count[l] & 255) && (from[l] & 255) + k < sizeof(T) * 8; ++k) {
      const T bit = T(1) << ((from[l] & 255) + k);
      result = (a[l] >> k & 1) ? result | bit : result & ~bit;
    }
    d.set(l, result);
  });
}

template <class D, class S>
D to_integer(S x) {  // towards zero, saturated
  if (x != x) return 0;
  constexpr S low = static_cast<S>(std::numeric_limits<D>::min());
  const S high = std::ldexp(S(1), std::numeric_limits<D>::digits);
  if (x <= low) return std::numeric_limits<D>::min();
  if (x >= high) return std::numeric_limits<D>::max();
  return static_cast<D>(x);
}
template <class D, class S>
Handler plain_conversion() {
  return map1<[](S x) { return static_cast<D>(x); }, D, S>;
}

template <class S>
Handler integer_conversion(std::string_view to) {
  if (to == "s64") return plain_conversion<int64_t, S>();
  if (to == "u64") return plain_conversion<uint64_t, S>();
  if (to == "s32") return plain_conversion<int32_t, S>();
  if (to == "u32") return plain_conversion<uint32_t, S>();
  if (to == "s16") return plain_conversion<int16_t, S>();
  if (to == "u16") return plain_conversion<uint16_t, S>();
  if (to == "f32") return plain_conversion<float, S>();
  if (to == "f64") return plain_conversion<double, S>();
  return nullptr;
}

Handler conversion(const Parsed& p, std::string_view to, std::string_view from) {
  if (p.has("sat")) return map1<[](float x) { return (x > 0.f) ? std::min(x, 1.f) : 0.f; }, float, float>;
  if (from == "s64") return integer_conversion<int64_t>(to);
  if (from == "u64") return integer_conversion<uint64_t>(to);
  if (from == "s32") return integer_conversion<int32_t>(to);
  if (from == "u32") return integer_conversion<uint32_t>(to);
  if (from == "s16") return integer_conversion<int16_t>(to);
  if (from == "u16") return integer_conversion<uint16_t>(to);
  if (from == "bf16" && to == "f32") return map1<[](Bf16 x) { return widen(x.bits); }, float, Bf16>;
  if (from == "f32" && to == "bf16") return map1<[](float x) { return Bf16{round_bf16(x)}; }, Bf16, float>;
  if (from == "f32" && to == "f64") return plain_conversion<double, float>();
  if (from == "f64" && to == "f32") return plain_conversion<float, double>();
  if (!p.has("rzi")) return nullptr;
  if (from == "f32" && to == "s64") return map1<[](float x) { return to_integer<int64_t>(x); }, int64_t, float>;
  if (from == "f32" && to == "s32") return map1<[](float x) { return to_integer<int32_t>(x); }, int32_t, float>;
  if (from == "f64" && to == "s64") return map1<[](double x) { return to_integer<int64_t>(x); }, int64_t, double>;
  return nullptr;
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t s = selector >> (4 * k) & 15;
    uint32_t byte = bytes >> (8 * (s & 7)) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * k);
  }
  return result;
}

template <class T>
void select(Warp& w, const Instruction& i, Mask m) {
  Lanes<T> d(w, i.d);
  const Lanes<T> a(w, i.a), b(w, i.b);
  const Lanes<bool> c(w, i.c);
  for_lanes(m, [&](int l) { d.set(l, c[l] ? a[l] : b[l]); });
}

// mov between a register and a vector of narrower ones. list: the vector; offset: bits per element.
void unpack(Warp& w, const Instruction& i, Mask m) {
  const bool wide = i.offset == 32;
  for_lanes(m, [&](int l) {
    const uint64_t value = wide ? w.reg<uint64_t>(i.a)[l] : w.reg<uint32_t>(i.a)[l];
    for (size_t k = 0; k < i.list.size(); ++k)
      if (i.list[k]) w.reg<uint32_t>(i.list[k])[l] = static_cast<uint32_t>(value >> (k * i.offset)) &
                                                     (wide ? ~0u : 0xffffu);
  });
}
void pack(Warp& w, const Instruction& i, Mask m) {
  const bool wide = i.offset == 32;
  for_lanes(m, [&](int l) {
    uint64_t value = 0;
    for (size_t k = 0; k < i.list.size(); ++k)
      value |= (w.reg<uint32_t>(i.list[k])[l] & (wide ? ~0ull : 0xffffull)) << (k * i.offset);
    if (wide) w.reg<uint64_t>(i.d)[l] = value;
    else w.reg<uint32_t>(i.d)[l] = static_cast<uint32_t>(value);
  });
}

void read_clock(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) { w.reg<uint64_t>(i.d)[l] = w.cta->launch->clock; });
}
bool decode_mov(Parsed& p) {
  const int bytes = register_bytes(p.type());
  const std::string &d = p.operands[0], &a = p.operands[1];
  if (a == "%clock64") {
    p.out.d = p.at(0, 8);
    p.out.run = read_clock;
  } else if (d[0] == '{' || a[0] == '{') {
    const bool to_vector = d[0] == '{';
    const auto names = p.elements(to_vector ? 0 : 1);
    p.out.offset = type_bytes(p.type()) * 8 / static_cast<int>(names.size());
    for (const auto& name : names) p.out.list.push_back(name == "_" ? 0 : p.place(name, 4));
    (to_vector ? p.out.a : p.out.d) = p.at(to_vector ? 1 : 0, bytes);
    p.out.run = to_vector ? unpack : pack;
  } else {
    p.out.d = p.at(0, bytes);
    p.out.a = p.at(1, bytes);
    constexpr auto same = [](auto x) { return x; };
    p.out.run = p.type() == "pred" ? map1<same, bool, bool>
                : bytes == 8       ? map1<same, uint64_t, uint64_t>
                                   : map1<same, uint32_t, uint32_t>;
  }
  return true;
}

void set_registers(Warp& w, const Instruction& i, Mask) { w.registers = static_cast<int>(i.offset2); }

}  // namespace

bool decode_bits(Parsed& p) {
  const std::string &op = p.parts[0], &t = p.type();
  Instruction& o = p.out;
  const int bytes = register_bytes(t);
  if (op == "mov") return decode_mov(p);
  if (op == "cvta") {
    o.run = map1<[](uint64_t x) { return x; }, uint64_t, uint64_t>;
    return p.places(8, 8);
  }
  if (op == "selp") {
    o.run = bytes == 8 ? select<uint64_t> : select<uint32_t>;
    return p.places(bytes, bytes, bytes, 4);
  }
  if (op == "cvt" && t == "f32" && p.has("bf16x2")) {
    o.run = map2<[](float hi, float lo) { return uint32_t(round_bf16(hi)) << 16 | round_bf16(lo); }, uint32_t, float,
                 float>;
    return p.places(4, 4, 4);
  }
  if (op == "cvt") {
    const std::string& to = p.parts[p.parts.size() - 2];
    if (p.width(p.operands[1]) == 8 && bytes == 4) {  // the low half of a wider register
      constexpr auto low = [](uint64_t x) -> uint64_t { return uint32_t(x); };
      if (to == "s64" && t == "s32") o.run = map1<[](uint64_t x) -> int64_t { return int32_t(x); }, int64_t, uint64_t>;
      if (to == "u64" && t == "u32") o.run = map1<low, uint64_t, uint64_t>;
      return p.places(8, 8);
    }
    o.run = conversion(p, to, t);
    return p.places(register_bytes(to), bytes);
  }
  if (op == "shl" || op == "shr") {
    o.run = op == "shl" ? shift<[](auto a, uint32_t b) { return shift_left(a, b); }>(t)
                        : shift<[](auto a, uint32_t b) { return shift_right(a, b); }>(t);
    return p.places(bytes, bytes, 4);
  }
  if (op == "bfe") {
    o.run = t == "u32" ? map3<[](auto a, auto b, auto c) { return extract(a, b, c); }, uint32_t, uint32_t, uint32_t,
                              uint32_t>
                       : map3<[](auto a, auto b, auto c) { return extract(a, b, c); }, int32_t, int32_t, uint32_t,
                              uint32_t>;
    return (t == "u32" || t == "s32") && p.places(4, 4, 4, 4);
  }
  if (op == "bfi") {
    o.run = bytes == 8 ? insert<uint64_t> : insert<uint32_t>;
    o.mask = p.at(4, 4);
    return p.places(bytes, bytes, bytes, 4);
  }
  if (op == "prmt") {
    o.run = map3<permute, uint32_t, uint32_t, uint32_t, uint32_t>;
    return p.parts.size() == 2 && p.places(4, 4, 4, 4);
  }
  if (op == "shf") {
    o.run = map3<[](uint32_t low, uint32_t high, uint32_t by) -> uint32_t {
      return ((uint64_t(high) << 32 | low) << (by & 31) >> 32);
    }, uint32_t, uint32_t, uint32_t, uint32_t>;
    return p.has("l") && p.has("wrap") && p.places(4, 4, 4, 4);
  }
  if (op == "popc") {
    o.run = map1<[](uint32_t x) -> uint32_t { return std::popcount(x); }, uint32_t, uint32_t>;
    return t == "b32" && p.places(4, 4);
  }
  if (op == "brev") {
    o.run = map1<[](uint32_t x) {
      uint32_t r = 0;
      for (int k = 0; k < 32; ++k) r |= (x >> k & 1) << (31 - k);
      return r;
    }, uint32_t, uint32_t>;
    return t == "b32" && p.places(4, 4);
  }
  if (op == "bfind") {
    o.run = map1<[](uint32_t x) -> uint32_t { return x ? std::countl_zero(x) : ~0u; }, uint32_t, uint32_t>;
    return p.has("shiftamt") && t == "u32" && p.places(4, 4);
  }
  if (op == "createpolicy") o.run = nothing;
  if (op == "setmaxnreg") {
    o.run = set_registers;
    o.kind = Kind::kAligned;
    o.offset2 = immediate(p.operands[0], 4);
  }
  return o.run != nullptr;
}

}  // namespace ptx
