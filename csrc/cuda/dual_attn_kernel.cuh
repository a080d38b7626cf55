// The kernels of dual_attn: attention with every split folded in registers, attention split by split, and
// the fold of what the latter leaves.
#pragma once
#include "dual_attn_unit.cuh"

namespace orthrus::cuda {

// What a kernel keeps in shared memory behind the tiles.
struct Schedule {
  int num_items, next;
  QueryUnit units[1];  // as many as the launch has room for
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
  QueryUnit& unit = schedule<V>().units[0];
  if (threadIdx.x < 32) {
    QueryUnit read = attention.read_unit(u, threadIdx.x, 32);
    read.longest = __reduce_max_sync(~0u, read.longest);
    if (threadIdx.x == 0) unit = read;
  }
  __syncthreads();
  if (unit.num_rows == 0) return;
  attention.run(u, unit, head, 0, num_tiles(unit.longest), attention.has_block(u), [] {});
}

// A grid that fills the chip once: CTAs take work items, which lengths on the device define, until none
// is left. Which CTA takes which changes no bit. The next kernels are let in with the last items: sooner, what they
// bring to L2 ahead of time would be evicted before they use it.
template <typename V>
__global__ void __launch_bounds__(V::kThreads) dual_attn_split_kernel(const __grid_constant__ DualAttnLaunch a) {
  pdl_wait();
  Attention<V> attention(a, dynamic_shared());
  Schedule& work = schedule<V>();
  int* const layers = reinterpret_cast<int*>(work.units + a.num_units);
  auto note = [&](int u, const QueryUnit& unit) {
    work.units[u] = unit;
    layers[u] = unit.num_rows == 0 ? 0 : num_splits(unit.longest) + attention.has_block(u);
  };
  if (a.num_units <= V::kWarps) {
    const int u = threadIdx.x / 32;
    if (u < a.num_units) {
      QueryUnit unit = attention.read_unit(u, threadIdx.x % 32, 32);
      unit.longest = __reduce_max_sync(~0u, unit.longest);
      if (threadIdx.x % 32 == 0) note(u, unit);
    }
  } else {
    // A unit's reads depend on each other, so that one unit after the other would cost microseconds (by estimate).
    for (int u = threadIdx.x; u < a.num_units; u += V::kThreads) note(u, attention.read_unit(u, 0, 1));
  }
  __syncthreads();
  const int heads = a.p.kv.num_heads_kv;
  if (threadIdx.x < 32) {
    int items = 0;
    for (int u = threadIdx.x; u < a.num_units; u += 32) items += layers[u] * heads;
    items = __reduce_add_sync(~0u, items);
    if (threadIdx.x == 0) work.num_items = items;
  }
  __syncthreads();

  for (int i = blockIdx.x; i < work.num_items;) {
    const Item item = find_item(i / heads, layers, a.num_units, a.num_splits + 1);
    const QueryUnit& unit = work.units[item.unit];
    const int split = item.layer - attention.has_block(item.unit);
    const int first = split < 0 ? 0 : first_tile_of_split(split);
    const int last = split < 0 ? 0 : min(first_tile_of_split(split + 1), num_tiles(unit.longest));
    attention.run(item.unit, unit, i % heads, first, last, split < 0, [&] {
      if (threadIdx.x != 0) return;
      work.next = gridDim.x + atomicAdd(a.next_item, 1);
      if (work.next >= work.num_items) pdl_launch_dependents();
    });
    i = work.next;  // valid from the barrier of the item's first tile (each has one) to the first of the next item
  }
}

constexpr int kMergeThreads = 32;

// Folds the partial results of a (row, q head) in ascending order, the own block last; one warp each, whose lanes hold
// pairs of dims: a fold's factors, most of its arithmetic, are computed once for all of them. The results come through
// shared memory, so that many are in flight at once: a trip to L2 takes as long as all their sums.
template <int kHeadDim>
__global__ void __launch_bounds__(kMergeThreads) dual_attn_merge_kernel(const __grid_constant__ DualAttnLaunch a) {
  // 40,960 tokens take 69 results at most: three trips. An SM has 8 of these CTAs, of 14 KB each, 1 KB of it the
  // system's, where 32 rows have 32 heads: with larger ones a row_linear behind them, of 113 KB, would have to wait for
  // some.
  constexpr int kAtOnce = 24;
  constexpr int kChunks = kHeadDim / 4;  // of 16 bytes
  constexpr int kPairs = kHeadDim / 64;  // of a lane
  __shared__ __align__(16) float part[kAtOnce][kHeadDim];
  __shared__ float2 state[kAtOnce];
  pdl_launch_dependents();
  pdl_wait();
  const Rows& rows = a.p.rows;
  const int head = blockIdx.x, lane = threadIdx.x;
  const int64_t slot_stride = static_cast<int64_t>(rows.num_rows) * a.p.num_heads_q;
  const Results results = results_of(rows, head / a.p.num_heads_q);
  if (head == 0 && lane == 0) *a.next_item = 0;
  if (results.count() == 1) return;  // written by the attention kernel

  float top = -INFINITY, total = 0.f, folded[kPairs][2] = {};
  for (int first = 0; first < results.count(); first += kAtOnce) {
    const int n = min(kAtOnce, results.count() - first);
    auto slot = [&](int s) {
      return (first + s < results.splits ? first + s : a.num_splits) * slot_stride + head;
    };
    for (int s = lane / kChunks; s < n; s += kMergeThreads / kChunks) {
      const int dim = lane % kChunks * 4;
      copy16(shared_address(&part[s][dim]), a.partial + slot(s) * kHeadDim + dim, true);
    }
    copy_commit();
    for (int s = lane; s < n; s += kMergeThreads) state[s] = a.partial_state[slot(s)];
    copy_wait<0>();
    __syncwarp();
    for (int s = 0; s < n; ++s) {
      const Fold step = fold_step(top, total, state[s].x, state[s].y);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const float2 split = *reinterpret_cast<const float2*>(&part[s][j * 64 + lane * 2]);
        folded[j][0] = fold(step, folded[j][0], split.x);
        folded[j][1] = fold(step, folded[j][1], split.y);
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
