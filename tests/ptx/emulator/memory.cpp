// Loads, stores and atomics.
#include "lanes.h"
#include "parsed.h"

namespace ptx {
namespace {

enum class Space { kGlobal, kShared, kParam };

template <Space kSpace>
uint64_t address_of(Warp& w, const Instruction& i, int lane) {
  if constexpr (kSpace == Space::kShared) return static_cast<uint32_t>(w.reg<uint32_t>(i.a)[lane] + i.offset);
  else return w.reg<uint64_t>(i.a)[lane] + i.offset;
}

template <Space kSpace>
uint8_t* at(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes, bool writes,
            const uint8_t* value = nullptr) {
  if constexpr (kSpace == Space::kShared)
    return shared_at(w, i, lane, static_cast<uint32_t>(address), bytes, writes, 0, value);
  if constexpr (kSpace == Space::kGlobal) return global_at(w, i, lane, address, bytes, writes);
  return param_at(w, i, lane, address, bytes);
}

// list: registers; list2: whether each takes 8 bytes. T: type of an element.
template <Space kSpace, class T>
void load(Warp& w, const Instruction& i, Mask m) {
  const auto count = static_cast<uint32_t>(i.list.size());
  for_lanes(m, [&](int l) {
    const uint8_t* from = at<kSpace>(w, i, l, address_of<kSpace>(w, i, l), count * sizeof(T), false);
    for (uint32_t k = 0; k < count; ++k) {
      T value;
      std::memcpy(&value, from + k * sizeof(T), sizeof(T));
      if (i.list2[k]) w.reg<uint64_t>(i.list[k])[l] = static_cast<uint64_t>(static_cast<int64_t>(value));
      else w.reg<uint32_t>(i.list[k])[l] = static_cast<uint32_t>(value);
    }
  });
}
template <Space kSpace, class T>
void store(Warp& w, const Instruction& i, Mask m) {
  const auto count = static_cast<uint32_t>(i.list.size());
  for_lanes(m, [&](int l) {
    const uint64_t address = address_of<kSpace>(w, i, l);
    uint8_t value[8 * sizeof(T)];
    for (uint32_t k = 0; k < count; ++k) {
      const T element = i.list2[k] ? static_cast<T>(w.reg<uint64_t>(i.list[k])[l])
                                   : static_cast<T>(w.reg<uint32_t>(i.list[k])[l]);
      std::memcpy(value + k * sizeof(T), &element, sizeof(T));
    }
    std::memcpy(at<kSpace>(w, i, l, address, count * sizeof(T), true, value), value, count * sizeof(T));
    if (kSpace == Space::kShared) mark_written(w, l, static_cast<uint32_t>(address), count * sizeof(T));
  });
}
template <Space kSpace>
Handler access(bool loads, const std::string& t) {
  const bool is_signed = t[0] == 's';
  switch (type_bytes(t)) {
    case 1: return loads ? (is_signed ? load<kSpace, int8_t> : load<kSpace, uint8_t>) : store<kSpace, uint8_t>;
    case 2: return loads ? (is_signed ? load<kSpace, int16_t> : load<kSpace, uint16_t>) : store<kSpace, uint16_t>;
    case 4: return loads ? (is_signed ? load<kSpace, int32_t> : load<kSpace, uint32_t>) : store<kSpace, uint32_t>;
    case 8: return loads ? load<kSpace, uint64_t> : store<kSpace, uint64_t>;
  }
  return nullptr;
}

void atomic_add(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) {
    uint8_t* to = at<Space::kGlobal>(w, i, l, address_of<Space::kGlobal>(w, i, l), 4, true);
    uint32_t before;
    std::memcpy(&before, to, 4);
    const uint32_t after = before + w.reg<uint32_t>(i.b)[l];
    std::memcpy(to, &after, 4);
    if (i.d) w.reg<uint32_t>(i.d)[l] = before;
    if (!i.offset2) return;  // it orders nothing among CTAs
    Cta& cta = *w.cta;
    CtaClocks& released = cta.launch->released[reinterpret_cast<uintptr_t>(to)];
    join(released, cta.known);
    join(cta.known, released);
    ++cta.known[cta.number];
  });
}

}  // namespace

bool decode_memory(Parsed& p) {
  const std::string &op = p.parts[0], &t = p.type();
  Instruction& o = p.out;
  if (op == "ld" || op == "st") {
    const bool loads = op == "ld", shared = p.has("shared") || p.has("shared::cta"), param = p.has("param");
    if (!shared && !param && !p.has("global")) return false;
    if (shared) p.kernel.granule = std::min(p.kernel.granule, static_cast<uint32_t>(type_bytes(t)));
    o.run = shared  ? access<Space::kShared>(loads, t)
            : param ? access<Space::kParam>(loads, t)
                    : access<Space::kGlobal>(loads, t);
    o.a = p.address(loads ? 1 : 0, shared ? 4 : 8);
    for (const auto& name : p.elements(loads ? 0 : 1)) {
      const int width = p.width(name) ? p.width(name) : register_bytes(t);
      o.list.push_back(p.place(name, width));
      o.list2.push_back(width == 8);
    }
    return true;
  }
  if (op == "atom" || op == "red") {
    if (!p.has("global") || !p.has("add") || type_bytes(t) != 4 || t[0] == 'f') return false;
    o.run = atomic_add;
    p.kernel.has_atomics = true;
    o.offset2 = p.has("acq_rel") && (p.has("gpu") || p.has("sys"));
    const bool returns = op == "atom";
    if (returns && p.operands[0] != "_") o.d = p.at(0, 4);
    o.a = p.address(returns ? 1 : 0, 8);
    o.b = p.at(returns ? 2 : 1, 4);
    return true;
  }
  return o.run != nullptr;
}

}  // namespace ptx
