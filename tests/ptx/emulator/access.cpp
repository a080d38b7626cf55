// Checks of every access: bounds, alignment, races, unwritten bytes, and bytes that a copy or product in flight uses.
#include <algorithm>

#include "machine.h"

namespace ptx {

std::pair<uintptr_t, uintptr_t> bounds(uintptr_t address, const Modes& modes) {
  const auto found = allocation(address);
  if (found.first <= address && address < found.second) return found;
  const uintptr_t line = address / 64 * 64;
  return modes.mapped ? std::pair{line, line + 64} : found;
}

void check_races(Cta& cta, Warp& w, const Instruction& i, int lane, uint32_t address, uint32_t bytes, bool writes,
                 const uint8_t* value) {
  const auto self = static_cast<uint32_t>(w.clock);
  const uint32_t granule = cta.launch->kernel->granule, begin = address - kSharedBegin;
  const Shared& s = cta.shared;
  for (uint32_t at = begin / granule * granule; at < begin + bytes; at += granule) {
    Word& word = cta.shared.words[at / granule];
    const bool races = word.writer != self && word.written > w.seen[word.writer];
    if (!writes) {
      if (races && !(word.agreeing >> self & 1)) report(w, i, lane, "a race with a write");
      if (self < word.read.size()) word.read[self] = w.seen[self];
      continue;
    }
    if (races && value && !std::memcmp(s.bytes.data() + at, value + (at - begin), granule)) {
      word.agreeing |= 1u << self;
      continue;
    }
    if (races) report(w, i, lane, "a race with a write");
    for (uint32_t r = 0; r < word.read.size(); ++r)
      if (r != self && word.read[r] > w.seen[r]) report(w, i, lane, "a race with a read");
    word.writer = self;
    word.written = w.seen[self];
    word.agreeing = 0;
  }
}

SharedPlace in_cluster(Warp& w, const Instruction& i, int lane, uint32_t address) {
  if (!(address >> kRankShift)) return {*w.cta, address};
  const uint32_t rank = (address >> kRankShift) - 1;
  Cta& cta = *w.cta->cluster->ctas.at(rank);
  if (cta.has_ended()) report(w, i, lane, "shared memory of a CTA that has ended");
  return {cta, address & ((1u << kRankShift) - 1)};
}

uint8_t* shared_at(Cta& cta, Warp& w, const Instruction& i, int lane, uint32_t address, uint32_t bytes, bool writes,
                   uint32_t alignment, const uint8_t* value) {
  Shared& s = cta.shared;
  const uint32_t at = address - kSharedBegin;
  if (address < kSharedBegin || at + static_cast<uint64_t>(bytes) > s.bytes.size())
    fail(w, i, lane, "outside of shared memory: " + std::to_string(address));
  if (address % (alignment ? alignment : bytes)) fail(w, i, lane, "misaligned in shared memory");
  check_races(cta, w, i, lane, address, bytes, writes, value);
  if (!writes && !s.read.empty()) {
    w.fenced_shared &= ~(1u << lane);
    for (uint32_t k = at / 16; k <= (at + bytes - 1) / 16; ++k) s.read[k][w.clock] = w.seen[w.clock];
  }
  uint8_t any = 0, all = 255;
  for (uint32_t k = at; k < at + bytes; ++k) {
    any |= s.state[k];
    all &= s.state[k];
  }
  if (any & kInFlight) report(w, i, lane, "shared memory that a copy in flight writes");
  if (any & kMbarrier) report(w, i, lane, "an mbarrier accessed as memory");
  if (writes) {
    for (uint32_t k = at / 16; k <= (at + bytes - 1) / 16; ++k)
      if (s.readers[k]) report(w, i, lane, "overwrites what a wgmma in flight reads");
  } else if (!(all & kWritten)) {
    report(w, i, lane, "shared memory that nobody has written");
  }
  return s.bytes.data() + at;
}

// Reports a load of what another CTA of the launch has stored, if no device-scope release and acquire order the two.
void check_order(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes, bool writes) {
  Cta& cta = *w.cta;
  for (uint64_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
    if (writes) {
      cta.launch->writes[word] = {cta.number, cta.known[cta.number]};
      continue;
    }
    const auto found = cta.launch->writes.find(word);
    if (found == cta.launch->writes.end() || found->second.cta == cta.number) continue;
    if (cta.known[found->second.cta] < found->second.clock)
      report(w, i, lane, "global memory that another CTA has written, with nothing between that orders the two");
  }
}

uint8_t* global_at(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes, bool writes) {
  if (address % std::min(bytes, 16u)) fail(w, i, lane, "misaligned in global memory");
  if (address < w.known_begin || address + bytes > w.known_end) {
    std::tie(w.known_begin, w.known_end) = bounds(address, w.cta->launch->modes);
    if (address < w.known_begin || address + bytes > w.known_end)
      fail(w, i, lane, std::string(writes ? "writes" : "reads") + " outside of every allocation");
  }
  const Launch& launch = *w.cta->launch;
  if (launch.pdl && !(w.waited_pdl >> lane & 1)) {
    const bool allowed = !writes && std::any_of(launch.before_wait.begin(), launch.before_wait.end(), [&](auto range) {
      return range.first <= address && address + bytes <= range.second;
    });
    if (!allowed) report(w, i, lane, "global memory ahead of griddepcontrol.wait");
  }
  if (launch.kernel->has_atomics) check_order(w, i, lane, address, bytes, writes);
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* param_at(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes) {
  const auto& params = w.cta->launch->params;
  const uint64_t begin = reinterpret_cast<uintptr_t>(params.data());
  if (address < begin || address + bytes > begin + w.cta->launch->kernel->param_bytes)
    fail(w, i, lane, "outside of the parameters");
  return reinterpret_cast<uint8_t*>(address);
}

void mark_written(Warp& w, int lane, uint32_t address, uint32_t bytes) {
  const bool tracks = w.cta->launch->kernel->has_wgmma;
  std::fill_n(w.cta->shared.state.data() + (address - kSharedBegin), bytes, kWritten | (tracks ? kUnfenced : 0));
  if (tracks) w.unfenced[lane].push_back({address, bytes});
}

}  // namespace ptx
