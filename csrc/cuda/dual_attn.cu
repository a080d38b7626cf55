// Mixed-mask attention over the paged cache and the diffusion blocks; contract in orthrus/params.h.
//
// Each unit of 16, 64 or 128 (row, head) pairs reads every visible key and value once and multiplies them on the tensor
// cores (mma.sync, fp32 accumulation), with online softmax inside a split. A row's splits are folded in ascending
// order. Three ways lead to the same bits:
// - a CTA folds all splits of its unit in registers (many units: prefill),
// - every split is a work item of its own, for all blocks of a sequence together, and a second kernel folds the partial
//   results (few units: decoding),
// - a row has one split and nothing is folded.
// Rounding points: probabilities to bf16 before the product with the values (their sum is over the unrounded ones), the
// output to bf16.
// Method: online softmax (Milakov, Gimelshein, arXiv 1805.02867) in tiles as in FlashAttention-2 (Dao, arXiv
// 2307.08691); splits along the keys as in Flash-Decoding (Dao, Haziza, Massa, Sizov 2023), here at fixed positions.
// Contract: q, keys, values and workspace 16-byte aligned, out 4-byte. MUTATED: out, all rows, and the workspace. No
// rows: nothing is launched. Row-invariant, deterministic, graph-safe: the grid depends on host integers alone.
// Bytes: each unit's visible keys and values once, q and out once. FLOP: 4 * head_dim per visible (row, head, key).
#include "dual_attn_kernel.cuh"
#include "orthrus/aligned.h"
#include "orthrus/ops.h"

namespace orthrus::cuda {
namespace {

// Enough for 467 rows of 32 heads at 40,960 tokens. Passes that need more fold in registers, whatever their lengths.
constexpr int64_t kMaxWorkspaceBytes = 512 << 20;

int64_t partial_heads(int num_rows, int num_heads_q, int max_seq_len) {
  return static_cast<int64_t>(num_splits(max_seq_len) + 1) * num_rows * num_heads_q;
}

int64_t workspace_bytes(int num_rows, int num_heads_q, int head_dim, int max_seq_len) {
  const int64_t head_bytes = head_dim * sizeof(float) + sizeof(float2);
  return partial_heads(num_rows, num_heads_q, max_seq_len) * head_bytes;
}

// The Schedule itself has room for one unit: that of a work item that is a block.
template <typename V>
int split_smem_bytes(int num_units) {
  constexpr int kUnitBytes = sizeof(QueryUnit) + sizeof(int), kFixedBytes = V::kSmemBytes + sizeof(Schedule);
  static_assert(kFixedBytes + kMaxUnits * kUnitBytes <= 99 * 1024);
  return kFixedBytes + num_units * kUnitBytes;
}

template <typename V>
int launch_split(const DualAttnLaunch& a, void* stream, const DeviceInfo& device) {
  const int smem = split_smem_bytes<V>(a.num_units);
  const int64_t tiles = static_cast<int64_t>(a.num_units) * max(a.num_splits, 1) + a.num_block_tiles;
  const int64_t items = tiles * a.p.kv.num_heads_kv;
  int per_sm = 0;
  int error = occupancy(dual_attn_split_kernel<V>, V::kThreads, smem, &per_sm);
  if (error) return error;
  const int64_t grid = min(items, static_cast<int64_t>(device.num_sms) * per_sm);
  error = launch(dual_attn_split_kernel<V>, a, dim3(static_cast<unsigned>(grid)), V::kThreads, smem, stream, device);
  if (error) return error;
  const int64_t heads = static_cast<int64_t>(a.p.rows.num_rows) * a.p.num_heads_q;
  return launch(dual_attn_merge_kernel<V::kHeadDim>, a, dim3(static_cast<unsigned>(heads)), kMergeThreads, 0, stream,
                device);
}

void cut_into_units(DualAttnLaunch& a, int tile_m, int blocks_together) {
  const Rows& rows = a.p.rows;
  const auto units_of = [&](int groups) {
    return Divisor((rows.max_group_rows * groups * a.heads_per_kv + tile_m - 1) / tile_m);
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

int tile_of(int tall) { return tall <= 16 ? 16 : tall <= 64 ? 64 : 128; }

template <int kHeadDim>
int run(DualAttnLaunch a, void* stream) {
  using Shared = Variant<kHeadDim, 4, 1, false, 4>;
  using Low = Variant<kHeadDim, 4, 1, false>;
  using Tall = Variant<kHeadDim, 4, 2, false>;
  const DeviceInfo device = device_info();
  const int tall = a.p.rows.max_group_rows * a.heads_per_kv, tile_m = tile_of(tall);
  cut_into_units(a, tile_m, 1);
  // An upper bound of the units that hold rows: a padded prefill has many that hold none.
  const int busy = min(a.num_units, a.p.rows.num_rows * a.heads_per_kv / tile_m + a.p.rows.num_groups);
  const int64_t pairs = static_cast<int64_t>(busy) * a.p.kv.num_heads_kv;
  // Groups of several units are prefills, with much to fold; the last units of a shorter prompt are empty. Other groups
  // may differ in length, so only many of them balance without being split. (The thresholds are estimates.)
  const bool enough = a.units_per_group > 1 ? 4 * pairs >= 3 * device.num_sms : pairs >= 4 * device.num_sms;
  const int64_t needed = workspace_bytes(a.p.rows.num_rows, a.p.num_heads_q, kHeadDim, a.p.max_seq_len);
  bool split = !enough && a.p.workspace && a.p.workspace_bytes >= needed;
  int split_tile = tile_m;
  if (split) {
    // Blocks of a sequence share what they read of it. They use low tiles where an SM has room for only one tall one,
    // as an A100 with head_dim 128: nothing would be computed while that one waits.
    const int together = a.p.rows.num_groups > a.p.rows.num_groups_ar ? a.p.rows.blocks_per_seq : 1;
    split_tile = tile_of(tall * together);
    if (split_tile > 64 && tile_m <= 64) {
      int per_sm = 0;
      const int smem = split_smem_bytes<Tall>(kMaxUnits);
      if (const int error = occupancy(dual_attn_split_kernel<Tall>, Tall::kThreads, smem, &per_sm)) return error;
      if (per_sm < 2) split_tile = 64;
    }
    cut_into_units(a, split_tile, together);
    split = a.num_units <= kMaxUnits;
  }
  if (!split) {
    // The warps of a CTA all multiply, or all compute probabilities, at the same time: two CTAs on an SM do both. (From
    // SASS and assumed latencies; not measured.)
    using Half = Variant<kHeadDim, 4, kHeadDim == 64 ? 2 : 1, true>;
    using Whole = Variant<kHeadDim, 8, 1, true>;
    bool two_per_sm = false;
    if (const int error = fits_twice<Half>(a, device, &two_per_sm)) return error;
    return two_per_sm ? launch_fold<Half>(a, stream, device) : launch_fold<Whole>(a, stream, device);
  }
  a.partial = static_cast<float*>(a.p.workspace);
  a.partial_state = reinterpret_cast<float2*>(
      a.partial + partial_heads(a.p.rows.num_rows, a.p.num_heads_q, a.p.max_seq_len) * kHeadDim);
  if (split_tile == 16) return launch_split<Shared>(a, stream, device);
  if (split_tile == 64) return launch_split<Low>(a, stream, device);
  return launch_split<Tall>(a, stream, device);
}

}  // namespace

// Enough for every pass of up to max_rows rows that gains by splitting, up to a limit; a pass that would
// need more folds in registers instead, with the same bits.
int64_t dual_attn_workspace(int32_t max_rows, int32_t num_heads_q, int32_t head_dim, int32_t max_seq_len) {
  return min(kMaxWorkspaceBytes, workspace_bytes(max_rows, num_heads_q, head_dim, max_seq_len));
}

int dual_attn(const DualAttnParams& p, void* stream) {
  if (p.rows.num_rows == 0 || p.rows.num_groups == 0) return cudaSuccess;
  if (!aligned(16, p.q, p.kv.k_pages, p.kv.v_pages, p.scratch_k, p.scratch_v, p.workspace) || !aligned(4, p.out))
    return cudaErrorMisalignedAddress;
  if (p.kv.num_heads_kv <= 0 || p.num_heads_q < p.kv.num_heads_kv || p.rows.max_group_rows <= 0 ||
      p.rows.blocks_per_seq <= 0 || (p.rows.num_groups - p.rows.num_groups_ar) % p.rows.blocks_per_seq)
    return cudaErrorInvalidValue;
  DualAttnLaunch a{};
  a.p = p;
  a.num_splits = num_splits(p.max_seq_len);
  a.heads_q = Divisor(p.num_heads_q);
  a.heads_kv = Divisor(p.kv.num_heads_kv);
  a.heads_per_kv = Divisor(p.num_heads_q / p.kv.num_heads_kv);
  a.scale_log2 = p.softmax_scale * 1.4426950408889634f;
  if (p.kv.head_dim == 64) return run<64>(a, stream);
  if (p.kv.head_dim == 128) return run<128>(a, stream);
  return cudaErrorInvalidValue;
}

}  // namespace orthrus::cuda
