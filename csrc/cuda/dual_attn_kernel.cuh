// The kernels of dual_attn: attention with every split folded in registers, attention split by split, and
// the fold of what the latter leaves.
#pragma once
#include "dual_attn_unit.cuh"

namespace orthrus::cuda {

// What a kernel keeps in shared memory behind the tiles.
struct Schedule {
  int num_items, next;
  Unit units[1];  // as many as the launch has room for
};

template <typename V>
__device__ Schedule& schedule() {
  return *reinterpret_cast<Schedule*>(dynamic_shared() + V::kSmemBytes);
}

// One CTA per (unit, kv head), heaviest first where prefixes grow along the rows.
template <typename V>
__global__ void __launch_bounds__(V::kThreads) dual_attn_fold_kernel(const __grid_constant__ DualAttnLaunch a) {
  pdl_wait();
  pdl_launch_dependents();
  Attention<V> attention(a, dynamic_shared());
  const int u = a.num_units - 1 - blockIdx.x / a.p.kv.num_heads_kv, head = blockIdx.x % a.p.kv.num_heads_kv;
  Unit& unit = schedule<V>().units[0];
  if (threadIdx.x < 32) {
    const Unit read = attention.read_unit(u);
    if (threadIdx.x == 0) unit = read;
  }
  __syncthreads();
  if (unit.num_rows == 0) return;
  attention.run(u, unit, head, 0, num_tiles(unit.longest), attention.has_block(u), [] {});
}

// A grid that fills the chip once: CTAs take work items, which lengths on the device define, until none
// is left. Which CTA takes which changes no bit.
template <typename V>
__global__ void __launch_bounds__(V::kThreads) dual_attn_split_kernel(const __grid_constant__ DualAttnLaunch a) {
  pdl_wait();
  pdl_launch_dependents();
  Attention<V> attention(a, dynamic_shared());
  Schedule& plan = schedule<V>();
  int* const layers = reinterpret_cast<int*>(plan.units + a.num_units);
  for (int u = threadIdx.x / 32; u < a.num_units; u += V::kWarps) {
    const Unit unit = attention.read_unit(u);
    if (threadIdx.x % 32 == 0) {
      plan.units[u] = unit;
      layers[u] = unit.num_rows == 0 ? 0 : num_splits(unit.longest) + attention.has_block(u);
    }
  }
  __syncthreads();
  const int heads = a.p.kv.num_heads_kv;
  if (threadIdx.x < 32) {
    int items = 0;
    for (int u = threadIdx.x; u < a.num_units; u += 32) items += layers[u] * heads;
    items = __reduce_add_sync(~0u, items);
    if (threadIdx.x == 0) plan.num_items = items;
  }
  __syncthreads();

  for (int i = blockIdx.x; i < plan.num_items;) {
    const Item item = find_item(i / heads, layers, a.num_units, a.num_splits + 1);
    const Unit& unit = plan.units[item.unit];
    const int split = item.layer - attention.has_block(item.unit);
    const int first = split < 0 ? 0 : first_tile_of_split(split);
    const int last = split < 0 ? 0 : min(first_tile_of_split(split + 1), num_tiles(unit.longest));
    attention.run(item.unit, unit, i % heads, first, last, split < 0, [&] {
      if (threadIdx.x == 0) plan.next = gridDim.x + atomicAdd(a.next_item, 1);
    });
    __syncthreads();
    i = plan.next;
  }
}

// Folds the partial results of each (row, q head) in ascending order, the own block last; one warp each.
template <int kHeadDim>
__global__ void __launch_bounds__(128) dual_attn_merge_kernel(const __grid_constant__ DualAttnLaunch a) {
  constexpr int kLaneDims = kHeadDim / 32, kAhead = 8;
  pdl_wait();
  pdl_launch_dependents();
  const Rows& rows = a.p.rows;
  const int heads = a.p.num_heads_q, lane = threadIdx.x % 32;
  const int64_t head = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (head >= static_cast<int64_t>(rows.num_rows) * heads) return;
  const int row = static_cast<int>(head / heads);
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.next_item = 0;
  const int splits = num_splits(rows.prefix_len[row]), results = num_results(rows, row);
  if (results == 1) return;  // written by the attention kernel

  const int64_t slot_stride = static_cast<int64_t>(rows.num_rows) * heads;
  float top = -INFINITY, total = 0.f, folded[kLaneDims] = {};
  for (int first = 0; first < results; first += kAhead) {
    float2 state[kAhead];
    float part[kAhead][kLaneDims];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (first + s >= results) break;
      const int64_t at = (first + s < splits ? first + s : a.num_splits) * slot_stride + head;
      state[s] = a.partial_state[at];
#pragma unroll
      for (int d = 0; d < kLaneDims; ++d) part[s][d] = a.partial[at * kHeadDim + lane * kLaneDims + d];
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (first + s >= results) break;
      const Fold step = fold_step(top, total, state[s].x, state[s].y);
#pragma unroll
      for (int d = 0; d < kLaneDims; ++d) folded[d] = fold(step, folded[d], part[s][d]);
    }
  }
  const float inverse = inverse_total(total);
  uint32_t* out = reinterpret_cast<uint32_t*>(a.p.out + head * kHeadDim) + lane * kLaneDims / 2;
#pragma unroll
  for (int d = 0; d < kLaneDims / 2; ++d)
    out[d] = pack_bf16(__fmul_rn(folded[2 * d], inverse), __fmul_rn(folded[2 * d + 1], inverse));
}

}  // namespace orthrus::cuda
