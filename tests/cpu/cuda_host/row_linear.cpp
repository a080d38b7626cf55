// C interface to row_linear, compiled for the host together with this file, on a Hopper GPU with any number of SMs.
#include "../../../csrc/cuda/row_linear_plan.h"
#include <algorithm>
#include <set>

#include "orthrus/ops.h"
#include "orthrus/sm90.cuh"

extern "C" {
// What is wrong with the plan of a weight; null if nothing is.
const char* row_linear_plan_error(int in_features, int out_features, bool whole_tiles, int num_sms) {
  const auto plan = orthrus::cuda::make_plan(in_features, out_features, whole_tiles, num_sms);
  const int k_blocks = plan.k_blocks;
  if (plan.tiles * plan.blocks_per_tile != plan.blocks) return "tiles do not cover the blocks";
  if (plan.range_begin(0) != 0 || plan.range_begin(plan.grid) != plan.tiles * k_blocks) return "ranges do not cover";
  if (plan.split && 2 * plan.blocks > orthrus::cuda::kMaxCounters) return "more sums than counters";
  for (int cta = 0; cta < plan.grid; ++cta) {
    const int end = plan.range_begin(cta + 1);
    if (plan.range_begin(cta) >= end) return "a CTA has nothing to do";
    int cuts[2] = {};
    for (int unit = plan.range_begin(cta), length; unit < end; unit += length) {
      const int tile = unit / k_blocks, kb = unit % k_blocks;
      length = min(k_blocks - kb, end - unit);
      if (plan.segment_end(tile, kb) != kb + length) return "prefill folds elsewhere than decode";
      if (length == k_blocks) continue;
      if (!plan.split) return "a whole tile is cut";
      if (plan.owner(unit) != cta || plan.owner(unit + length - 1) != cta) return "a unit has another owner";
      const bool first = cta == plan.owner(tile * k_blocks);
      if (first != (kb == 0) || cuts[kb == 0]++) return "two partial sums share their place in the workspace";
    }
  }
  return nullptr;
}
// The first number at or next to a multiple of d that the reciprocal divides wrongly, or -1.
int64_t wrongly_divided(int32_t d) {
  const orthrus::Divisor by(d);
  const int64_t multiples = (int64_t{INT32_MAX} + 1) / d, step = multiples / 1000 + 1;
  for (int64_t k = 0; k <= multiples; k += k < 1000 || k > multiples - 1000 ? 1 : step)
    for (int64_t beside = k * d - 1; beside <= k * d + 1; ++beside) {
      const auto n = static_cast<int32_t>(beside);
      if (beside == n && n >= 0 && (n / by != n / d || n % by != n % d)) return n;
    }
  return -1;
}
int row_linear(const orthrus::RowLinearParams* p, int descending, int num_sms) {
  cuda_host::descending = descending;
  cuda_host::num_sms = num_sms;
  cuda_host::prefetched.clear();
  orthrus::cuda::read_environment();
  return orthrus::cuda::row_linear(*p, cuda_host::kStream);
}
// How many blocks of [begin, end) the last launch prefetched, or -1 if it fetched one of them twice or other bytes of
// one than the call reads.
int64_t row_linear_prefetched(const uint8_t* begin, const uint8_t* end, int bits, bool leading_only) {
  const int block_bytes = bits == 16 ? 8192 : bits == 12 ? 6208 : 4160;
  const int read_bytes = bits < 16 && leading_only ? 4160 : block_bytes;
  std::set<const uint8_t*> blocks;
  for (const auto& [from, bytes, _] : cuda_host::prefetched) {
    if (from < begin || end <= from) continue;
    if (bytes != read_bytes || (from - begin) % block_bytes || !blocks.insert(from).second) return -1;
  }
  return static_cast<int64_t>(blocks.size());
}
int64_t row_linear_prefetches() { return static_cast<int64_t>(cuda_host::prefetched.size()); }
// How many of the prefetches from [begin, end) did not wait for earlier kernels.
int64_t row_linear_early(const uint8_t* begin, const uint8_t* end) {
  const auto& all = cuda_host::prefetched;
  return std::count_if(all.begin(), all.end(),
                       [&](const auto& one) { return one.early && begin <= one.source && one.source < end; });
}
// Blocks of the next weight that `ctas` CTAs bring to L2, in units that fill 96 KiB each.
int64_t row_linear_next_prefetch(int ctas, int in_features, int out_features, int num_sms, int bits,
                                 bool leading_only) {
  const auto plan = orthrus::cuda::make_plan(in_features, out_features, false, num_sms);
  const bool draft = bits == 8 || (bits == 12 && leading_only), tall = plan.blocks_per_tile == 2;
  const int blocks = draft ? 23 - tall : bits == 12 ? 15 - tall : 12;
  int64_t sum = 0;
  for (int cta = 0; cta < min(ctas, plan.grid.d); ++cta)
    sum += min(blocks, (plan.range_begin(cta + 1) - plan.range_begin(cta)) * plan.blocks_per_tile);
  return sum;
}
// The most CTAs that share a tile: 1 if no tile is cut.
int row_linear_most_sharers(int in_features, int out_features, int num_sms) {
  const auto plan = orthrus::cuda::make_plan(in_features, out_features, false, num_sms);
  int most = 1;
  for (int tile = 0; plan.split && tile < plan.tiles; ++tile) most = max(most, plan.sharers(tile).count);
  return most;
}
int row_linear_grid(int in_features, int out_features, int num_sms) {
  return orthrus::cuda::make_plan(in_features, out_features, false, num_sms).grid;
}
int64_t row_linear_workspace(int rows, int in_features, int out_features, int num_sms) {
  cuda_host::num_sms = num_sms;
  return orthrus::cuda::row_linear_workspace(rows, in_features, out_features);
}
int row_linear_num_partials(int in_features, int out_features, int num_sms) {
  cuda_host::num_sms = num_sms;
  return orthrus::cuda::row_linear_num_partials(in_features, out_features);
}
}
