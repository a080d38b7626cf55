// The attention kernels of dual_attn: with every split folded in registers, and split by split.
#pragma once
#include "dual_attn_attention.cuh"
#include "dual_attn_units.cuh"

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
__device__ void fold_units(const DualAttnLaunch& a) {
  pdl_wait();
  pdl_launch_dependents();
  const Units<V> units(a);
  Attention<V> attention(a, dynamic_shared());
  const int u = a.num_units - 1 - static_cast<int>(blockIdx.x) / a.heads_kv;
  const int head = static_cast<int>(blockIdx.x) % a.heads_kv;
  Schedule& work = schedule<V>();
  QueryUnit& unit = work.units[0];
  if (threadIdx.x < 32) {
    QueryUnit read = units.template read<32>(u, threadIdx.x);
    read.longest = __reduce_max_sync(~0u, read.longest);
    if (threadIdx.x == 0) {
      unit = read;
      work.to = {head, units.offset_of(u), 0, 0};
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
__device__ void attend_splits(const DualAttnLaunch& a) {
  pdl_wait();
  const Units<V> units(a);
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
      QueryUnit unit = units.template read<32>(u, threadIdx.x % 32);
      unit.longest = __reduce_max_sync(~0u, unit.longest);
      if (threadIdx.x % 32 == 0) note(u, unit);
    }
  } else {
    // The reads of a unit depend on each other, so one unit after the other would cost microseconds (an estimate).
    for (int u = threadIdx.x; u < a.num_units; u += V::kThreads) note(u, units.template read<1>(u, 0));
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
      offset = units.offset_of(u);
      first = first_tile_of_split(slot);
      last = min(first_tile_of_split(slot + 1), num_tiles(work.units[u].longest));
    } else {
      const int tile = rank - prefix_items, block = tile / a.units_per_group;
      const QueryUnit of_block = units.of_block(block, work.units);
      offset = tile % a.units_per_group * V::kTileM;
      block_rows = max(of_block.num_rows, 1);  // an empty block also has a tile, whose barrier work.to needs
      __syncthreads();  // the previous item has finished
      if (threadIdx.x == 0) work.units[u] = of_block;
    }
    attention.run(offset, work.units[u], head, first, last, block_rows, work.to, [&] {
      if (threadIdx.x != 0) return;
      work.to = {head, offset, slot, next_item(i, a.ctas)};
      if (work.to.next >= num_items) pdl_launch_dependents();
    });
  }
}

template <typename V>
__global__ void __launch_bounds__(V::kThreads) dual_attn_fold_kernel(const __grid_constant__ DualAttnLaunch a) {
  if constexpr (kRuns<V>) {
    fold_units<V>(a);
  } else {
    __trap();
  }
}

template <typename V>
__global__ void __launch_bounds__(V::kThreads, V::kMinCtas)
    dual_attn_split_kernel(const __grid_constant__ DualAttnLaunch a) {
  if constexpr (kRuns<V>) {
    attend_splits<V>(a);
  } else {
    __trap();
  }
}

}  // namespace orthrus::cuda
