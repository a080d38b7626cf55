// Barriers and collective operations of a warp's lanes: shuffles, votes, reductions.
#include <algorithm>

#include "lanes.h"
#include "parsed.h"

namespace ptx {
namespace {

enum class Shuffle { kUp, kDown, kBfly, kIdx };

// Relaxed: it orders only mbarriers that have been fenced before it.
void arrive_at_cluster(Warp& w, const Instruction&, Mask) {
  ++w.cluster_arrivals;
  w.cta->cluster->settle();
}

// list[0]: the predicate, if any. b: lane or delta, c: clamp and segment.
template <Shuffle kKind>
void shuffle(Warp& w, const Instruction& i, Mask m) {
  uint32_t before[32];
  std::copy_n(w.reg<uint32_t>(i.a), 32, before);
  for_lanes(m, [&](int l) {
    const int b = w.reg<uint32_t>(i.b)[l] & 31, c = w.reg<uint32_t>(i.c)[l];
    const int segment = c >> 8 & 31, most = (l & segment) | (c & 31 & ~segment);
    int from = 0;
    bool in_range = false;
    if (kKind == Shuffle::kUp) from = l - b, in_range = from >= most;
    if (kKind == Shuffle::kDown) from = l + b, in_range = from <= most;
    if (kKind == Shuffle::kBfly) from = l ^ b, in_range = from <= most;
    if (kKind == Shuffle::kIdx) from = (l & segment) | (b & ~segment), in_range = from <= most;
    if (!in_range) from = l;
    if (!(m >> from & 1)) report(w, i, l, "a shuffle from a lane that takes no part");
    w.reg<uint32_t>(i.d)[l] = before[from];
    if (!i.list.empty()) w.reg<uint32_t>(i.list[0])[l] = in_range;
  });
}

void elect(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) { w.reg<uint32_t>(i.d)[l] = l == std::countr_zero(m); });
}

enum class Vote { kBallot, kAny, kAll };
// offset: whether the predicate is negated.
template <Vote kKind>
void vote(Warp& w, const Instruction& i, Mask m) {
  Mask votes = 0;
  for_lanes(m, [&](int l) { votes |= Mask((w.reg<uint32_t>(i.a)[l] != 0) != (i.offset != 0)) << l; });
  const uint32_t result = kKind == Vote::kBallot ? votes : kKind == Vote::kAny ? votes != 0 : votes == m;
  for_lanes(m, [&](int l) { w.reg<uint32_t>(i.d)[l] = result; });
}

template <auto F, class T>
void reduce(Warp& w, const Instruction& i, Mask m) {
  const Lanes<T> a(w, i.a);
  T result = a[std::countr_zero(m)];
  for_lanes(m & (m - 1), [&](int l) { result = F(result, a[l]); });
  for_lanes(m, [&](int l) { w.reg<T>(i.d)[l] = result; });
}

}  // namespace

bool decode_collective(Parsed& p) {
  const std::string &op = p.parts[0], &t = p.type();
  Instruction& o = p.out;
  const size_t last = p.operands.size() - 1;
  if (op == "bar" || op == "barrier") {
    if (p.has("cluster")) {
      if (!p.has("aligned")) return false;
      o.kind = p.has("wait") ? Kind::kClusterWait : Kind::kAligned;
      o.run = p.has("wait") ? nothing : p.has("arrive") && p.has("relaxed") ? arrive_at_cluster : nullptr;
      return o.run != nullptr;
    }
    if (p.has("warp")) {
      o.kind = Kind::kMembers;
      o.mask = p.at(0, 4);
    } else {
      if (!p.has("sync")) return false;
      o.kind = Kind::kBarrier;
      o.a = p.at(0, 4);
      if (p.operands.size() > 1) o.b = p.at(1, 4);
    }
    o.run = nothing;
    return true;
  }
  if (op == "elect") {
    o.kind = Kind::kMembers;
    o.mask = p.at(last, 4);
    o.d = p.place(split(p.operands[0], '|', false)[1], 4);  // the first one, the leader's number, is not used
    o.run = elect;
    return true;
  }
  if (op == "shfl" || op == "vote" || op == "redux") {
    o.kind = Kind::kMembers;
    o.mask = p.at(last, 4);
    const auto results = split(p.operands[0], '|', false);
    o.d = p.place(results[0], 4);
    if (results.size() > 1) o.list.push_back(p.place(results[1], 4));
    std::string a = p.operands[1];
    if (a[0] == '!') {
      o.offset = 1;
      a = a.substr(1);
    }
    o.a = p.place(a, 4);
  }
  if (op == "shfl") {
    o.b = p.at(2, 4);
    o.c = p.at(3, 4);
    o.run = p.has("up")     ? shuffle<Shuffle::kUp>
            : p.has("down") ? shuffle<Shuffle::kDown>
            : p.has("bfly") ? shuffle<Shuffle::kBfly>
                            : shuffle<Shuffle::kIdx>;
  } else if (op == "vote") {
    o.run = p.has("ballot") ? vote<Vote::kBallot> : p.has("any") ? vote<Vote::kAny> : p.has("all") ? vote<Vote::kAll>
                                                                                                    : nullptr;
  } else if (op == "redux") {
    constexpr auto sum = [](auto a, auto b) { return a + b; };
    constexpr auto least = [](auto a, auto b) { return std::min(a, b); };
    constexpr auto most = [](auto a, auto b) { return std::max(a, b); };
    if (p.has("add")) o.run = reduce<sum, uint32_t>;
    if (p.has("min")) o.run = t == "s32" ? reduce<least, int32_t> : reduce<least, uint32_t>;
    if (p.has("max")) o.run = t == "s32" ? reduce<most, int32_t> : reduce<most, uint32_t>;
  }
  return o.run != nullptr;
}

}  // namespace ptx
