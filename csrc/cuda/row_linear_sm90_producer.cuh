// The producer of row_linear on Hopper: which units of the weight a CTA works through, the ring of shared-memory stages
// that it fills with them, and what it prefetches into L2 ahead of that.
#pragma once
#include "orthrus/launch.cuh"
#include "orthrus/sm90.cuh"
#include "row_linear_finish.cuh"

namespace orthrus::cuda {

constexpr int kMaxSm90Stages = 16;
constexpr int kManyStagingRows = 2 * kStagingRows;  // with many rows
constexpr int kManyStagingBytes = kManyStagingRows * kStagingStride * 4;

// CTAs, neighbours in the grid, that work through the same rows with different weights: each loads its part of x for
// all of them.
__host__ __device__ constexpr int cluster_ctas(bool many_rows) { return many_rows ? kRowTilesSm90.cluster : 1; }
static_assert(kRowTilesSm90.cluster == kRowTilesSm90Coded.cluster);

template <int kTileRows>
constexpr int kXBytes = kTileRows * kBlock * 2;
template <int kTileRows, bool kCoded>
__host__ __device__ constexpr int stage_bytes(int blocks) {
  return blocks * packed_bytes(kCoded) + kXBytes<kTileRows>;
}

// The start of shared memory, at addresses that take no registers. Behind it are x of all the ring's stages, at
// multiples of 1024 bytes as the swizzle requires, then their weights, then for kArgmax the best logits, or with many
// rows transposition buffers that are twice as large.
struct alignas(1024) Shared {
  uint64_t full[kMaxSm90Stages], empty[kMaxSm90Stages];
  int32_t flags[2];                              // one per group
  alignas(16) float staging[2][kStagingFloats];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kTileRows, bool kCoded>
struct Ring {
  Shared& shared;
  int num_stages;
  int blocks;  // of a stage's weights

  __device__ uint64_t* full(int stage) const { return &shared.full[stage]; }
  __device__ uint64_t* empty(int stage) const { return &shared.empty[stage]; }
  __device__ uint8_t* weight(int stage, int block) const {
    return x(num_stages) + (stage * blocks + block) * packed_bytes(kCoded);
  }
  __device__ uint8_t* x(int stage) const {
    return reinterpret_cast<uint8_t*>(&shared + 1) + stage * kXBytes<kTileRows>;
  }
  __device__ float* staging(int group) const {
    return reinterpret_cast<float*>(weight(num_stages, 0) + group * kManyStagingBytes);
  }
  __device__ Best* best() const { return reinterpret_cast<Best*>(weight(num_stages, 0)); }
};

// The same as addresses, from one that stays in a register: the compiler would recompute the start at every step.
template <int kTileRows, bool kCoded>
struct RingAddresses {
  SharedAddress start;
  int num_stages, blocks;

  __device__ explicit RingAddresses(const Ring<kTileRows, kCoded>& ring)
      : start(shared_address(&ring.shared)), num_stages(ring.num_stages), blocks(ring.blocks) {
    asm volatile("" : "+r"(start), "+r"(num_stages), "+r"(blocks));
  }
  __device__ SharedAddress full(int stage) const { return start + stage * sizeof(uint64_t); }
  __device__ SharedAddress empty(int stage) const { return full(kMaxSm90Stages + stage); }
  __device__ SharedAddress x(int stage) const { return start + sizeof(Shared) + stage * kXBytes<kTileRows>; }
  __device__ SharedAddress weight(int stage) const { return x(num_stages) + stage * blocks * packed_bytes(kCoded); }
};

struct Cursor {
  int stage = 0;
  int parity = 0;
  __device__ void advance(int num_stages) {
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The items that a CTA works through: its range of units for one row tile after the other (few rows), or whole tiles of
// two blocks (many rows), with the row tile varying fastest so that a weight is read from memory once. A cluster's CTAs
// take neighbouring tiles of the same rows; the last one's may not exist.
template <bool kManyRows>
struct Walk {
  static constexpr int kCtas = cluster_ctas(kManyRows);

  const RowLinearArgs& args;
  int begin, length;  // units of an item: within the weight (few rows) or within a tile (many rows)

  __device__ explicit Walk(const RowLinearArgs& a) : args(a) {
    begin = kManyRows ? 0 : a.plan.range_begin(blockIdx.x);
    length = kManyRows ? a.plan.k_blocks : a.plan.range_begin(blockIdx.x + 1) - begin;
  }
  static __device__ int rank() { return blockIdx.x % kCtas; }  // within the cluster
  __device__ int items() const {
    if (!kManyRows) return args.row_tiles;
    const int all = items_of_many(args.plan.blocks, kCtas) * args.row_tiles;
    const int cluster = blockIdx.x / kCtas, clusters = gridDim.x / kCtas;
    return div_up(all - cluster, clusters);
  }
  __device__ int row_tile(int item) const { return kManyRows ? of_all(item) % args.row_tiles : item; }
  __device__ int first_block(int item) const {
    return kManyRows ? (of_all(item) / args.row_tiles * kCtas + rank()) * 2
                    : begin / args.plan.k_blocks * args.plan.blocks_per_tile;
  }

 private:
  __device__ uint32_t of_all(int item) const { return blockIdx.x / kCtas + item * (gridDim.x / kCtas); }
};

// One unit of the walk as the producer needs it. A single thread issues all loads, so a step must take it no longer
// than memory takes for 4 KB: within a run (consecutive units of one tile) it is a few additions.
template <int kTileRows, bool kManyRows, bool kCoded>
struct Position {
  const Walk<kManyRows>& walk;
  const sm90::TensorMap* x_map;  // of the item's view
  int item = 0, row;             // the first row that this CTA loads of its row tile
  const uint8_t* weight;
  BlockBytes bytes = kPlainBlocks;
  int row_of_blocks;             // bytes to the tile's second row of blocks
  int block, behind;             // first block of the tile; units of the item after the run
  const uint8_t* source;         // the unit's first block
  int column, left;              // its first input; units left in the run, this one included

  __device__ Position(const Walk<kManyRows>& w, const sm90::TensorMap* x_maps) : walk(w) { enter(x_maps); }
  __device__ void enter(const sm90::TensorMap* x_maps) {
    const RowLinearArgs& args = walk.args;
    const int row_tile = walk.row_tile(item);
    const bool diff = args.is_diff(row_tile);
    x_map = x_maps + diff;
    weight = static_cast<const uint8_t*>(args.weight_of(diff));
    if (kCoded) bytes = args.block_bytes_of(diff);
    row_of_blocks = args.plan.k_blocks * bytes.stored;
    row = args.row_begin(row_tile, kTileRows) + walk.rank() * (kTileRows / walk.kCtas);
    block = walk.first_block(item);
    behind = walk.length;
    begin_run(walk.begin % args.plan.k_blocks);
  }
  __device__ void begin_run(int kb) {
    left = min(walk.args.plan.k_blocks - kb, behind);
    behind -= left;
    source = weight + (static_cast<int64_t>(block) * walk.args.plan.k_blocks + kb) * bytes.stored;
    column = kb * kBlock;
  }
  __device__ void advance(const sm90::TensorMap* x_maps) {
    source += bytes.stored;
    column += kBlock;
    if (--left > 0) return;
    if (behind > 0) {
      block += walk.args.plan.blocks_per_tile;
      begin_run(0);
    } else {
      ++item;
      enter(x_maps);
    }
  }
};

// The first units that the next kernel's CTA of the same number will load, if that kernel has few rows too: memory need
// not wait for this kernel's end.
struct NextWeightPrefetch {
  const RowLinearPlan& plan;
  const BlockBytes& bytes;
  const uint8_t* source = nullptr;
  int kb = 0, left = 0;

  __device__ explicit NextWeightPrefetch(const RowLinearArgs& args) : plan(args.next), bytes(args.next_block_bytes) {
    if (!args.p.next_weight || static_cast<int>(blockIdx.x) >= plan.grid) return;
    const int begin = plan.range_begin(blockIdx.x);
    left = min(args.next_steps_ahead, plan.range_begin(blockIdx.x + 1) - begin);
    kb = begin % plan.k_blocks;
    const int64_t unit = static_cast<int64_t>(begin / plan.k_blocks) * plan.blocks_per_tile * plan.k_blocks + kb;
    source = static_cast<const uint8_t*>(args.p.next_weight) + unit * bytes.stored;
  }
  __device__ void prefetch() {
    const int64_t row_of_blocks = static_cast<int64_t>(plan.k_blocks) * bytes.stored;
    sm90::bulk_prefetch(source, bytes.read);
    if (plan.blocks_per_tile == 2) sm90::bulk_prefetch(source + row_of_blocks, bytes.read);
    source += bytes.stored;
    if (++kb == plan.k_blocks) {
      kb = 0;
      source += row_of_blocks * (plan.blocks_per_tile - 1);
    }
    --left;
  }
};

template <int kTileRows, bool kManyRows, bool kCoded>
__device__ void produce(const RowLinearArgs& args, const sm90::TensorMap* x_maps,
                        const Ring<kTileRows, kCoded>& pointers) {
  using namespace sm90;
  using Position = Position<kTileRows, kManyRows, kCoded>;
  const RingAddresses<kTileRows, kCoded> ring(pointers);
  const Walk<kManyRows> walk(args);
  const int total = walk.items() * walk.length;
  const uint64_t policy = evict_first_policy();

  auto load_block = [&](SharedAddress dst, const uint8_t* source, int bytes, SharedAddress full) {
    if (kManyRows)
      bulk_load(dst, source, bytes, full);
    else
      bulk_load(dst, source, bytes, full, policy);
  };
  auto load_weight = [&](const Position& at, int stage) {
    const bool one = !kManyRows || at.block < args.plan.blocks;
    const bool both = ring.blocks == 2 && (!kManyRows || at.block + 1 < args.plan.blocks);
    const SharedAddress full = ring.full(stage), dst = ring.weight(stage);
    const int bytes = at.bytes.read;
    barrier_arrive_expect(full, (one + both) * bytes + kXBytes<kTileRows>);
    if (one) load_block(dst, at.source, bytes, full);
    if (both) load_block(dst + packed_bytes(kCoded), at.source + at.row_of_blocks, bytes, full);
  };
  // Each CTA of a cluster loads its part into all of them, whose barriers may not expect it yet.
  auto load_x = [&](const Position& at, int stage) {
    constexpr int kCtas = cluster_ctas(kManyRows);
    if constexpr (kCtas == 1) {
      tensor_load(ring.x(stage), at.x_map, at.column, at.row, ring.full(stage));
    } else {
      constexpr int kPartBytes = kXBytes<kTileRows> / kCtas;
      static_assert(kPartBytes % 1024 == 0, "whole periods of the swizzle");
      const SharedAddress part = ring.x(stage) + walk.rank() * kPartBytes;
      tensor_load_multicast(part, at.x_map, at.column, at.row, ring.full(stage), (1 << kCtas) - 1);
    }
  };
  auto prefetch = [&](const Position& at) {
    bulk_prefetch(at.source, at.bytes.read);
    if (ring.blocks == 2) bulk_prefetch(at.source + at.row_of_blocks, at.bytes.read);
  };

  // Steps prefetched into L2 before they are loaded; many rows, with one CTA per SM and reuse in L2, do without. Only
  // the load marks a line as evict-first: until then it has to stay. After the last step, the first ones of the next
  // weight follow, and where this weight's steps are few, before the wait.
  const int lead = kManyRows ? 0 : args.steps_ahead;
  const int ahead = min(total, ring.num_stages);
  Position first(walk, x_maps), next(walk, x_maps);
#pragma unroll 1
  for (int step = 0; step < ahead; ++step, next.advance(x_maps)) load_weight(next, step);
  Position later(next);
#pragma unroll 1
  for (int step = ahead; step < min(total, ahead + lead); ++step, later.advance(x_maps)) prefetch(later);
  NextWeightPrefetch next_weight(args);
#pragma unroll 1
  for (int spare = ahead + lead - total; !kManyRows && spare > 0 && next_weight.left > 0; --spare)
    next_weight.prefetch();
  pdl_wait();
  fence_proxy_async_global();  // x was stored by threads
  if (total == ahead) pdl_launch_dependents();  // after the wait: never more than two row_linears at once
#pragma unroll 1
  for (int step = 0; step < ahead; ++step, first.advance(x_maps)) load_x(first, step);
  Cursor cursor;
  for (int step = ahead; step < total; ++step, next.advance(x_maps)) {
    barrier_wait(ring.empty(cursor.stage), cursor.parity);
    load_weight(next, cursor.stage);
    load_x(next, cursor.stage);
    if (step == total - 1) pdl_launch_dependents();
    if (lead > 0 && step + lead < total) {
      prefetch(later);
      later.advance(x_maps);
    } else if (!kManyRows && next_weight.left > 0) {
      next_weight.prefetch();
    }
    cursor.advance(ring.num_stages);
  }
#pragma unroll 1
  while (!kManyRows && next_weight.left > 0) next_weight.prefetch();
  // Shared memory must stay valid until the cluster's consumers have arrived at its barriers.
  if constexpr (cluster_ctas(kManyRows) > 1) {
#pragma unroll 1
    for (int step = 0; step < ahead; ++step, cursor.advance(ring.num_stages))
      barrier_wait(ring.empty(cursor.stage), cursor.parity);
  }
}

#endif

}  // namespace orthrus::cuda
