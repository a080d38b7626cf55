// Mixed-mask attention in float32: a warp per (row, head). Models run in it to compare results, not for speed.
//
// Contract (shapes in params.h). head_dim 64 or 128; keys 16-byte aligned; no workspace. MUTATED: out, all rows. Keys
// are taken 32 at a time, one per lane, at absolute positions, the row's own block last. Scores are chains of fused
// multiply-adds over ascending dims, and the values are added in the order of the keys. A key that the row does not see
// is never read. No row depends on another: row-invariant, deterministic, graph-safe. Bytes: the visible keys and
// values once per (row, head), mostly from L2. FLOP: 4 * head_dim per visible pair.
// Method: online softmax (Milakov & Gimelshein 2018).
#include <cmath>

#include "orthrus/aligned.h"
#include "orthrus/launch.cuh"
#include "orthrus/ops.h"
#include "orthrus/rows.h"

namespace orthrus::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

__device__ float warp_max(float x) {
  for (int mask = 16; mask; mask /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}

__device__ float warp_sum(float x) {
  for (int mask = 16; mask; mask /= 2) x = __fadd_rn(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}

// The running softmax of one (row, head): lane l holds dims l, l + 32, ...
template <int kHeadDim>
struct Softmax {
  float top = -INFINITY;
  float total = 0.f;
  float mixed[kHeadDim / 32] = {};
};

// Folds 32 keys, one per lane: `offset` of its head in `keys` and `values`, or -1 if the row does not see it.
template <int kHeadDim>
__device__ void fold(Softmax<kHeadDim>& s, const float* q, const float* keys, const float* values, int64_t offset,
                     float scale, int lane) {
  float score = -INFINITY;
  if (offset >= 0) {
    const float4* key = reinterpret_cast<const float4*>(keys + offset);
    float dot = 0.f;
#pragma unroll 8
    for (int d = 0; d < kHeadDim / 4; ++d) {
      const float4 k = key[d];
      dot = __fmaf_rn(q[4 * d], k.x, dot);
      dot = __fmaf_rn(q[4 * d + 1], k.y, dot);
      dot = __fmaf_rn(q[4 * d + 2], k.z, dot);
      dot = __fmaf_rn(q[4 * d + 3], k.w, dot);
    }
    score = __fmul_rn(dot, scale);
  }
  const unsigned seen = __ballot_sync(~0u, offset >= 0);
  if (!seen) return;
  const float top = fmaxf(s.top, warp_max(score));
  const float base = top == -INFINITY ? 0.f : top;
  const float weight = offset >= 0 ? expf(score - base) : 0.f;
  const float decay = expf(s.top - base);
  s.top = top;
  s.total = __fmaf_rn(s.total, decay, warp_sum(weight));
  for (int i = 0; i < kHeadDim / 32; ++i) s.mixed[i] = __fmul_rn(s.mixed[i], decay);
#pragma unroll 8
  for (int j = 0; j < 32; ++j) {
    const float w = __shfl_sync(~0u, weight, j);
    const int64_t at = __shfl_sync(~0u, offset, j);
    if (!(seen >> j & 1)) continue;
    for (int i = 0; i < kHeadDim / 32; ++i) s.mixed[i] = __fmaf_rn(w, values[at + lane + 32 * i], s.mixed[i]);
  }
}

// The group that holds `row`: the last one that starts at or before it, and is not empty.
__device__ int group_of(const Rows& rows, int row) {
  int low = 0, high = rows.num_groups;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (rows.group_start[middle] <= row ? low : high) = middle;
  }
  return low;
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 4) dual_attn_f32_kernel(const __grid_constant__ DualAttnParamsOf<float> p) {
  __shared__ float queries[kWarps][kHeadDim];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  pdl_wait();
  pdl_launch_dependents();
  if (index >= static_cast<int64_t>(p.rows.num_rows) * p.num_heads_q) return;
  const int row = static_cast<int>(index / p.num_heads_q), head = static_cast<int>(index % p.num_heads_q);
  const int head_kv = head / (p.num_heads_q / p.kv.num_heads_kv);
  float* q = queries[warp];
  for (int d = lane; d < kHeadDim; d += 32) q[d] = p.q[index * kHeadDim + d];
  __syncwarp();

  Softmax<kHeadDim> s;
  const int prefix_len = p.rows.prefix_len[row];
  const int32_t* pages = p.kv.page_table + static_cast<int64_t>(p.rows.seq[row]) * p.kv.max_pages;
  for (int first = 0; first < prefix_len; first += 32) {
    const int kv = first + lane;
    int64_t offset = -1;
    if (sees_cached(kv, prefix_len)) {
      const int64_t page = pages[kv / kPageSize];
      offset = ((page * p.kv.num_heads_kv + head_kv) * kPageSize + kv % kPageSize) * kHeadDim;
    }
    fold(s, q, p.kv.k_pages, p.kv.v_pages, offset, p.softmax_scale, lane);
  }
  if (row >= p.rows.num_rows_ar && row_is_valid(p.rows.position[row])) {
    const int group = group_of(p.rows, row), end = p.rows.group_start[group + 1];
    for (int first = p.rows.group_start[group]; first < end; first += 32) {
      const int other = first + lane;
      int64_t offset = -1;
      if (other < end && sees_block(p.rows.position[other])) {
        offset = (static_cast<int64_t>(other - p.rows.num_rows_ar) * p.kv.num_heads_kv + head_kv) * kHeadDim;
      }
      fold(s, q, p.scratch_k, p.scratch_v, offset, p.softmax_scale, lane);
    }
  }
  const float inverse = s.total > 0.f ? 1.f / s.total : s.total;  // a row that sees nothing yields zeros; NaN stays
  for (int i = 0; i < kHeadDim / 32; ++i) p.out[index * kHeadDim + lane + 32 * i] = __fmul_rn(s.mixed[i], inverse);
}

template <int kHeadDim>
int run(const DualAttnParamsOf<float>& p, void* stream) {
  const int64_t blocks = div_up(static_cast<int64_t>(p.rows.num_rows) * p.num_heads_q, kWarps);
  return launch(dual_attn_f32_kernel<kHeadDim>, p, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream,
                device_info());
}

}  // namespace

int dual_attn(const DualAttnParamsOf<float>& p, void* stream) {
  if (p.rows.num_rows == 0) return cudaSuccess;
  if (!aligned(16, p.kv.k_pages, p.scratch_k)) return cudaErrorMisalignedAddress;
  if (p.kv.head_dim == 64) return run<64>(p, stream);
  if (p.kv.head_dim == 128) return run<128>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace orthrus::cuda
