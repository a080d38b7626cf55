// Folds what dual_attn's splits leave in the workspace.
#pragma once
#include "dual_attn_tile.cuh"
#include "dual_attn_variant.cuh"

namespace orthrus::cuda {

constexpr int kMergeThreads = 32;

// Folds the partial results of a (row, q head) in ascending order, the own block last; one warp each, whose lanes hold
// pairs of dims. All factors follow from running maxima, which are exact in any order: each lane computes those of one
// result, then all lanes fold one result after the other. The results pass through shared memory, so that many are in
// flight at once: a trip to L2 takes as long as all their sums.
template <int kHeadDim>
__global__ void __launch_bounds__(kMergeThreads) dual_attn_merge_kernel(const __grid_constant__ DualAttnLaunch a) {
  // 40,960 tokens have at most 69 results: three trips. With 32 rows of 32 heads an SM has 8 of these CTAs, of 14 KB
  // each, 1 KB of it the system's. With larger ones, a row_linear behind them, of 113 KB, would have to wait for some.
  constexpr int kAtOnce = 24;
  constexpr int kChunks = kHeadDim / 4;  // of 16 bytes
  constexpr int kPairs = kHeadDim / 64;  // per lane
  constexpr int kTogether = kMergeThreads / kChunks;  // results copied at a time
  struct alignas(16) Step {
    float keep, take, total;
    uint16_t replace, skip;  // leaves no padding bytes unwritten
  };
  __shared__ __align__(16) float part[kAtOnce][kHeadDim];
  __shared__ Step steps[kAtOnce];
  pdl_launch_dependents();
  pdl_wait();
  const Rows& rows = a.p.rows;
  const int head = blockIdx.x, lane = threadIdx.x, row = head / a.heads_q;
  const Results results = results_of(rows, row, rows.prefix_len[row], rows.position[row]);
  if (results.count() == 1) return;  // written by the attention kernel

  const int64_t stride = static_cast<int64_t>(rows.num_rows) * a.p.num_heads_q;  // from slot to slot
  const int64_t to_own = (a.num_splits - results.splits) * stride;
  const float2* state = a.partial_state + head + lane * stride;
  const float* copied = a.partial + (head + lane / kChunks * stride) * kHeadDim + lane % kChunks * 4;
  float top = -INFINITY, total = 0.f, folded[kPairs][2] = {};
#pragma unroll 1
  for (int first = 0; first < results.count(); first += kAtOnce, state += kAtOnce * stride) {
    const int n = min(kAtOnce, results.count() - first);
    float2 mine = {-INFINITY, 0.f};
    if (lane < n) mine = state[first + lane < results.splits ? 0 : to_own];
    SharedAddress to = shared_address(&part[lane / kChunks][lane % kChunks * 4]);
#pragma unroll 4
    for (int s = lane / kChunks; s < n; s += kTogether) {
      copy16(to, copied + (first + s < results.splits ? 0 : to_own * kHeadDim), true);
      to += kTogether * sizeof(part[0]);
      copied += kTogether * stride * kHeadDim;
    }
    copy_commit();
    float after = fmaxf(top, mine.x);
#pragma unroll
    for (int d = 1; d < kMergeThreads; d *= 2) {
      const float other = __shfl_up_sync(~0u, after, d);
      if (lane >= d) after = fmaxf(after, other);
    }
    const float previous = __shfl_up_sync(~0u, after, 1);
    const Fold of_mine = fold_between(lane == 0 ? top : previous, after, mine.x, mine.y);
    top = __shfl_sync(~0u, after, n - 1);
    if (lane < n) steps[lane] = {of_mine.keep, of_mine.take, mine.y, of_mine.replace, of_mine.skip};
    copy_wait<0>();
    __syncwarp();
#pragma unroll 4
    for (int s = 0; s < n; ++s) {
      const Step& step = steps[s];
      const Fold now = {step.keep, step.take, step.replace && total == total, step.skip != 0};
      total = fold(now, total, step.total);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const float2 split = *reinterpret_cast<const float2*>(&part[s][j * 64 + lane * 2]);
        folded[j][0] = fold(now, folded[j][0], split.x);
        folded[j][1] = fold(now, folded[j][1], split.y);
      }
    }
    __syncwarp();
  }
  const float inverse = inverse_total(total);
  uint32_t* const out = reinterpret_cast<uint32_t*>(a.p.out + static_cast<int64_t>(head) * kHeadDim) + lane;
#pragma unroll
  for (int j = 0; j < kPairs; ++j)
    out[j * 32] = pack_bf16(__fmul_rn(folded[j][0], inverse), __fmul_rn(folded[j][1], inverse));
}

}  // namespace orthrus::cuda
