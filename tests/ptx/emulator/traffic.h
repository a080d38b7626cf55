// What kernels ask of memory and of the issue slots, counted if asked for: sectors, wavefronts, instructions.
#pragma once
#include <array>
#include <string>
#include <unordered_set>

#include "machine.h"

namespace ptx {

// Of global memory: one of a warp's instruction, or of a bulk copy. `least` sectors would hold the distinct bytes.
struct Requests {
  uint64_t requests = 0, bytes = 0, sectors = 0, least = 0, lines = 0;
};
// Of shared memory: cycles in which each bank gives one word; `least` if no bank were asked for two.
struct Wavefronts {
  uint64_t requests = 0, wavefronts = 0, least = 0;
};

struct Traffic {
  uint64_t launches = 0, ctas = 0, threads = 0;
  std::array<uint64_t, kNumUnits> issued = {};           // by warps, also where no lane's predicate is true
  Requests loads, stores, copies, bulk, prefetches;      // stores: atomics too
  Wavefronts shared_loads, shared_stores, matrices, shared_copies;
  uint64_t distinct_read = 0, distinct_written = 0;      // sectors, each once a launch; prefetches left out
  std::unordered_set<uint64_t> read, written;            // in the launch that runs

  void count(Warp& w, const Instruction& i, Mask m);     // before the instruction runs
  void end_launch(const Launch& launch);

 private:
  void request(Requests& of, std::vector<std::pair<uint64_t, uint64_t>>& ranges, std::unordered_set<uint64_t>& touched);
};

// One JSON object of all kernels.
std::string as_json(const std::map<std::string, Traffic>& kernels);

}  // namespace ptx
