// The producer of row_linear on Hopper: which units of the weight a CTA works through, the ring of shared-memory stages
// that it fills with them, and what it brings to L2 ahead of that.
#pragma once
#include "orthrus/launch.cuh"
#include "orthrus/sm90.cuh"
#include "row_linear_finish.cuh"

namespace orthrus::cuda {

constexpr int kMaxStages = 16;

template <int kTileRows>
constexpr int kXBytes = kTileRows * kBlock * 2;
template <int kTileRows, bool kCoded>
__host__ __device__ constexpr int stage_bytes(int blocks) {
  return blocks * packed_bytes(kCoded) + kXBytes<kTileRows>;
}

// The start of shared memory, at addresses that take no registers. Behind it x of all the ring's stages, which its
// swizzle wants at multiples of 1024 bytes, then their weights, then for kArgmax the best logits.
struct alignas(1024) Shared {
  uint64_t full[kMaxStages], empty[kMaxStages];
  int32_t flags[2];                              // of each group
  alignas(16) float staging[2][kStagingFloats];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Estimated: several microseconds pass between a kernel's last load and its successor's first free stage, more than the
// stages hold at 24 KB per microsecond and SM. So L2 is kept filled this far ahead of them: the successor catches up
// from L2 while memory goes on.
constexpr int kPrefetchBytes = 96 * 1024;
__device__ inline int steps_ahead(const RowLinearPlan& plan) {
  return kPrefetchBytes / (plan.blocks_per_tile * plan.block_bytes);
}

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
  __device__ Best* best() const { return reinterpret_cast<Best*>(weight(num_stages, 0)); }
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

// The items that a CTA works through: its range of units for one row tile after the other (few rows), or whole
// tiles of two blocks (many rows), there with the row tile varying fastest so that a weight is read from memory once.
template <bool kManyRows>
struct Walk {
  const RowLinearArgs& args;
  int begin, length;  // units of an item: within the weight (few rows) or within a tile (many rows)

  __device__ explicit Walk(const RowLinearArgs& a) : args(a) {
    begin = kManyRows ? 0 : a.plan.range_begin(blockIdx.x);
    length = kManyRows ? a.plan.k_blocks : a.plan.range_begin(blockIdx.x + 1) - begin;
  }
  __device__ int items() const {
    if (!kManyRows) return args.row_tiles;
    const int all = (args.plan.blocks + 1) / 2 * args.row_tiles;
    return (all - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  }
  __device__ int row_tile(int item) const {
    return kManyRows ? (blockIdx.x + item * gridDim.x) % args.row_tiles : item;
  }
  __device__ int first_block(int item) const {
    return kManyRows ? (blockIdx.x + item * gridDim.x) / args.row_tiles * 2
                    : begin / args.plan.k_blocks * args.plan.blocks_per_tile;
  }
};

// Where one unit of a weight lies; stepping costs no division.
struct WeightUnit {
  const RowLinearPlan& plan;
  const uint8_t* weight;
  int block, kb;
  const uint8_t* source;  // of its first block

  __device__ void locate() {
    source = weight + (static_cast<int64_t>(block) * plan.k_blocks + kb) * plan.block_bytes;
  }
  __device__ void advance() {
    source += plan.block_bytes;
    if (++kb < plan.k_blocks) return;
    block += plan.blocks_per_tile;
    kb = 0;
    locate();
  }
  __device__ void prefetch() const {
#pragma unroll 1
    for (int b = 0; b < plan.blocks_per_tile; ++b)
      sm90::bulk_prefetch(source + static_cast<int64_t>(b) * plan.k_blocks * plan.block_bytes, plan.block_bytes);
  }
};

// The first units that the next kernel's CTA of the same number will load, if that has few rows too: memory does not
// wait for this kernel's end.
struct NextWeightPrefetch {
  WeightUnit unit;
  int left = 0;

  __device__ explicit NextWeightPrefetch(const RowLinearArgs& args) : unit{args.next} {
    const RowLinearPlan& plan = args.next;
    if (!args.p.next_weight || static_cast<int>(blockIdx.x) >= plan.grid) return;
    const int begin = plan.range_begin(blockIdx.x);
    left = min(steps_ahead(plan), plan.range_begin(blockIdx.x + 1) - begin);
    unit.weight = static_cast<const uint8_t*>(args.p.next_weight);
    unit.block = begin / plan.k_blocks * plan.blocks_per_tile;
    unit.kb = begin % plan.k_blocks;
    unit.locate();
  }
  __device__ void prefetch() {
    unit.prefetch();
    unit.advance();
    --left;
  }
};

// One unit of the walk as the producer needs it.
template <int kTileRows, bool kManyRows>
struct Position {
  const Walk<kManyRows>& walk;
  int item = 0, offset, row_tile, row;
  WeightUnit unit;

  __device__ explicit Position(const Walk<kManyRows>& w) : walk(w), unit{w.args.plan} { enter(); }
  __device__ void enter() {
    const RowLinearArgs& args = walk.args;
    row_tile = walk.row_tile(item);
    unit.weight = static_cast<const uint8_t*>(args.weight_of(row_tile));
    row = args.row_begin(row_tile, kTileRows);
    offset = 0;
    unit.block = walk.first_block(item);
    unit.kb = walk.begin % args.plan.k_blocks;
    unit.locate();
  }
  __device__ void advance() {
    unit.advance();
    if (++offset < walk.length) return;
    ++item;
    enter();
  }
};

template <int kTileRows, bool kManyRows, bool kCoded>
__device__ void produce(const RowLinearArgs& args, const sm90::TensorMap* x_map, const Ring<kTileRows, kCoded>& ring) {
  using namespace sm90;
  using Position = Position<kTileRows, kManyRows>;
  const Walk<kManyRows> walk(args);
  const int total = walk.items() * walk.length;
  constexpr int block_bytes = packed_bytes(kCoded);
  const int64_t block_stride = static_cast<int64_t>(args.plan.k_blocks) * block_bytes;
  const uint64_t policy = evict_first_policy();

  auto load_weight = [&](const Position& at, int stage) {
    const int count = min(ring.blocks, args.plan.blocks - at.unit.block);
    barrier_arrive_expect(ring.full(stage), count * block_bytes + kXBytes<kTileRows>);
#pragma unroll 1
    for (int b = 0; b < count; ++b) {
      if (kManyRows)
        bulk_load(ring.weight(stage, b), at.unit.source + b * block_stride, block_bytes, ring.full(stage));
      else
        bulk_load(ring.weight(stage, b), at.unit.source + b * block_stride, block_bytes, ring.full(stage), policy);
    }
  };
  auto load_x = [&](const Position& at, int stage) {
    tensor_load(ring.x(stage), x_map + args.is_diff(at.row_tile), at.unit.kb * kBlock, at.row, ring.full(stage));
  };

  // Steps brought to L2 before they are loaded; many rows, with one CTA an SM and reuse in L2, does without. Only the
  // load marks a line as evict-first: between the two it has to stay. Behind the last step come the first ones of the
  // next weight.
  const int lead = kManyRows ? 0 : steps_ahead(args.plan);
  const int ahead = min(total, ring.num_stages);
  Position first(walk), next(walk);
  for (int step = 0; step < ahead; ++step, next.advance()) load_weight(next, step);
  Position later(next);
  for (int step = ahead; step < min(total, ahead + lead); ++step, later.advance()) later.unit.prefetch();
  NextWeightPrefetch next_weight(args);
  pdl_wait();
  fence_proxy_async_global();  // x was stored by threads
  if (total == ahead) pdl_launch_dependents();  // after the wait: never more than two row_linears at once
  for (int step = 0; step < ahead; ++step, first.advance()) load_x(first, step);
  Cursor cursor;
  for (int step = ahead; step < total; ++step, next.advance()) {
    barrier_wait(ring.empty(cursor.stage), cursor.parity);
    load_weight(next, cursor.stage);
    load_x(next, cursor.stage);
    if (step == total - 1) pdl_launch_dependents();
    if (lead > 0 && step + lead < total) {
      later.unit.prefetch();
      later.advance();
    } else if (!kManyRows && next_weight.left > 0) {
      next_weight.prefetch();
    }
    cursor.advance(ring.num_stages);
  }
  while (!kManyRows && next_weight.left > 0) next_weight.prefetch();
}

#endif

}  // namespace orthrus::cuda
