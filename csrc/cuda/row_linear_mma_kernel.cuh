// row_linear on any device from sm_80 on: cp.async into a ring of shared-memory stages, ldmatrix, mma.sync m16n8k16
// (features are M, rows N). A group's four warps own 16 features each, which gives every thread the same accumulators
// as the wgmma variant, so that fold and epilogues are shared. Coded weights are unpacked to the registers into which
// ldmatrix loads plain ones, with the same bits.
#pragma once
#include "coded_block.cuh"
#include "orthrus/launch.cuh"
#include "row_linear_finish.cuh"

namespace orthrus::cuda {

constexpr int kSharedBudget = 99 * 1024;  // what every device from sm_80 on grants a CTA
constexpr int kMaxMmaStages = 6;

// Byte offset of the 16-byte chunk (row, chunk) in a [rows, 64] bf16 matrix, for W as packed and for x.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// The loads of one CTA: unit after unit of its range (few rows) or of whole tiles (many rows).
template <int kTileRows, bool kManyRows, int kBlocks, bool kCoded>
struct Stream {
  static constexpr int kThreads = kBlocks * kGroupThreads;
  static constexpr int kWeightBytes = packed_bytes(kCoded);
  static constexpr int kStageBytes = kBlocks * kWeightBytes + kTileRows * kBlock * 2;
  static constexpr int kFixedBytes =
      kBlocks * (kStagingFloats * 4 + 4) + (kManyRows ? 0 : kBlocks * kTileRows * static_cast<int>(sizeof(Best)));
  static constexpr int kFit = (kSharedBudget - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFit < kMaxMmaStages ? kFit : kMaxMmaStages;

  const RowLinearArgs& args;
  uint8_t* stages;
  int first_block, row_begin, row_end;
  bool diff;
  int load_stage = 0, read_stage = 0;

  __device__ void load(int kb) {
    const RowLinearParams& p = args.p;
    const SharedAddress base = shared_address(stages + load_stage * kStageBytes);
    const uint8_t* weight = static_cast<const uint8_t*>(args.weight_of(diff));
    const BlockBytes bytes = kCoded ? args.block_bytes_of(diff) : kPlainBlocks;
    constexpr int chunks = kBlocks * kWeightBytes / 16;
#pragma unroll
    for (int i = 0; i < div_up(chunks, kThreads); ++i) {
      const int chunk = threadIdx.x + i * kThreads;
      if ((i + 1) * kThreads > chunks && chunk >= chunks) break;
      const int block = first_block + chunk / (kWeightBytes / 16), from = chunk % (kWeightBytes / 16) * 16;
      if (kCoded && from >= bytes.read) continue;
      const int64_t unit = static_cast<int64_t>(block) * args.plan.k_blocks + kb;
      copy16(base + chunk * 16, weight + unit * bytes.stored + from, true);
    }
    const SharedAddress x_base = base + kBlocks * kWeightBytes;
#pragma unroll
    for (int i = 0; i < div_up(kTileRows * 8, kThreads); ++i) {
      const int chunk = threadIdx.x + i * kThreads;
      if ((i + 1) * kThreads > kTileRows * 8 && chunk >= kTileRows * 8) break;
      const int row = row_begin + chunk / 8;
      const bool valid = row < row_end;
      copy16(x_base + swizzled(chunk / 8, chunk % 8),
             p.x + (valid ? static_cast<int64_t>(row) * p.in_features : 0) + kb * kBlock + chunk % 8 * 8, valid);
    }
    load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
  }

  __device__ void multiply(float (&acc)[kTileRows / 2]) {
    const int thread = threadIdx.x % kGroupThreads, lane = thread % 32;
    const uint8_t* weight = stages + read_stage * kStageBytes + threadIdx.x / kGroupThreads * kWeightBytes;
    const SharedAddress x = shared_address(stages + read_stage * kStageBytes + kBlocks * kWeightBytes);
    const int feature = thread / 32 * 16 + lane % 16;
    const int tile_row = lane % 8 + lane / 16 * 8;
    const CodedBlock& block = *reinterpret_cast<const CodedBlock*>(weight);
    uint32_t a[kBlock / 16][4];
    if constexpr (kCoded)
      decode(a, load_part(block, args.leading_only(diff)), block, args.weight_of(diff));
#pragma unroll
    for (int k = 0; k < kBlock / 16; ++k) {
      if constexpr (!kCoded) load_matrices(a[k], shared_address(weight) + swizzled(feature, 2 * k + lane / 16));
#pragma unroll
      for (int t = 0; t < kTileRows / 16; ++t) {
        uint32_t b[4];
        load_matrices(b, x + swizzled(16 * t + tile_row, 2 * k + lane / 8 % 2));
        mma(acc + 8 * t, a[k], b[0], b[1]);
        mma(acc + 8 * t + 4, a[k], b[2], b[3]);
      }
    }
    read_stage = read_stage + 1 == kStages ? 0 : read_stage + 1;
  }

  // Starts the first loads of a segment, k-blocks [begin, end) of first_block.
  __device__ void start(int begin, int end) {
    __syncthreads();  // the previous segment's stages have been read
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (begin + s < end) load(begin + s);
      copy_commit();
    }
  }
  // acc = the sum over the started segment, from zero.
  __device__ void sum_segment(float (&acc)[kTileRows / 2], int begin, int end) {
#pragma unroll
    for (int i = 0; i < kTileRows / 2; ++i) acc[i] = 0.0f;
    for (int kb = begin; kb < end; ++kb) {
      copy_wait<kStages - 2>();
      __syncthreads();
      if (kb + kStages - 1 < end) load(kb + kStages - 1);
      copy_commit();
      multiply(acc);
    }
  }
};

template <int kTileRows, bool kManyRows, int kBlocks, bool kCoded>
__global__ void __launch_bounds__(kBlocks * kGroupThreads, 1)
    row_linear_mma(const __grid_constant__ RowLinearArgs args) {
  pdl_wait();
  pdl_launch_dependents();
  using S = Stream<kTileRows, kManyRows, kBlocks, kCoded>;
  uint8_t* shared = dynamic_shared();
  const RowLinearPlan& plan = args.plan;
  const int group = threadIdx.x / kGroupThreads;
  float* staging = reinterpret_cast<float*>(shared + S::kStages * S::kStageBytes);
  int32_t* flags = reinterpret_cast<int32_t*>(staging + kBlocks * kStagingFloats);
  Best* best = reinterpret_cast<Best*>(flags + kBlocks);
  staging += group * kStagingFloats;
  S stream{args, shared, 0, 0, 0, false};
  float acc[kTileRows / 2];

  auto enter = [&](int row_tile) {
    stream.diff = args.is_diff(row_tile);
    stream.row_begin = args.row_begin(row_tile, kTileRows);
    stream.row_end = args.row_end(row_tile);
  };
  if constexpr (kManyRows) {
    float sum[kTileRows / 2];
    const int items = plan.tiles * args.row_tiles;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      enter(item % args.row_tiles);
      const int tile = item / args.row_tiles;
      stream.first_block = tile * kBlocks;
      for (int kb = 0; kb < plan.k_blocks;) {
        const int end = plan.segment_end(tile, kb);
        stream.start(kb, end);
        stream.sum_segment(acc, kb, end);
#pragma unroll
        for (int i = 0; i < kTileRows / 2; ++i) sum[i] = kb == 0 ? acc[i] : sum[i] + acc[i];
        kb = end;
      }
      finish_block<kTileRows>(WholeSums<kTileRows>{sum}, args, stream.first_block + group, stream.row_begin,
                              stream.row_end, group, staging, nullptr);
    }
  } else {
    const bool argmax = args.p.epilogue == Epilogue::kArgmax;
    const int begin = plan.range_begin(blockIdx.x), range_end = plan.range_begin(blockIdx.x + 1);
    for (int row_tile = 0; row_tile < args.row_tiles; ++row_tile) {
      enter(row_tile);
      if (argmax) reset_best<kTileRows>(args, best, group);
      auto enter_segment = [&](int unit) {
        const int kb = unit % plan.k_blocks, end = kb + min(plan.k_blocks - kb, range_end - unit);
        stream.first_block = unit / plan.k_blocks * kBlocks;
        stream.start(kb, end);
      };
      enter_segment(begin);
      for (int unit = begin; unit < range_end;) {
        const int tile = unit / plan.k_blocks, kb = unit % plan.k_blocks;
        const int end = kb + min(plan.k_blocks - kb, range_end - unit);
        stream.sum_segment(acc, kb, end);
        unit += end - kb;
        if (unit < range_end) enter_segment(unit);  // they come while this one is finished
        const int rows = stream.row_end - stream.row_begin;
        auto finish = [&](auto sums) {
          finish_block<kTileRows>(sums, args, tile * kBlocks + group, stream.row_begin, stream.row_end, group,
                                staging, best + group * kTileRows);
        };
        RowLinearPlan::Sharers sharers;
        if (end - kb == plan.k_blocks)
          finish(WholeSums<kTileRows>{acc});
        else if (leave_partial<kTileRows>(acc, args, stream.diff, tile, kb, rows, group, flags + group, sharers))
          finish(FoldedSums<kTileRows>(args, stream.diff, sharers, group));
      }
      if (argmax) {
        __syncthreads();
        write_best<kTileRows>(args, best, stream.row_begin, stream.row_end);
        __syncthreads();
      }
    }
  }
}

template <int kTileRows, bool kManyRows, int kBlocks, bool kCoded>
int launch_variant(const RowLinearArgs& args, void* stream, const DeviceInfo& device) {
  using S = Stream<kTileRows, kManyRows, kBlocks, kCoded>;
  static_assert(S::kStages >= 3);
  constexpr int kShared = S::kStages * S::kStageBytes + S::kFixedBytes;
  const int items = args.plan.tiles * args.row_tiles;
  const int grid = kManyRows ? (items < device.num_sms ? items : device.num_sms) : args.plan.grid;
  const auto kernel = row_linear_mma<kTileRows, kManyRows, kBlocks, kCoded>;
  return launch(kernel, args, grid, S::kThreads, kShared, stream, device);
}

template <int kBlocks, bool kCoded>
int launch_tile_rows(const RowLinearArgs& args, int tile_rows, bool many_rows, void* stream, const DeviceInfo& device) {
  if (many_rows) return launch_variant<kRowTilesMma.many_rows[0], true, kBlocks, kCoded>(args, stream, device);
  switch (tile_rows) {
    case 16: return launch_variant<16, false, kBlocks, kCoded>(args, stream, device);
    case 32: return launch_variant<32, false, kBlocks, kCoded>(args, stream, device);
    case 64: return launch_variant<64, false, kBlocks, kCoded>(args, stream, device);
    default: return launch_variant<kRowTilesMma.widest, false, kBlocks, kCoded>(args, stream, device);
  }
}

template <bool kCoded>
int launch_mma(const RowLinearArgs& args, int tile_rows, bool many_rows, void* stream, const DeviceInfo& device) {
  const auto launch_blocks = args.plan.blocks_per_tile == 2 ? launch_tile_rows<2, kCoded> : launch_tile_rows<1, kCoded>;
  return launch_blocks(args, tile_rows, many_rows, stream, device);
}

}  // namespace orthrus::cuda
