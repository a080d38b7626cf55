// Memory traffic and issue slots of kernels, counted on request: sectors, wavefronts, instructions.
#pragma once
#include <array>
#include <string>
#include <unordered_set>

#include "machine.h"

namespace ptx {

// Global memory: a request is a warp's instruction or a bulk copy. `least` sectors would hold the distinct bytes.
struct Requests {
  uint64_t requests = 0, bytes = 0, sectors = 0, least = 0, lines = 0;
};
// Shared memory: a wavefront is a cycle in which each bank serves one word. `least`: without bank conflicts.
struct Wavefronts {
  uint64_t requests = 0, wavefronts = 0, least = 0;
};

struct Traffic {
  uint64_t launches = 0, ctas = 0, threads = 0;
  std::array<uint64_t, kNumUnits> issued = {};           // by warps, even if no lane's predicate is true
  Requests loads, stores, copies, bulk, prefetches;      // stores: atomics too
  Wavefronts shared_loads, shared_stores, matrices, shared_copies;
  uint64_t distinct_read = 0, distinct_written = 0;      // sectors, each once per launch; without prefetches
  std::unordered_set<uint64_t> read, written;            // in the current launch

  void count(Warp& w, const Instruction& i, Mask m);     // before the instruction runs
  void end_launch(const Launch& launch);

 private:
  void request(Requests& of, std::vector<std::pair<uint64_t, uint64_t>>& ranges, std::unordered_set<uint64_t>& touched);
};

// One JSON object for all kernels.
std::string as_json(const std::map<std::string, Traffic>& kernels);

}  // namespace ptx
