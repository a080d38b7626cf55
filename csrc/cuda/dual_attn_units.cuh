// Which rows the units of a launch of dual_attn have (see dual_attn_schedule.cuh).
#pragma once
#include "dual_attn_variant.cuh"

namespace orthrus::cuda {

template <typename V>
class Units {
 public:
  __device__ explicit Units(const DualAttnLaunch& a) : a_(a) {}

  // The unit's rows are the rows of its groups x q heads of a kv head, flattened. Read by kLanes threads together, a
  // whole warp or one thread; each gets the longest prefix of its share.
  template <int kLanes>
  __device__ QueryUnit read(int u, int lane) const {
    const Rows& rows = a_.p.rows;
    const int of_blocks = u - a_.num_units_ar, offset = offset_of(u);
    const int group = of_blocks < 0 ? u / a_.units_per_group
                                    : rows.num_groups_ar + of_blocks / a_.units_of_blocks * a_.blocks_together;
    const int first = rows.group_start[group];
    const int num_rows = rows.group_start[group + (of_blocks < 0 ? 1 : a_.blocks_together.d)] - first;
    if (offset >= num_rows * a_.heads_per_kv) return {0, 0, 0, 0};
    const int last = min(num_rows, (offset + V::kTileM - 1) / a_.heads_per_kv + 1);
    const int seq = rows.seq[first];  // in flight during what follows
    int longest = 0;
    constexpr int kAtOnce = kLanes == 1 ? 16 : 1;
#pragma unroll 1
    for (int r = offset / a_.heads_per_kv + lane; r < last; r += kLanes * kAtOnce) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) longest = max(longest, rows.prefix_len[first + min(r + i, last - 1)]);
    }
    return {longest, first, seq, num_rows};
  }

  __device__ int offset_of(int u) const {
    const int of_blocks = u - a_.num_units_ar;
    return (of_blocks < 0 ? u % a_.units_per_group : of_blocks % a_.units_of_blocks) * V::kTileM;
  }

  // Block number `block` as a unit, which sees no prefix.
  __device__ QueryUnit of_block(int block, const QueryUnit* units) const {
    const QueryUnit& first = units[a_.num_units_ar + block / a_.blocks_together * a_.units_of_blocks];
    const int most = a_.p.rows.max_group_rows, before = block % a_.blocks_together * most;
    return {0, first.first_row + before, first.seq, min(first.num_rows - before, most)};
  }

 private:
  const DualAttnLaunch& a_;
};

}  // namespace orthrus::cuda
