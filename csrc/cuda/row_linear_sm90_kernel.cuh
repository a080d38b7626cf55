// row_linear on Hopper: one warp streams weights through a ring of shared-memory stages with bulk copies, and one or
// two warpgroups multiply them with wgmma as they arrive (features are M, rows N). wgmma reads plain weights from
// shared memory itself; coded ones are first unpacked into registers. The bits are the same.
//
// With many rows, the two CTAs of a cluster load x together: each loads half of it for both. A stage is free when the
// consumers of both have released it.
//
// The ring is filled, and some more is prefetched into L2, before waiting for the previous kernel (weights do not
// depend on it). The next kernel may start with this one's last load, not sooner, lest its loads hold up ours: the
// memory bus stays busy across kernel boundaries. Small kernels in between let their successor start at once. All this
// needs two CTAs, and one of a small kernel, to fit on an SM, hence the budgets of shared memory and registers.
#pragma once
#include "coded_block.cuh"
#include "row_linear_sm90_producer.cuh"

namespace orthrus::cuda {

constexpr int kSharedPerSm = 228 * 1024;
constexpr int kSharedOfCta = 1024;    // reserved by the system
constexpr int kSharedOfOthers = 2048;  // for a small kernel's CTA, including its kSharedOfCta

struct Sm90Params {
  sm90::TensorMap x_map[2];  // of each view; nothing beyond its rows is read
  RowLinearArgs args;
};

// Two of them overlap across kernel boundaries, with a norm's CTA in between. The sums of wider tiles leave no
// registers for that, nor do those of 96 rows together with a coded block. Tiles of 112 rows, for six blocks of 16
// beside the AR rows, are a compromise: two fit if the warps of the second begin at the next quarter of the SM's
// registers (gate_up, down); one of them and one of 96 rows (`o`, qkv) leave room for a norm of 2,048 features, but not
// of 4,096.
__host__ __device__ constexpr int ctas_per_sm(int tile_rows, bool many_rows, bool coded) {
  return many_rows || tile_rows > (coded ? 64 : 112) ? 1 : 2;
}

// The bound on threads by which a kernel's registers are limited. Few rows use up to 288 threads: where two CTAs share
// an SM, the norm has the rest. 320 make it 96 registers, at which five warps fit a quarter of the SM's.
__host__ __device__ constexpr int threads_bound(int tile_rows, bool many_rows, bool coded) {
  return tile_rows == 112 && !many_rows && !coded ? 320 : 3 * kGroupThreads;
}

// One thread produces. With many rows it has a warpgroup, as only those can hand registers to the two sets of sums.
constexpr int producer_threads(bool many_rows) { return many_rows ? kGroupThreads : 32; }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kTileRows>
__device__ __forceinline__ void multiply(float (&acc)[kTileRows / 2], const uint8_t* weight, const uint8_t* x,
                                         bool accumulate) {
  using namespace sm90;
  const uint64_t a = matrix_descriptor(weight), b = matrix_descriptor(x);
#pragma unroll
  for (int k = 0; k < kBlock / 16; ++k) {
    const uint64_t step = descriptor_offset(k * 16 * 2);  // along K, inside the swizzled 128 bytes
    wgmma<kTileRows>(acc, a + step, b + step, accumulate || k > 0);
  }
}

// Reports that a warp of consumers has read the stage, to all CTAs that load into it.
template <bool kManyRows, int kTileRows, bool kCoded>
__device__ __forceinline__ void release(const Ring<kTileRows, kCoded>& ring, int stage) {
  constexpr int kCtas = cluster_ctas(kManyRows);
  const int lane = threadIdx.x % 32;
  if (lane >= kCtas) return;
  if constexpr (kCtas == 1)
    sm90::barrier_arrive(ring.empty(stage));
  else
    sm90::barrier_arrive_at(ring.empty(stage), lane);
}

// acc = the sum over the next `length` stages, from zero. With many rows, which is more arithmetic, the next stage's
// products begin before this one is released; with few, a stage is assumed to be worth more as room for the next load
// (not measured). With many rows acc must have been initialised, and meanwhile() is called during the last products.
template <int kTileRows, bool kManyRows, typename Meanwhile>
__device__ __forceinline__ void sum_segment(float (&acc)[kTileRows / 2], const Ring<kTileRows, false>& ring,
                                            Cursor& cursor, int length, int group, const RowLinearArgs&, bool, bool,
                                            const Meanwhile& meanwhile) {
  using namespace sm90;
  int previous = 0;
  if constexpr (!kManyRows) {
#pragma unroll
    for (int i = 0; i < kTileRows / 2; ++i) acc[i] = 0.0f;  // until here the registers are free
  }
  pin(acc);
#pragma unroll 1
  for (int i = 0; i < length; ++i) {
    barrier_wait(ring.full(cursor.stage), cursor.parity);
    wgmma_fence();
    multiply<kTileRows>(acc, ring.weight(cursor.stage, group), ring.x(cursor.stage), i > 0);
    wgmma_commit();
    if (!kManyRows || i > 0) {
      wgmma_wait<kManyRows>();
      release<kManyRows>(ring, kManyRows ? previous : cursor.stage);
    }
    previous = cursor.stage;
    cursor.advance(ring.num_stages);
  }
  if (kManyRows) {
    meanwhile();
    wgmma_wait<0>();
    release<kManyRows>(ring, previous);
  }
  pin(acc);
}

// The same over coded weights. The next stage's codes are loaded into registers during this one's products, before this
// one is released: in a CTA of one group nothing else would hide that load, and this is worth a stage. `exists`:
// the group has a block; otherwise its sums are undefined.
template <int kTileRows, bool kManyRows, typename Meanwhile>
__device__ __forceinline__ void sum_segment(float (&acc)[kTileRows / 2], const Ring<kTileRows, true>& ring,
                                            Cursor& cursor, int length, int group, const RowLinearArgs& args,
                                            bool diff, bool exists, const Meanwhile& meanwhile) {
  using namespace sm90;
  const auto block = [&] { return reinterpret_cast<const CodedBlock*>(ring.weight(cursor.stage, group)); };
  CodedPart part{};
  const auto load = [&] {
    barrier_wait(ring.full(cursor.stage), cursor.parity);
    if (exists) part = load_part(*block(), args.leading_only(diff));
  };
  if constexpr (!kManyRows) {
#pragma unroll
    for (int i = 0; i < kTileRows / 2; ++i) acc[i] = 0.0f;
  }
  pin(acc);
  load();
#pragma unroll 1
  for (int i = 0; i < length; ++i) {
    const uint64_t b = matrix_descriptor(ring.x(cursor.stage));
    uint32_t a[kBlock / 16][4];
    decode(a, part, *block(), args.weight_of(diff));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlock / 16; ++k)
      wgmma<kTileRows>(acc, a[k], b + descriptor_offset(k * 16 * 2), i > 0 || k > 0);
    wgmma_commit();
    const int stage = cursor.stage;
    cursor.advance(ring.num_stages);
    if (i + 1 < length)
      load();
    else
      meanwhile();
    wgmma_wait<0>();
    fence_proxy_async_shared();
    __syncwarp();  // every lane has read its part of the block
    release<kManyRows>(ring, stage);
  }
  pin(acc);
}

__device__ __forceinline__ void consumers_sync(int blocks) { named_barrier(3, blocks * kGroupThreads); }

template <int kTileRows, bool kCoded>
__device__ void consume_few_rows(const RowLinearArgs& args, const Ring<kTileRows, kCoded>& ring, int group) {
  Shared& shared = ring.shared;
  const RowLinearPlan& plan = args.plan;
  const Walk<false> walk(args);
  const bool argmax = args.p.epilogue == Epilogue::kArgmax;
  Cursor cursor;
  float acc[kTileRows / 2];
  for (int row_tile = 0; row_tile < args.row_tiles; ++row_tile) {
    const int row_begin = args.row_begin(row_tile, kTileRows), row_end = args.row_end(row_tile);
    if (argmax) reset_best<kTileRows>(args, ring.best(), group);
    for (int offset = 0; offset < walk.length;) {
      const int tile = (walk.begin + offset) / plan.k_blocks;
      const int kb = (walk.begin + offset) % plan.k_blocks;
      const int length = min(plan.k_blocks - kb, walk.length - offset);
      const bool diff = args.is_diff(row_tile);
      sum_segment<kTileRows, false>(acc, ring, cursor, length, group, args, diff, true, [] {});
      const int rows = row_end - row_begin;
      auto finish = [&](auto sums) {
        finish_block<kTileRows>(sums, args, tile * plan.blocks_per_tile + group, row_begin, row_end, group,
                              shared.staging[group], ring.best() + group * kTileRows);
      };
      RowLinearPlan::Sharers sharers;
      if (kTileRows > kRowTilesSm90.widest || length == plan.k_blocks)  // only kArgmax has tiles this wide, never cut
        finish(WholeSums<kTileRows>{acc});
      else if (leave_partial<kTileRows>(acc, args, diff, tile, kb, rows, group, shared.flags + group, sharers))
        finish(FoldedSums<kTileRows>(args, diff, sharers, group));
      offset += length;
    }
    if (argmax) {
      consumers_sync(plan.blocks_per_tile);
      write_best<kTileRows>(args, ring.best(), row_begin, row_end);
      consumers_sync(plan.blocks_per_tile);
    }
  }
}

// Whole sums, folded in registers at the same cuts and in the same order as FoldedSums.
template <int kTileRows, bool kCoded>
__device__ void consume_many_rows(const RowLinearArgs& args, const Ring<kTileRows, kCoded>& ring, int group) {
  const RowLinearPlan& plan = args.plan;
  const Walk<true> walk(args);
  Cursor cursor;
  float acc[kTileRows / 2], sum[kTileRows / 2];
  for (int item = 0, items = walk.items(); item < items; ++item) {
    const int block = walk.first_block(item) + group;
    const int tile = min(block, plan.blocks - 1) / plan.blocks_per_tile, row_tile = walk.row_tile(item);
    const bool exists = block < plan.blocks;
#pragma unroll
    for (int i = 0; i < kTileRows / 2; ++i) {
      acc[i] = 0.0f;   // until here the registers are free
      sum[i] = -0.0f;  // changes no bit of what is added to it
    }
    for (int kb = 0, end = plan.segment_end(tile, 0); kb < plan.k_blocks;) {
      int next = end;
      sum_segment<kTileRows, true>(acc, ring, cursor, end - kb, group, args, args.is_diff(row_tile), exists, [&] {
        if (end < plan.k_blocks) next = plan.segment_end(tile, end);
      });
#pragma unroll
      for (int i = 0; i < kTileRows / 2; ++i) sum[i] += acc[i];
      kb = end;
      end = next;
    }
    if (exists)
      finish_block<kTileRows>(WholeSums<kTileRows, kManyStagingRows>{sum}, args, block,
                              args.row_begin(row_tile, kTileRows), args.row_end(row_tile), group, ring.staging(group),
                              nullptr);
  }
}
#endif

template <int kTileRows, bool kManyRows, bool kCoded>
__global__ void
__launch_bounds__(threads_bound(kTileRows, kManyRows, kCoded), ctas_per_sm(kTileRows, kManyRows, kCoded))
    row_linear_sm90(const __grid_constant__ Sm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kCtas = cluster_ctas(kManyRows);
  const RowLinearArgs& args = params.args;
  const int blocks = kManyRows ? 2 : args.plan.blocks_per_tile;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const Ring<kTileRows, kCoded> ring{shared, args.num_stages, blocks};

  const int thread = threadIdx.x;
  const int group = __shfl_sync(~0u, thread / kGroupThreads, 0);  // shows the compiler that a warp has one role
  if (thread == 0) {  // more lanes would be serialised
    for (int s = 0; s < ring.num_stages; ++s) {
      sm90::barrier_init(ring.full(s), 1);
      sm90::barrier_init(ring.empty(s), 4 * blocks * kCtas);  // one arrival per consumer warp
    }
    sm90::fence_barrier_init();
  }
  if constexpr (kCtas == 1)
    __syncthreads();
  else
    sm90::cluster_sync_relaxed();
  if (group == blocks) {
    if constexpr (kManyRows) sm90::give_registers<40>();
    if (__shfl_sync(~0u, thread / 32, 0) == blocks * kGroupThreads / 32 && sm90::elect_one()) {
      sm90::prefetch_map(params.x_map);
      sm90::prefetch_map(params.x_map + 1);
      produce<kTileRows, kManyRows>(args, params.x_map, ring);
    }
    __syncwarp();  // else the idle lanes may wait first and hold up the lane that runs ahead of the previous kernel
    pdl_wait();
    return;
  }
  pdl_wait();
  if constexpr (kManyRows) {
    sm90::take_registers<232>();
    consume_many_rows(args, ring, group);
  } else {
    consume_few_rows(args, ring, group);
  }
#else
  __trap();  // never launched: row_linear.cu sends other architectures to the mma variant
#endif
}

template <int kTileRows, bool kManyRows, bool kCoded>
int launch_variant(const RowLinearArgs& plain, void* stream, const DeviceInfo& device) {
  Sm90Params params{{}, plain};
  RowLinearArgs& args = params.args;
  constexpr int kCtas = cluster_ctas(kManyRows);
  for (int view = 0; view < 2; ++view) {
    const int rows = view ? args.p.num_rows : max(args.p.num_rows_ar, 1);
    if (const cudaError_t error =
            sm90::make_row_map(&params.x_map[view], args.p.x, rows, args.p.in_features, kTileRows / kCtas))
      return error;
  }
  const int blocks = kManyRows ? 2 : args.plan.blocks_per_tile;
  constexpr int ctas = ctas_per_sm(kTileRows, kManyRows, kCoded);
  constexpr int room = (kSharedPerSm - (ctas == 1 ? 0 : kSharedOfOthers)) / ctas - kSharedOfCta - sizeof(Shared);
  static_assert((room - (kManyRows ? 2 * kManyStagingBytes : 0)) / stage_bytes<kTileRows, kCoded>(2) >= 3);
  const bool argmax = args.p.epilogue == Epilogue::kArgmax;
  const int behind = kManyRows ? 2 * kManyStagingBytes : argmax ? blocks * kTileRows * int{sizeof(Best)} : 0;
  args.num_stages = min((room - behind) / stage_bytes<kTileRows, kCoded>(blocks), kMaxSm90Stages);
  const int shared = sizeof(Shared) + args.num_stages * stage_bytes<kTileRows, kCoded>(blocks) + behind;

  const auto kernel = row_linear_sm90<kTileRows, kManyRows, kCoded>;
  int grid = args.plan.grid;
  if (kManyRows)
    grid = kCtas * min(clusters_of_many(device.num_sms, kCtas),
                       items_of_many(args.plan.blocks, kCtas) * args.row_tiles);
  const int threads = blocks * kGroupThreads + producer_threads(kManyRows);
  return launch(kernel, params, grid, threads, shared, stream, device, kCtas);
}

template <bool kCoded>
int launch_sm90(const RowLinearArgs& args, int tile_rows, bool many_rows, void* stream, const DeviceInfo& device) {
  if (many_rows) {
    constexpr RowTiles tiles = kCoded ? kRowTilesSm90Coded : kRowTilesSm90;
    const bool first = tile_rows == tiles.many_rows[0];
    return first ? launch_variant<tiles.many_rows[0], true, kCoded>(args, stream, device)
                 : launch_variant<tiles.many_rows[1], true, kCoded>(args, stream, device);
  }
  if constexpr (!kCoded)
    if (tile_rows == kRowTilesSm90.widest_argmax)
      return launch_variant<kRowTilesSm90.widest_argmax, false, kCoded>(args, stream, device);
  switch (tile_rows) {
    case 16: return launch_variant<16, false, kCoded>(args, stream, device);
    case 32: return launch_variant<32, false, kCoded>(args, stream, device);
    case 64: return launch_variant<64, false, kCoded>(args, stream, device);
    case 96: return launch_variant<96, false, kCoded>(args, stream, device);
    case 112: return launch_variant<112, false, kCoded>(args, stream, device);
    case 128: return launch_variant<128, false, kCoded>(args, stream, device);
    default: return launch_variant<kRowTilesSm90.widest, false, kCoded>(args, stream, device);
  }
}

}  // namespace orthrus::cuda
