// Which variant of dual_attn's attention kernels a pass runs, and on which grid.
#pragma once
#include "dual_attn_kernel.cuh"

namespace orthrus::cuda {

// The Schedule itself has room for one unit: that of a work item that is a block.
template <typename V>
int split_smem_bytes(int num_units) {
  constexpr int kUnitBytes = sizeof(QueryUnit) + sizeof(int), kFixedBytes = V::kSmemBytes + sizeof(Schedule);
  static_assert(kFixedBytes + kMaxUnits * kUnitBytes <= 99 * 1024);
  return kFixedBytes + num_units * kUnitBytes;
}

// The most work items that there can be.
inline int64_t most_items(const DualAttnLaunch& a) {
  const int64_t tiles = static_cast<int64_t>(a.num_units) * max(a.num_splits, 1) + a.num_block_tiles;
  return tiles * a.p.kv.num_heads_kv;
}

template <typename V>
int launch_split(DualAttnLaunch a, void* stream, const DeviceInfo& device) {
  const int smem = split_smem_bytes<V>(a.num_units);
  int per_sm = 0;
  const int error = occupancy(dual_attn_split_kernel<V>, V::kThreads, smem, &per_sm);
  if (error) return error;
  if (per_sm == 0) return cudaErrorInvalidValue;
  a.ctas = Divisor(static_cast<int>(min(most_items(a), static_cast<int64_t>(device.num_sms) * per_sm)));
  return launch(dual_attn_split_kernel<V>, a, dim3(a.ctas.d), V::kThreads, smem, stream, device);
}

inline void cut_into_units(DualAttnLaunch& a, int tile_m, int blocks_together) {
  const Rows& rows = a.p.rows;
  const auto units_of = [&](int groups) {
    return Divisor(div_up(rows.max_group_rows * groups * a.heads_per_kv, tile_m));
  };
  a.units_per_group = units_of(1);
  a.units_of_blocks = units_of(blocks_together);
  a.blocks_together = Divisor(blocks_together);
  const int blocks = rows.num_groups - rows.num_groups_ar;
  a.num_block_tiles = blocks * a.units_per_group;
  a.num_units_ar = rows.num_groups_ar * a.units_per_group;
  a.num_units = a.num_units_ar + blocks / blocks_together * a.units_of_blocks;
}

template <typename V>
constexpr int kFoldSmemBytes = V::kSmemBytes + sizeof(Schedule);

template <typename V>
int launch_fold(DualAttnLaunch a, void* stream, const DeviceInfo& device) {
  cut_into_units(a, V::kTileM, 1);
  return launch(dual_attn_fold_kernel<V>, a, dim3(a.num_units * a.p.kv.num_heads_kv), V::kThreads, kFoldSmemBytes<V>,
                stream, device);
}

// Whether an SM holds two CTAs of V, and there are more CTAs than SMs.
template <typename V>
int fits_twice(DualAttnLaunch a, const DeviceInfo& device, bool* two_per_sm) {
  int per_sm = 0;
  const int error = occupancy(dual_attn_fold_kernel<V>, V::kThreads, kFoldSmemBytes<V>, &per_sm);
  cut_into_units(a, V::kTileM, 1);
  *two_per_sm = per_sm > 1 && static_cast<int64_t>(a.num_units) * a.p.kv.num_heads_kv > device.num_sms;
  return error;
}

// With folding, of units with up to `tall` (row, head) pairs. The warps of a CTA all multiply, or all compute
// probabilities, at about the same time: two CTAs on an SM do both. But with wgmma, which multiplies 64 rows at least,
// more CTAs of 64 than there are groups would only read their keys and values from L2 more often, and wait for them.
// (From SASS and assumed latencies; not measured.)
template <bool kWgmma, int kHeadDim>
int launch_folding(const DualAttnLaunch& a, int tall, void* stream, const DeviceInfo& device) {
  using Whole = Variant<kWgmma, kHeadDim, 8, 1, true>;
  if constexpr (kWgmma) {
    if (tall <= 64) return launch_fold<Variant<kWgmma, kHeadDim, 4, 1, true>>(a, stream, device);
  }
  if constexpr (!kWgmma || kHeadDim == 64) {
    using Half = Variant<kWgmma, kHeadDim, 4, kHeadDim == 64 ? 2 : 1, true>;
    bool two_per_sm = false;
    if (const int error = fits_twice<Half>(a, device, &two_per_sm)) return error;
    if (two_per_sm) return launch_fold<Half>(a, stream, device);
  }
  return launch_fold<Whole>(a, stream, device);
}

template <bool kWgmma>
int tile_of(int tall) {
  return tall <= 16 && !kWgmma ? 16 : tall <= 64 ? 64 : 128;
}

// Splits only if a.partial is given. *split: whether there are partial results to fold.
template <bool kWgmma, int kHeadDim>
int launch_attention(DualAttnLaunch a, bool* split, void* stream, const DeviceInfo& device) {
  using Low = Variant<kWgmma, kHeadDim, 4, 1, false>;
  using Tall = Variant<kWgmma, kHeadDim, 4, 2, false>;
  const int tall = a.p.rows.max_group_rows * a.heads_per_kv, tile_m = tile_of<kWgmma>(tall);
  cut_into_units(a, tile_m, 1);
  // An upper bound of the units that hold rows: a padded prefill has many that hold none.
  const int busy = min(a.num_units, a.p.rows.num_rows * a.heads_per_kv / tile_m + a.p.rows.num_groups);
  const int64_t pairs = static_cast<int64_t>(busy) * a.p.kv.num_heads_kv;
  // Groups of several units are prefills, with much to fold; the last units of a shorter prompt are empty. Other groups
  // may differ in length, so only many of them balance without being split. (The thresholds are estimates.)
  const bool enough = a.units_per_group > 1 ? 4 * pairs >= 3 * device.num_sms : pairs >= 4 * device.num_sms;
  *split = !enough && a.partial;
  int split_tile = tile_m;
  if (*split) {
    // Blocks of a sequence share what they read of it. They use low tiles where an SM has room for only one tall one,
    // as an A100 with head_dim 128: nothing would be computed while that one waits.
    const int together = a.p.rows.num_groups > a.p.rows.num_groups_ar ? a.p.rows.blocks_per_seq : 1;
    split_tile = tile_of<kWgmma>(tall * together);
    if (split_tile > 64 && tile_m <= 64) {
      int per_sm = 0;
      const int smem = split_smem_bytes<Tall>(kMaxUnits);
      if (const int error = occupancy(dual_attn_split_kernel<Tall>, Tall::kThreads, smem, &per_sm)) return error;
      if (per_sm < 2) split_tile = 64;
    }
    cut_into_units(a, split_tile, together);
    // Where there is an SM for each tall tile, two low ones on it are done sooner (an estimate).
    if (split_tile > 64 && most_items(a) <= device.num_sms && 2 * a.num_units <= kMaxUnits) {
      split_tile = 64;
      cut_into_units(a, split_tile, together);
    }
    *split = a.num_units <= kMaxUnits;
  }
  if (!*split) return launch_folding<kWgmma, kHeadDim>(a, tall, stream, device);
  if constexpr (!kWgmma) {
    using Shared = Variant<kWgmma, kHeadDim, 4, 1, false, 4>;
    if (split_tile == 16) return launch_split<Shared>(a, stream, device);
  }
  return split_tile == 64 ? launch_split<Low>(a, stream, device) : launch_split<Tall>(a, stream, device);
}

}  // namespace orthrus::cuda
