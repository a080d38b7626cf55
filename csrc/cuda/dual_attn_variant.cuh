// What a launch of dual_attn is given, and the variants of its attention kernels.
#pragma once
#include "dual_attn_schedule.cuh"
#include "orthrus/divisor.h"
#include "orthrus/launch.cuh"
#include "orthrus/params.h"

namespace orthrus::cuda {

struct DualAttnLaunch {
  DualAttnParams p;
  // [num_splits + 1, num_rows, num_heads_q, head_dim] unnormalised; last: own block. Null: there is no room for them.
  float* partial;
  float2* partial_state;  // [num_splits + 1, num_rows, num_heads_q] (top, total) of RowState
  int num_splits;        // of max_seq_len
  Divisor heads_q, heads_kv, heads_per_kv;
  // Units of AR groups, then those of diffusion rows, each of blocks_together blocks of a sequence.
  int num_units_ar, num_units;
  int num_block_tiles;   // row tiles, each over its own block
  Divisor units_per_group, units_of_blocks, blocks_together;
  Divisor ctas;          // of a grid that takes work items
  float scale_log2;      // softmax_scale * log2(e)
};

// How many results (prefix splits and own block) the row's output is folded from.
struct Results {
  int splits, own;
  __device__ int count() const { return splits + own; }
};
__device__ __forceinline__ Results results_of(const Rows& rows, int row, int prefix_len, int position) {
  return {num_splits(prefix_len), row >= rows.num_rows_ar && row_is_valid(position)};
}

__device__ __forceinline__ float inverse_total(float total) { return total > 0.f ? __frcp_rn(total) : 0.f; }

template <bool kWgmma_, int kHeadDim_, int kWarps_, int kFrags_, bool kFold_, int kShare_ = 1>
struct Variant {
  // Multiplies with wgmma: fragment f of a warpgroup's four warps is the f-th 64 of its rows. Else with mma.sync: a
  // warp's fragments follow each other.
  static constexpr bool kWgmma = kWgmma_;
  static constexpr int kHeadDim = kHeadDim_, kWarps = kWarps_, kFrags = kFrags_;
  static constexpr bool kFold = kFold_;  // a CTA folds all splits of its unit; else each split is a work item
  // Warps that share their rows: each computes all scores, and its own columns of the output.
  static constexpr int kShare = kShare_, kColumns = kHeadDim / kShare;
  static_assert(!kWgmma || (kShare == 1 && kWarps % 4 == 0));
  // CTAs per SM that registers must suffice for; shared memory does for 3 or 2 with head_dim 128, for 6 or 5 with 64.
  static constexpr int kMinCtas = kFold || kFrags > 1 ? 1 : kHeadDim == 64 ? 4 : kShare > 1 ? 3 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileM = 16 * kFrags * kWarps / kShare;
  static constexpr int kRowsToNextFrag = kWgmma ? 64 : 16;
  static constexpr int kTileBytes = kTileKv * kHeadDim * 2;
  static constexpr int kQueryBytes = kTileM * kHeadDim * 2;
  // Stages of keys and values. More than two would leave no room for other CTAs, which hide latency better, unless
  // registers leave none either.
  static constexpr int kStages = kWgmma && kFold && kWarps == 8 ? 3 : 2;
  static constexpr int kSmemBytes = kQueryBytes + kStages * 2 * kTileBytes;
  static_assert(kQueryBytes % 1024 == 0 && kTileBytes % 1024 == 0);
};

// Launch the attention kernels; *split: whether there are partial results to fold.
int launch_dual_attn_mma(const DualAttnLaunch& a, bool* split, void* stream, const DeviceInfo& device);
int launch_dual_attn_sm90(const DualAttnLaunch& a, bool* split, void* stream, const DeviceInfo& device);

// Whether this compilation is for a device that runs variant V.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <typename V>
constexpr bool kRuns = !V::kWgmma;
#else
template <typename V>
constexpr bool kRuns = true;
#endif

}  // namespace orthrus::cuda
