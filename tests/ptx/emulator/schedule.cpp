// The order of execution: lanes of a warp, warps of a cluster's CTAs, and their waits for each other.
#include <algorithm>
#include <bit>

#include "traffic.h"

namespace ptx {

void Cta::settle(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  for (Warp& w : warps)
    for (LaneState& s : w.state)
      if (s == LaneState::kAtMbarrier) s = LaneState::kReady;
}

void Cluster::settle() {
  for (const auto& cta : ctas)
    for (const Warp& w : cta->warps)
      if (w.cluster_arrivals <= phase && (w.live & ~w.in(LaneState::kDone))) return;
  ++phase;
  for (auto& cta : ctas)
    for (Warp& w : cta->warps)
      for (LaneState& s : w.state)
        if (s == LaneState::kAtCluster) s = LaneState::kReady;
}

bool Cluster::land_one() {
  std::vector<std::pair<Cta*, size_t>> all;
  for (auto& cta : ctas)
    for (size_t k = 0; k < cta->bulk.size(); ++k) all.push_back({cta.get(), k});
  if (all.empty()) return false;
  size_t at = 0;
  if (launch->order == Order::kBackward) at = all.size() - 1;
  if (launch->order == Order::kRandom) at = launch->random() % all.size();
  const auto [cta, which] = all[at];
  const BulkCopy copy = cta->bulk[which];
  cta->bulk.erase(cta->bulk.begin() + static_cast<long>(which));
  land(*cta, copy);
  return true;
}

Cluster::Cluster(Launch& l, const std::array<uint32_t, 3>& first) : launch(&l) {
  for (uint32_t rank = 0; rank < l.cluster; ++rank)
    ctas.push_back(std::make_unique<Cta>(*this, rank, std::array{first[0] + rank, first[1], first[2]}));
}

Cta::Cta(Cluster& of, uint32_t at, const std::array<uint32_t, 3>& index)
    : launch(of.launch), cluster(&of), rank(at), id(index) {
  const Launch& l = *launch;
  const Kernel& k = *l.kernel;
  number = id[0] + l.grid[0] * (id[1] + l.grid[1] * id[2]);
  known[number] = 1;
  const uint32_t statics = (k.static_shared + k.dynamic_align - 1) / k.dynamic_align * k.dynamic_align;
  const uint32_t bytes = statics + l.dynamic_shared;
  shared.bytes.assign(bytes, 0xff);
  shared.state.assign(bytes, 0);
  shared.readers.assign(bytes / 16 + 1, 0);
  if (k.has_wgmma) shared.read.assign(bytes / 16 + 1, {});
  shared.words.assign(bytes / k.granule + 1, {});
  const uint32_t num_warps = (l.threads + 31) / 32;
  files.resize(static_cast<size_t>(num_warps) * k.file_bytes);
  std::fill_n(reinterpret_cast<uint32_t*>(files.data()), files.size() / 4, 0x7fc5a5a5u);  // NaN: not written yet
  warps.resize(num_warps);
  for (uint32_t n = 0; n < num_warps; ++n) {
    Warp& w = warps[n];
    w.cta = this;
    w.file = files.data() + static_cast<size_t>(n) * k.file_bytes;
    w.index = static_cast<int>(n);
    w.clock = rank * num_warps + n;
    w.seen.at(w.clock) = 1;
    const uint32_t lanes = std::min(32u, l.threads - 32 * n);
    w.live = lanes == 32 ? ~0u : (1u << lanes) - 1;
    for (const Constant& c : k.constants)
      for (uint32_t lane = 0; lane < 32; ++lane) {
        const int64_t x = c.value == 0;  // threads are numbered in one dimension
        int64_t value = c.value;
        if (c.kind == Preset::kParam) value += static_cast<int64_t>(reinterpret_cast<uintptr_t>(l.params.data()));
        if (c.kind == Preset::kTid) value = x ? 32 * n + lane : 0;
        if (c.kind == Preset::kNtid) value = x ? l.threads : 1;
        if (c.kind == Preset::kCtaid) value = id[c.value];
        if (c.kind == Preset::kNctaid) value = l.grid[c.value];
        if (c.kind == Preset::kLane) value = lane;
        if (c.bytes == 8) w.reg<int64_t>(c.place)[lane] = value;
        else w.reg<int32_t>(c.place)[lane] = static_cast<int32_t>(value);
      }
  }
}

namespace {

class Runner {
 public:
  Runner(Cta& cta, Warp& w)
      : cta_(cta), w_(w), launch_(*cta.launch), traffic_(launch_.traffic), code_(launch_.kernel->code) {}

  // Runs until no lane is ready or the budget is spent. Returns whether anything ran.
  bool run(int64_t budget) {
    bool ran = false;
    while (budget > 0) {
      const Mask ready = w_.in(LaneState::kReady);
      if (!ready) break;
      ran = true;
      budget -= run_group(choose(ready), budget);
    }
    return ran;
  }

 private:
  // The lanes at one program counter: the first, the last, or a random one, depending on the order.
  Mask choose(Mask ready) {
    uint32_t at = 0;
    if (launch_.order == Order::kRandom) {
      int skip = static_cast<int>(launch_.random() % std::popcount(ready));
      Mask rest = ready;
      while (skip--) rest &= rest - 1;
      at = w_.pc[std::countr_zero(rest)];
    } else {
      const bool last = launch_.order == Order::kBackward;
      at = last ? 0 : ~0u;
      for (Mask m = ready; m; m &= m - 1) {
        const uint32_t pc = w_.pc[std::countr_zero(m)];
        at = last ? std::max(at, pc) : std::min(at, pc);
      }
    }
    Mask group = 0;
    for (Mask m = ready; m; m &= m - 1) {
      const int lane = std::countr_zero(m);
      group |= static_cast<Mask>(w_.pc[lane] == at) << lane;
    }
    if (launch_.order != Order::kRandom || launch_.random() % 8) return group;
    // Only a collective keeps lanes together.
    const Mask some = group & static_cast<Mask>(launch_.random());
    return some ? some : group;
  }

  void run_one(const Instruction& i, Mask m) {
    if (traffic_ && i.memory != Memory::kNone) traffic_->count(w_, i, m);
    i.run(w_, i, m);
  }
  void move(Mask m, uint32_t pc) {
    for (; m; m &= m - 1) w_.pc[std::countr_zero(m)] = pc;
  }
  void set(Mask m, LaneState s) {
    for (; m; m &= m - 1) w_.state[std::countr_zero(m)] = s;
  }
  Mask where(Mask m, Place place) {
    const uint32_t* values = w_.reg<uint32_t>(place);
    Mask result = 0;
    for (int l = 0; l < 32; ++l) result |= static_cast<Mask>(values[l] != 0) << l;
    return result & m;
  }

  int64_t run_group(Mask m, int64_t budget) {
    uint32_t pc = w_.pc[std::countr_zero(m)];
    const Mask present = w_.live & ~w_.in(LaneState::kDone);
    const bool alone = m == present;
    int64_t done = 0;
    for (bool first = true;; first = false) {
      const Instruction& i = code_[pc];
      if (!first && ((i.is_leader && !alone) || done >= budget)) break;
      ++done;
      ++launch_.clock;
      if (traffic_) ++traffic_->issued[static_cast<size_t>(i.unit)];
      Mask runs = m;
      if (i.guard) {
        runs = where(m, i.guard);
        if (i.guard_negated) runs = m & ~runs;
      }
      if (i.kind == Kind::kLanes) {
        if (runs) run_one(i, runs);
        ++pc;
        continue;
      }
      if (i.kind == Kind::kBranch) {
        if (runs == m) {
          pc = i.target;
        } else if (!runs) {
          ++pc;
        } else {
          move(runs, i.target);
          move(m & ~runs, pc + 1);
          return done;
        }
        if (!alone) break;
        continue;
      }
      move(m, pc);
      if (runs != m) {  // lanes whose predicate is false skip it
        move(m & ~runs, pc + 1);
        if (!runs) return done;
      }
      meet(i, runs, pc);
      return done;
    }
    move(m, pc);
    return done;
  }

  void meet(const Instruction& i, Mask m, uint32_t pc) {
    if (i.kind == Kind::kExit) {
      set(m, LaneState::kDone);
      for (; m; m &= m - 1) {
        const int lane = std::countr_zero(m);
        if (!w_.copies[lane].empty()) land_copies(w_, lane, 0);
      }
      if (!(w_.live & ~w_.in(LaneState::kDone))) {
        if (!w_.products.empty()) report(w_, i, 0, "exits with a wgmma in flight");
        leave();
        if (cta_.has_ended()) cta_.check_end();
      }
      return;
    }
    if (i.kind == Kind::kTryWait) {
      for (; m; m &= m - 1) {
        const int lane = std::countr_zero(m);
        const auto found = cta_.mbarriers.find(w_.reg<uint32_t>(i.a)[lane]);
        if (found == cta_.mbarriers.end()) fail(w_, i, lane, "no mbarrier there");
        const bool completed = (found->second.phase & 1) != (w_.reg<uint32_t>(i.b)[lane] & 1);
        const bool gives_up = !completed && launch_.order == Order::kRandom && launch_.random() % 16 == 0;
        if (completed) join(w_.seen, found->second.released);
        if (completed || gives_up) {
          w_.reg<uint32_t>(i.d)[lane] = completed;
          w_.pc[lane] = pc + 1;
        } else {
          w_.state[lane] = LaneState::kAtMbarrier;
        }
      }
      return;
    }
    if (i.kind == Kind::kClusterWait) {
      const bool passes = w_.cluster_arrivals <= cta_.cluster->phase;
      if (passes) w_.cluster_waits = w_.cluster_arrivals;
      passes ? move(m, pc + 1) : set(m, LaneState::kAtCluster);
      return;
    }
    set(m, LaneState::kAtCollective);
    const Mask present = w_.live & ~w_.in(LaneState::kDone);
    Mask needed = present;
    if (i.kind == Kind::kMembers) {
      needed = w_.reg<uint32_t>(i.mask)[std::countr_zero(m)];
      if (needed & ~present) fail(w_, i, std::countr_zero(m), "waits for lanes that have exited");
    }
    Mask here = w_.in(LaneState::kAtCollective);
    for (Mask rest = here; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      if (w_.pc[lane] != pc) here &= ~(1u << lane);
    }
    if (i.kind == Kind::kMembers && (m & ~needed)) fail(w_, i, std::countr_zero(m), "a lane outside of its membermask");
    if (needed & ~here) return;  // the last lane to arrive runs it
    if (i.kind == Kind::kBarrier) {
      arrive(i, needed, pc);
      return;
    }
    run_one(i, needed);
    move(needed, pc + 1);
    set(needed, LaneState::kReady);
  }

  int expected(int of_the_instruction) const {
    if (of_the_instruction) return of_the_instruction;
    int warps = 0;
    for (const Warp& w : cta_.warps) warps += (w.live & ~w.in(LaneState::kDone)) != 0;
    return warps * 32;
  }
  void arrive(const Instruction& i, Mask m, uint32_t pc) {
    const int lane = std::countr_zero(m);
    const uint32_t id = w_.reg<uint32_t>(i.a)[lane];
    const int count = i.b ? w_.reg<int32_t>(i.b)[lane] : 0;
    if (id >= 16 || count % 32) fail(w_, i, lane, "no such barrier");
    NamedBarrier& barrier = cta_.barriers[id];
    if (barrier.arrived && barrier.expected != count) fail(w_, i, lane, "warps disagree about a barrier's threads");
    barrier.expected = count;
    barrier.arrived += 32;
    set(m, LaneState::kAtBarrier);
    move(m, pc);
    w_.at_barrier = static_cast<int>(id);
    release(id);
  }
  void release(uint32_t id) {
    NamedBarrier& barrier = cta_.barriers[id];
    if (!barrier.arrived || barrier.arrived < expected(barrier.expected)) return;
    barrier.arrived = 0;
    Clocks all = {};
    for (const Warp& w : cta_.warps)
      if (w.at_barrier == static_cast<int>(id)) join(all, w.seen);
    for (Warp& w : cta_.warps) {
      if (w.at_barrier != static_cast<int>(id)) continue;
      w.at_barrier = -1;
      join(w.seen, all);
      release_fences(w);
      ++w.seen[w.clock];
      for (auto& ranges : w.unfenced) {
        cta_.published.insert(cta_.published.end(), ranges.begin(), ranges.end());
        ranges.clear();
      }
      for (int l = 0; l < 32; ++l)
        if (w.state[l] == LaneState::kAtBarrier) {
          w.state[l] = LaneState::kReady;
          ++w.pc[l];
        }
    }
  }
  void leave() {  // barriers do not wait for warps that have exited
    for (uint32_t id = 0; id < 16; ++id)
      if (cta_.barriers[id].expected == 0) release(id);
    cta_.cluster->settle();
  }

  Cta& cta_;
  Warp& w_;
  Launch& launch_;
  Traffic* const traffic_;
  const std::vector<Instruction>& code_;
};

}  // namespace

bool Cta::has_ended() const {
  return std::all_of(warps.begin(), warps.end(), [](const Warp& w) { return !(w.live & ~w.in(LaneState::kDone)); });
}

bool Cluster::run(bool to_the_end) {
  const bool random = launch->order == Order::kRandom;
  std::vector<Warp*> warps;
  for (auto& cta : ctas)
    for (Warp& w : cta->warps) warps.push_back(&w);
  const size_t count = warps.size();
  while (true) {
    bool ran = false;
    const size_t first = random ? launch->random() % count : 0;
    for (size_t n = 0; n < count; ++n) {
      Warp& w = *warps[launch->order == Order::kBackward ? count - 1 - n : (first + n) % count];
      const int64_t budget = random ? 1 + launch->random() % 300 : 1 << 16;
      ran |= Runner(*w.cta, w).run(budget);
      if (random && launch->random() % 8 == 0) ran |= land_one();
    }
    if (std::all_of(ctas.begin(), ctas.end(), [](const auto& cta) { return cta->has_ended(); })) return true;
    if (launch->clock > launch->modes.limit) throw Failure("no end of " + launch->kernel->name);
    if (ran && !to_the_end) return false;
    if (ran || land_one()) continue;
    for (Warp* w : warps)
      for (int l = 0; l < 32; ++l)
        if ((w->live >> l & 1) && w->state[l] != LaneState::kDone)
          fail(*w, launch->kernel->code[w->pc[l]], l, "nobody can go on");
  }
}

void Cta::check_end() const {
  // Registers only move among warps: a warp that takes more than others release would wait for ever.
  const int at_first = 65536 / launch->kernel->max_threads / 8 * 8;
  int missing = 0;
  for (const Warp& w : warps) missing += w.registers ? w.registers - at_first : 0;
  if (missing > 0) throw Failure("warps take more registers than their CTA has: " + launch->kernel->name);
  if (!bulk.empty()) throw Failure("a CTA has ended with copies in flight");
  for (const auto& barrier : barriers)
    if (barrier.arrived) throw Failure("a CTA has ended with warps at a barrier");
  for (size_t n = 0; n + 1 < warps.size(); ++n)
    if (n % 4 != 3 && warps[n].num_products != warps[n + 1].num_products)
      throw Failure("warps of a warpgroup have issued different numbers of wgmma");
  if (launch->pdl)
    for (const Warp& w : warps)
      if (w.waited_pdl != w.live)
        throw Failure("a thread has exited without griddepcontrol.wait: " + launch->kernel->name);
}

}  // namespace ptx
