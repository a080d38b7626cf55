// What orders memory: mbarriers, fences between proxies, griddepcontrol.
#include <algorithm>

#include "lanes.h"
#include "parsed.h"

namespace ptx {

Mbarrier& mbarrier_at(Cta& cta, Warp& w, const Instruction& i, int lane, uint32_t address, bool of_a_copy) {
  const auto found = cta.mbarriers.find(address);
  if (found == cta.mbarriers.end()) fail(w, i, lane, "no mbarrier there");
  if (&cta != w.cta && found->second.fenced_in >= w.cluster_waits)
    report(w, i, lane, "another CTA's mbarrier may not be initialised yet");
  if (of_a_copy && !found->second.fenced) report(w, i, lane, "a copy may not see the mbarrier yet: no fence");
  return found->second;
}

namespace {

void mbarrier_init(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) {
    const uint32_t address = w.reg<uint32_t>(i.a)[l];
    const int count = w.reg<int32_t>(i.b)[l];
    shared_at(w, i, l, address, 8, true);
    if (count < 1 || count >= 1 << 20) fail(w, i, l, "an mbarrier of so many arrivals");
    std::fill_n(w.cta->shared.state.data() + (address - kSharedBegin), 8, kMbarrier);
    w.cta->mbarriers[address] = {count, count};
  });
}
template <bool kExpects>
void mbarrier_arrive(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) {
    const uint32_t given = w.reg<uint32_t>(i.a)[l];
    const auto [cta, address] = i.offset2 ? in_cluster(w, i, l, given) : SharedPlace{*w.cta, given};
    Mbarrier& barrier = mbarrier_at(cta, w, i, l, address, false);
    if (kExpects) barrier.bytes += w.reg<int32_t>(i.b)[l];
    if (barrier.bytes >= 1 << 20) fail(w, i, l, "an mbarrier expects more than it can count");
    join(barrier.released, w.seen);
    release_fences(w);
    ++w.seen[w.clock];
    if (--barrier.pending < 0) fail(w, i, l, "more arrivals than the mbarrier is for");
    cta.settle(barrier);
  });
}

// d: the address for the whole cluster, a: the address in CTA b.
void map_to_cta(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) {
    const uint32_t address = w.reg<uint32_t>(i.a)[l], rank = w.reg<uint32_t>(i.b)[l];
    if (rank >= w.cta->launch->cluster || address >> kRankShift) fail(w, i, l, "no such place in the cluster");
    w.reg<uint32_t>(i.d)[l] = (rank + 1) << kRankShift | address;
  });
}

constexpr int64_t kGlobal = 1, kShared = 2;  // the memory that a fence between proxies covers: its offset

// Covers the thread's own accesses, and writes of others that a barrier has made visible to it.
void fence(Warp& w, const Instruction& i, Mask m) {
  if (i.offset & kGlobal) w.fenced_global |= m;
  for (auto& [address, barrier] : w.cta->mbarriers) {
    if (i.offset2) barrier.fenced_in = std::min(barrier.fenced_in, w.cluster_arrivals);
    barrier.fenced = true;
  }
  if (!(i.offset & kShared)) return;
  w.fenced_shared |= m;
  if (!(w.live & ~w.in(LaneState::kDone) & ~w.fenced_shared)) w.fenced = w.seen[w.clock]++;
  auto clear = [&](std::vector<std::pair<uint32_t, uint32_t>>& ranges) {
    for (auto [address, bytes] : ranges)
      for (uint32_t k = 0; k < bytes; ++k) w.cta->shared.state[address - kSharedBegin + k] &= ~kUnfenced;
    ranges.clear();
  };
  clear(w.cta->published);
  for_lanes(m, [&](int l) { clear(w.unfenced[l]); });
}
void wait_for_grid(Warp& w, const Instruction&, Mask m) {
  w.waited_pdl |= m;
  w.fenced_global &= ~m;
}

bool decode_mbarrier(Parsed& p) {
  Instruction& o = p.out;
  const std::string& what = p.parts[1];
  const bool has_state = what != "init";
  o.a = p.address(has_state ? 1 : 0, 4);
  if (o.offset) return false;
  if (what == "init") {
    o.run = mbarrier_init;
    o.b = p.at(1, 4);
  } else if (what == "arrive") {
    if (p.operands[0] != "_") return false;
    o.run = p.has("expect_tx") ? mbarrier_arrive<true> : mbarrier_arrive<false>;
    if (p.has("expect_tx")) o.b = p.at(2, 4);
    o.offset2 = p.has("shared::cluster");
  } else if (what == "try_wait" && p.has("parity")) {
    o.kind = Kind::kTryWait;
    o.run = nothing;
    o.d = p.at(0, 4);
    o.b = p.at(2, 4);
  }
  return o.run != nullptr;
}

}  // namespace

bool decode_ordering(Parsed& p) {
  const std::string& op = p.parts[0];
  Instruction& o = p.out;
  if (op == "mbarrier") return decode_mbarrier(p);
  if (op == "mapa" && p.has("shared::cluster")) {
    o.run = map_to_cta;
    return p.places(4, 4, 4);
  }
  const bool of_shared = p.has("shared::cta") || p.has("shared::cluster");
  if (op == "fence" && p.has("async")) o.offset = (p.has("global") ? 0 : kShared) | (of_shared ? 0 : kGlobal);
  if (op == "fence") o.offset2 = p.has("mbarrier_init");
  if (op == "fence") o.run = p.has("proxy") || p.has("mbarrier_init") ? fence : nothing;
  if (op == "membar") o.run = nothing;
  if (op == "griddepcontrol") o.run = p.has("wait") ? wait_for_grid : nothing;
  return o.run != nullptr;
}

}  // namespace ptx
