// How row_linear divides a weight among CTAs, and the arguments its kernels share.
//
// The packed weight is a grid of 64 x 64 blocks, 8 KiB each, k fastest. Block (b, kb) holds output features
// [64b, 64b+64) and inputs [64kb, 64kb+64), each feature's 128 bytes with its 16-byte chunks permuted by
// chunk ^ (feature & 7), which is both the 128-byte wgmma swizzle and free of bank conflicts for ldmatrix. The
// blocks of a coded weight are smaller and followed by exceptions, see coded_block.cuh. Those of the two views may
// differ in size, but not in whether they are coded.
//
// A tile is one or two blocks tall; a *unit* of work is one k-block of a tile. The units of all tiles, in order, are
// cut into `grid` equal ranges; where a cut falls inside a tile, its sum is cut there too. The cuts depend only on the
// weight's shape and the device, so a row's sum is folded in the same order whatever shares the call. Method: Stream-K
// (Osama, Merrill, Cecka, Garland, Owens, arXiv 2301.03598); the last of a tile's CTAs to arrive folds, in k order.
#pragma once
#include "orthrus/divisor.h"
#include "orthrus/launch.cuh"
#include "orthrus/params.h"
#include "orthrus/sm80.cuh"

namespace orthrus::cuda {

constexpr int kBlock = 64;
constexpr int kBlockBytes = kBlock * kBlock * 2;
constexpr int kCodedBlockBytes = kBlock * kBlock * 3 / 2 + 64;
constexpr int kLeadingBytes = kBlock * kBlock + 64;  // of a coded block, what drafts read
// Of a block in shared memory.
__host__ __device__ constexpr int packed_bytes(bool coded) { return coded ? kCodedBlockBytes : kBlockBytes; }
constexpr int kGroupThreads = 128;     // the threads that own one 64-feature block of a tile
constexpr int kMaxCounters = 4096;     // arrival counters at the start of the workspace
constexpr int kStagingStride = kBlock + 4;
constexpr int kStagingRows = 16;
constexpr int kStagingFloats = kStagingRows * kStagingStride;  // one group's transposition buffer

struct RowLinearPlan {
  Divisor k_blocks;         // in_features / 64
  int32_t blocks;           // ceil(out_features / 64)
  int32_t blocks_per_tile;  // 1 or 2
  int32_t tiles;
  Divisor grid;             // CTAs, and for kArgmax partial maxima per row
  int32_t split;            // cuts may fall inside a tile
  Divisor units;            // tiles * k_blocks (split plans only)

  // make_plan keeps these products within 31 bits.
  __host__ __device__ int range_begin(int cta) const {
    return split ? cta * units / grid : cta * tiles / grid * k_blocks;
  }
  // The CTA whose range holds `unit` (split plans only).
  __host__ __device__ int owner(int unit) const { return ((unit + 1) * grid - 1) / units; }
  // The CTAs that share a cut tile.
  struct Sharers {
    int first, count;
  };
  __host__ __device__ Sharers sharers(int tile) const {
    const int first = owner(tile * k_blocks);
    return {first, owner((tile + 1) * k_blocks - 1) - first + 1};
  }
  // One past the last k-block summed without a fold, for a sum of `tile` that starts at `kb`.
  __host__ __device__ int segment_end(int tile, int kb) const {
    if (!split) return k_blocks;
    const int end = range_begin(owner(tile * k_blocks + kb) + 1) - tile * k_blocks;
    return end < k_blocks ? end : k_blocks;
  }
};

// A cut costs a round trip through L2, so tiles are cut only where whole ones would leave more than this share of the
// CTAs' time idle, and only where each CTA still gets a few units. (Both are estimates.)
constexpr double kTolerableIdle = 0.04;
constexpr int kMinUnits = 6;
// Taller tiles read x half as often; narrow weights use short tiles, which are cut in fewer pieces.
constexpr int kMinTallTiles = 24;

// Estimated: several microseconds pass between a kernel's last load and its successor's first free stage, more than the
// stages hold at 24 KB per microsecond and SM. So L2 is kept filled this far ahead of the stages: the successor catches
// up from L2 while memory keeps streaming.
constexpr int kPrefetchBytes = 96 * 1024;

inline RowLinearPlan make_plan(int in_features, int out_features, bool whole_tiles, int num_sms) {
  RowLinearPlan plan{};
  plan.k_blocks = Divisor(in_features / kBlock);
  plan.blocks = div_up(out_features, kBlock);
  plan.blocks_per_tile = plan.blocks % 2 == 0 && plan.blocks / 2 >= kMinTallTiles ? 2 : 1;
  plan.tiles = plan.blocks / plan.blocks_per_tile;
  const int rounds = div_up(plan.tiles, num_sms);
  const bool idle = rounds * num_sms - plan.tiles > kTolerableIdle * rounds * num_sms;
  const int64_t units = static_cast<int64_t>(plan.tiles) * plan.k_blocks;
  plan.split = !whole_tiles && idle && units >= kMinUnits * num_sms && 2 * plan.blocks <= kMaxCounters &&
               (units + 1) * num_sms < INT32_MAX;
  if (!plan.split && plan.blocks <= num_sms) {
    plan.blocks_per_tile = 1;
    plan.tiles = plan.blocks;
  }
  plan.grid = Divisor(plan.split || plan.tiles > num_sms ? num_sms : plan.tiles);
  plan.units = Divisor(plan.split ? units : 1);
  return plan;
}

// Bytes of a weight's blocks.
struct BlockBytes {
  int32_t stored;  // from one block to the next
  int32_t read;    // those of a block that the pass reads; of coded ones all, or the leading part
};
constexpr BlockBytes kPlainBlocks{kBlockBytes, kBlockBytes};
inline BlockBytes block_bytes(int bits, bool leading_only) {
  if (!is_coded(bits)) return kPlainBlocks;
  const int stored = bits == kDraftBits ? kLeadingBytes : kCodedBlockBytes;
  return {stored, leading_only ? kLeadingBytes : stored};
}

struct RowLinearArgs {
  RowLinearParams p;
  RowLinearPlan plan, next;  // next: of p.next_weight
  BlockBytes block_bytes, block_bytes_diff, next_block_bytes;
  int32_t steps_ahead, next_steps_ahead;  // units of the AR view's weight, and of the next, that fill kPrefetchBytes
  int32_t row_tiles_ar;  // row tiles of `tile_rows` rows, the AR view's first; no tile holds both views
  int32_t row_tiles;
  int32_t num_stages;    // of the shared-memory ring

  __device__ bool is_diff(int row_tile) const { return row_tile >= row_tiles_ar; }
  __device__ const void* weight_of(bool diff) const { return diff ? p.weight_diff : p.weight; }
  __device__ BlockBytes block_bytes_of(bool diff) const { return diff ? block_bytes_diff : block_bytes; }
  __device__ bool leading_only(bool diff) const { return block_bytes_of(diff).read == kLeadingBytes; }
  __device__ int row_begin(int row_tile, int tile_rows) const {
    return is_diff(row_tile) ? p.num_rows_ar + (row_tile - row_tiles_ar) * tile_rows : row_tile * tile_rows;
  }
  __device__ int row_end(int row_tile) const { return is_diff(row_tile) ? p.num_rows : p.num_rows_ar; }
};

// A thread's number within its group, recomputed at each use: in loops, registers are scarcer than time.
__device__ __forceinline__ uint32_t thread_here() {
  uint32_t thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread % kGroupThreads;
}

// Partial sums follow the counters: [view][block of the tile][which][cta][tile_rows * 64] floats, in the order of the
// owning threads' accumulators. A CTA cuts at most two tiles: the one inside which its range starts (0) and the one
// inside which it ends (1).
__host__ __device__ inline int64_t partial_offset(const RowLinearPlan& plan, int view, int group, int which, int cta,
                                                  int tile_rows) {
  const int64_t slot = ((static_cast<int64_t>(view) * plan.blocks_per_tile + group) * 2 + which) * plan.grid + cta;
  return kMaxCounters + slot * tile_rows * kBlock;
}

// Rows per tile: the narrowest variant that holds the larger view's rows. More rows than the widest variant holds use a
// variant for many rows: whole sums per CTA, folded in registers at the same cuts. kArgmax has no cuts: it uses several
// tiles of few rows, or wider ones, which need registers for only one set of sums.
struct RowTiles {
  int32_t widest, widest_argmax;
  int32_t many_rows[2];  // a call uses the one that leaves the busiest SM less work
  int32_t cluster;       // CTAs that load the rows of x together, with many rows
};
constexpr RowTiles kRowTilesSm90{160, 256, {128, 192}, 2};
constexpr RowTiles kRowTilesSm90Coded{160, 160, {128, 128}, 2};  // more rows' sums leave no registers for unpacking
constexpr RowTiles kRowTilesMma{96, 96, {96, 96}, 1};

// With many rows, items per row tile: two blocks for each CTA of a cluster, of which the last may have none.
__host__ __device__ constexpr int items_of_many(int blocks, int cluster) {
  return div_up(blocks, 2 * cluster);
}
constexpr int clusters_of_many(int num_sms, int cluster) { return num_sms < cluster ? 1 : num_sms / cluster; }

int launch_row_linear_sm90(const RowLinearArgs& args, int tile_rows, bool many_rows, void* stream,
                           const DeviceInfo& device);
int launch_row_linear_sm90_coded(const RowLinearArgs& args, int tile_rows, bool many_rows, void* stream,
                                 const DeviceInfo& device);
int launch_row_linear_mma(const RowLinearArgs& args, int tile_rows, bool many_rows, void* stream,
                          const DeviceInfo& device);
int launch_row_linear_mma_coded(const RowLinearArgs& args, int tile_rows, bool many_rows, void* stream,
                                const DeviceInfo& device);

}  // namespace orthrus::cuda
