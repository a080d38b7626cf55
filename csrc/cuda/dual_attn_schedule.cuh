// How dual_attn cuts its work: splits of the KV axis at fixed absolute positions (part of the
// numerics: a row's result is the ascending fold of its splits), and the list of work items.
#pragma once
#include "orthrus/divisor.h"
#include "orthrus/launch.cuh"
#include "orthrus/rows.h"

namespace orthrus::cuda {

constexpr int kTileKv = kPageSize;  // keys of one tile

// Tiles per split: short splits early, so that a short context still spreads over the GPU; long ones later, so that
// partial results stay small compared with the keys and values read.
struct SplitRange {
  int first_tile, log_tiles_per_split, first_split;
};
constexpr SplitRange kShort = {0, 1, 0}, kMedium = {16, 2, 8}, kLong = {64, 3, 20}, kLongest = {256, 4, 44};

constexpr int next_split(const SplitRange& range, const SplitRange& next) {
  return range.first_split + ((next.first_tile - range.first_tile) >> range.log_tiles_per_split);
}
static_assert(next_split(kShort, kMedium) == kMedium.first_split);
static_assert(next_split(kMedium, kLong) == kLong.first_split);
static_assert(next_split(kLong, kLongest) == kLongest.first_split);

// Range number 0 ... 3. Selected field by field, so that each is an immediate: among whole structs the compiler selects
// by address and then loads from global memory.
ORTHRUS_HD SplitRange split_range(int number) {
  const auto pick = [number](int a, int b, int c, int d) {
    return number == 0 ? a : number == 1 ? b : number == 2 ? c : d;
  };
  return {pick(kShort.first_tile, kMedium.first_tile, kLong.first_tile, kLongest.first_tile),
          pick(kShort.log_tiles_per_split, kMedium.log_tiles_per_split, kLong.log_tiles_per_split,
               kLongest.log_tiles_per_split),
          pick(kShort.first_split, kMedium.first_split, kLong.first_split, kLongest.first_split)};
}

ORTHRUS_HD int split_of_tile(int tile) {
  const SplitRange r =
      split_range((tile >= kMedium.first_tile) + (tile >= kLong.first_tile) + (tile >= kLongest.first_tile));
  return r.first_split + ((tile - r.first_tile) >> r.log_tiles_per_split);
}

ORTHRUS_HD int first_tile_of_split(int split) {
  const SplitRange r =
      split_range((split >= kMedium.first_split) + (split >= kLong.first_split) + (split >= kLongest.first_split));
  return r.first_tile + ((split - r.first_split) << r.log_tiles_per_split);
}

ORTHRUS_HD int num_tiles(int length) { return div_up(length, kTileKv); }

// Splits that hold the positions 0 ... length-1.
ORTHRUS_HD int num_splits(int length) { return length <= 0 ? 0 : split_of_tile(num_tiles(length) - 1) + 1; }

// A unit is one tile of query rows, from an AR group or from consecutive blocks of a sequence: rows x (q heads of a kv
// head), up to kTileM of them.
struct alignas(16) QueryUnit {
  int32_t longest;    // longest prefix_len of its rows
  int32_t first_row;  // first row of its groups
  int32_t seq;
  int32_t num_rows;   // of its groups; 0: the unit is empty
};

// One work item is one split of one unit, or a tile of a block's rows over that block (these come last).
struct Item {
  int unit;
  int layer;
};

constexpr int kMaxUnits = 128;  // of a launch with work items

// The item that a CTA of a grid of `ctas` takes after item i. Rounds of items run forth and back, so that the CTA with
// the heaviest item of one round gets the lightest of the next.
ORTHRUS_HD int next_item(int i, Divisor ctas) { return 2 * (i / ctas + 1) * ctas.d - 1 - i; }

// The number of layers, that is splits, of each unit; each lane holds those of some units. Warp-collective.
class Layers {
 public:
  __device__ Layers(const int* layers, int num_units) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int u = j * 32 + lane();
      of_[j] = u < num_units ? layers[u] : 0;
    }
  }

  __device__ int num_items() const { return from(0); }

  // Item number `rank`, below num_items, by descending layer, then by unit: long splits come first, and groups that
  // share a sequence read the same pages at about the same time.
  __device__ Item item(int rank) const {
    int most = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) most = max(most, of_[j]);
    // Layers >= lo hold more than `rank` items, layers >= hi do not but hold `above`.
    int lo = 0, hi = __reduce_max_sync(~0u, most), above = 0;
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2, items = from(mid);
      if (items > rank) {
        lo = mid;
      } else {
        hi = mid;
        above = items;
      }
    }
    int left = rank - above;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      unsigned holders = __ballot_sync(~0u, of_[j] > lo);
      if (left < __popc(holders)) {
        for (; left > 0; --left) holders &= holders - 1;
        return {j * 32 + __ffs(holders) - 1, lo};
      }
      left -= __popc(holders);
    }
    return {0, 0};  // not reached
  }

 private:
  static constexpr int kPerLane = kMaxUnits / 32;

  __device__ static int lane() { return threadIdx.x % 32; }
  // Items of `layer` and all above it.
  __device__ int from(int layer) const {
    int items = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) items += max(of_[j] - layer, 0);
    return __reduce_add_sync(~0u, items);
  }

  int of_[kPerLane];
};

}  // namespace orthrus::cuda
