// The kernels of dual_attn: attention with every split folded in registers, attention split by split, and the fold of
// the partial results that this leaves.
#pragma once
#include "dual_attn_unit.cuh"

namespace orthrus::cuda {

// What a kernel keeps in shared memory behind the tiles.
struct Schedule {
  Destination to;
  QueryUnit units[1];  // as many as the launch has, then the item's own, if it is a block
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
  const int u = a.num_units - 1 - static_cast<int>(blockIdx.x) / a.heads_kv;
  const int head = static_cast<int>(blockIdx.x) % a.heads_kv;
  Schedule& work = schedule<V>();
  QueryUnit& unit = work.units[0];
  if (threadIdx.x < 32) {
    QueryUnit read = attention.template read_unit<32>(u, threadIdx.x);
    read.longest = __reduce_max_sync(~0u, read.longest);
    if (threadIdx.x == 0) {
      unit = read;
      work.to = {head, attention.offset_of(u), 0, 0};
    }
  }
  __syncthreads();
  if (unit.num_rows == 0) return;
  attention.run(work.to.offset, unit, head, 0, num_tiles(unit.longest), u < a.num_units_ar ? 0 : unit.num_rows, work.to,
                [] {});
}

// The grid fills the GPU once: CTAs loop over the work items, which lengths on the device define, the heaviest first.
// Which CTA takes which item changes no bit. The next kernels may start with the last items, not sooner: what they
// prefetch into L2 would be evicted before they use it.
template <typename V>
__global__ void __launch_bounds__(V::kThreads, V::kMinCtas)
    dual_attn_split_kernel(const __grid_constant__ DualAttnLaunch a) {
  pdl_wait();
  Attention<V> attention(a, dynamic_shared());
  Schedule& work = schedule<V>();
  int* const layers = reinterpret_cast<int*>(work.units + a.num_units + 1);
  auto note = [&](int u, const QueryUnit& unit) {
    work.units[u] = unit;
    layers[u] = num_splits(unit.longest);
  };
  if (a.num_units <= V::kWarps) {
    const int u = threadIdx.x / 32;
    if (u < a.num_units) {
      QueryUnit unit = attention.template read_unit<32>(u, threadIdx.x % 32);
      unit.longest = __reduce_max_sync(~0u, unit.longest);
      if (threadIdx.x % 32 == 0) note(u, unit);
    }
  } else {
    // The reads of a unit depend on each other, so one unit after the other would cost microseconds (an estimate).
    for (int u = threadIdx.x; u < a.num_units; u += V::kThreads) note(u, attention.template read_unit<1>(u, 0));
  }
  __syncthreads();

  for (int i = blockIdx.x;; i = work.to.next) {
    const Layers all(layers, a.num_units);  // again for every item: no register is left to keep them
    const int prefix_items = all.num_items(), num_items = (prefix_items + a.num_block_tiles) * a.heads_kv;
    if (i >= num_items) break;
    const int rank = i / a.heads_kv, head = i % a.heads_kv;
    int u = a.num_units, offset, first = 0, last = 0, block_rows = 0, slot = a.num_splits;
    if (rank < prefix_items) {
      const Item item = a.num_units == 1 ? Item{0, layers[0] - 1 - rank} : all.item(rank);
      u = item.unit;
      slot = item.layer;
      offset = attention.offset_of(u);
      first = first_tile_of_split(slot);
      last = min(first_tile_of_split(slot + 1), num_tiles(work.units[u].longest));
    } else {
      const int tile = rank - prefix_items, block = tile / a.units_per_group;
      const QueryUnit of_block = attention.block_unit(block, work.units);
      offset = tile % a.units_per_group * V::kTileM;
      block_rows = max(of_block.num_rows, 1);  // an empty block also has a tile, whose barrier work.to needs
      __syncthreads();  // the previous item has finished
      if (threadIdx.x == 0) work.units[u] = of_block;
    }
    attention.run(offset, work.units[u], head, first, last, block_rows, work.to, [&] {
      if (threadIdx.x != 0) return;
      work.to = {head, offset, slot, next_item(i, gridDim.x)};
      if (work.to.next >= num_items) pdl_launch_dependents();
    });
  }
}

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
  const int head = blockIdx.x, lane = threadIdx.x;
  const Results results = results_of(rows, head / a.heads_q);
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
