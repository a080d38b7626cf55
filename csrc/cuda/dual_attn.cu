// Mixed-mask attention over the paged cache and the diffusion blocks; contract in orthrus/params.h.
//
// Each unit of up to 128 (row, head) pairs reads every visible key and value once and multiplies them on the tensor
// cores (wgmma on Hopper, else mma.sync; fp32 accumulation), with online softmax inside a split. A row's splits are
// folded in ascending order. Three ways lead to the same bits:
// - a CTA folds all splits of its unit in registers (many units: prefill),
// - every split is a work item of its own, for all blocks of a sequence together, and a second kernel folds the partial
//   results (few units: decoding),
// - a row has one split and nothing is folded.
// Rounding points: probabilities to bf16 before the product with the values (their sum is over the unrounded ones), the
// output to bf16.
// Method: online softmax (Milakov, Gimelshein, arXiv 1805.02867) in tiles as in FlashAttention-2 (Dao, arXiv
// 2307.08691); splits along the keys as in Flash-Decoding (Dao, Haziza, Massa, Sizov 2023), here at fixed positions.
// Contract: q, keys, values and workspace 16-byte aligned, out 4-byte. MUTATED: out, all rows, and the workspace. No
// rows: nothing is launched. Row-invariant (but for the sign of a zero, if what a row does not see is added as 0 times
// a value), deterministic, graph-safe: the grid depends on host integers alone.
// Bytes: each unit's visible keys and values once, q and out once. FLOP: 4 * head_dim per visible (row, head, key).
#include "dual_attn_merge.cuh"
#include "isa.h"
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
  const bool is_64 = p.kv.head_dim == 64;
  if (!is_64 && p.kv.head_dim != 128) return cudaErrorInvalidValue;
  const DeviceInfo device = device_info();
  if (device.error) return device.error;

  DualAttnLaunch a{};
  a.p = p;
  a.num_splits = num_splits(p.max_seq_len);
  a.heads_q = Divisor(p.num_heads_q);
  a.heads_kv = Divisor(p.kv.num_heads_kv);
  a.heads_per_kv = Divisor(p.num_heads_q / p.kv.num_heads_kv);
  a.scale_log2 = p.softmax_scale * 1.4426950408889634f;
  const int num_rows = p.rows.num_rows;
  if (p.workspace && p.workspace_bytes >= workspace_bytes(num_rows, p.num_heads_q, p.kv.head_dim, p.max_seq_len)) {
    a.partial = static_cast<float*>(p.workspace);
    a.partial_state = reinterpret_cast<float2*>(
        a.partial + partial_heads(num_rows, p.num_heads_q, p.max_seq_len) * p.kv.head_dim);
  }
  const auto attend = runs_wgmma(device) ? launch_dual_attn_sm90 : launch_dual_attn_mma;
  bool split = false;
  const int error = attend(a, &split, stream, device);
  if (error || !split) return error;
  const auto merge = is_64 ? dual_attn_merge_kernel<64> : dual_attn_merge_kernel<128>;
  const int64_t heads = static_cast<int64_t>(num_rows) * p.num_heads_q;
  return launch(merge, a, dim3(static_cast<unsigned>(heads)), kMergeThreads, 0, stream, device);
}

}  // namespace orthrus::cuda
