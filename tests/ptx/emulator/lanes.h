// Operands as arrays over the lanes of a warp, and handlers that map a function over them.
#pragma once
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "machine.h"

namespace ptx {

struct Bf16 {
  uint16_t bits;
};

// Registers of 16 bits and predicates take 32 bits, of which the upper ones are unused.
template <class T>
struct Lanes {
  using Stored = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Stored* at;
  Lanes(Warp& w, Place place) : at(w.reg<Stored>(place)) {}
  T operator[](int lane) const {
    if constexpr (std::is_same_v<T, bool>) return at[lane] != 0;
    else if constexpr (std::is_same_v<T, Bf16>) return Bf16{static_cast<uint16_t>(at[lane])};
    else if constexpr (sizeof(T) == sizeof(Stored)) return std::bit_cast<T>(at[lane]);
    else return static_cast<T>(at[lane]);
  }
  void set(int lane, T value) {
    if constexpr (std::is_same_v<T, bool>) at[lane] = value;
    else if constexpr (std::is_same_v<T, Bf16>) at[lane] = value.bits;
    else if constexpr (sizeof(T) == sizeof(Stored)) at[lane] = std::bit_cast<Stored>(value);
    else at[lane] = static_cast<std::make_unsigned_t<T>>(value);
  }
};

template <class Body>
inline void for_lanes(Mask m, Body body) {
  if (m == ~0u) {
    for (int l = 0; l < 32; ++l) body(l);
  } else {
    for (; m; m &= m - 1) body(std::countr_zero(m));
  }
}

template <auto F, class D, class A>
void map1(Warp& w, const Instruction& i, Mask m) {
  Lanes<D> d(w, i.d);
  const Lanes<A> a(w, i.a);
  for_lanes(m, [&](int l) { d.set(l, F(a[l])); });
}
template <auto F, class D, class A, class B>
void map2(Warp& w, const Instruction& i, Mask m) {
  Lanes<D> d(w, i.d);
  const Lanes<A> a(w, i.a);
  const Lanes<B> b(w, i.b);
  for_lanes(m, [&](int l) { d.set(l, F(a[l], b[l])); });
}
template <auto F, class D, class A, class B, class C>
void map3(Warp& w, const Instruction& i, Mask m) {
  Lanes<D> d(w, i.d);
  const Lanes<A> a(w, i.a);
  const Lanes<B> b(w, i.b);
  const Lanes<C> c(w, i.c);
  for_lanes(m, [&](int l) { d.set(l, F(a[l], b[l], c[l])); });
}

inline void nothing(Warp&, const Instruction&, Mask) {}

inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }
inline float widen(uint16_t bf16) { return std::bit_cast<float>(static_cast<uint32_t>(bf16) << 16); }
inline uint16_t round_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace ptx
