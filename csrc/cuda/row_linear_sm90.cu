// row_linear on Hopper: one warp streams weights through a ring of shared-memory stages with bulk
// copies, one or two warpgroups multiply them with wgmma as they land (features are M, tokens N).
//
// The ring is filled before waiting for the previous kernel (weights do not depend on it), and the
// next kernel is let in shortly before this one's last loads: the memory bus stays busy across
// kernel boundaries. That needs two CTAs to fit an SM, hence the shared-memory budget.
#include <cudaTypedefs.h>

#include "row_linear_finish.cuh"
#include "sm90.cuh"

namespace orthrus::cuda {
namespace {

constexpr int kMaxStages = 16;
constexpr int kSharedPerSm = 227 * 1024;

template <int kTokens>
__host__ __device__ constexpr int stage_bytes(int blocks) {
  return blocks * kBlockBytes + kTokens * kBlock * 2;
}

// Two of them overlap across kernel boundaries; wide tiles need the whole SM's registers.
constexpr int ctas_per_sm(int tokens, bool prefill) { return prefill || tokens > 64 ? 1 : 2; }

// Shared memory beside the stages: alignment slack, barriers, transposition buffers, argmax state.
constexpr int fixed_shared(int blocks, int tokens, bool argmax) {
  return 1024 + 2 * kMaxStages * 8 + 16 + blocks * kStagingFloats * 4 +
         (argmax ? blocks * tokens * static_cast<int>(sizeof(BestLogit)) : 0);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Ring {
  uint8_t* stages;
  uint64_t* full;
  uint64_t* empty;
  int num_stages;
  int stage_bytes;
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

// The sequence of units that a CTA streams, as producer and consumers both walk it.
template <int kTokens, bool kPrefill>
struct Walk {
  const RowLinearArgs& args;
  int begin, length;  // units of one row tile (decode), or k-blocks (prefill)

  __device__ explicit Walk(const RowLinearArgs& a) : args(a) {
    begin = kPrefill ? 0 : a.plan.range_begin(blockIdx.x);
    length = kPrefill ? a.plan.k_blocks : a.plan.range_begin(blockIdx.x + 1) - begin;
  }
  __device__ int items() const {
    if (!kPrefill) return args.row_tiles;
    const int all = (args.plan.blocks + 1) / 2 * args.row_tiles;
    return (all - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  }
  // Row tiles vary fastest, so that a weight is read from memory once.
  __device__ int row_tile(int item) const {
    return kPrefill ? (blockIdx.x + item * gridDim.x) % args.row_tiles : item;
  }
  __device__ int first_block(int item, int offset) const {
    return kPrefill ? (blockIdx.x + item * gridDim.x) / args.row_tiles * 2
                    : (begin + offset) / args.plan.k_blocks * args.plan.blocks_per_tile;
  }
  __device__ int k_block(int offset) const { return kPrefill ? offset : (begin + offset) % args.plan.k_blocks; }
};

template <int kTokens, bool kPrefill>
__device__ void produce(const RowLinearArgs& args, const CUtensorMap* x_map, const Ring& ring, int blocks) {
  using namespace sm90;
  const Walk<kTokens, kPrefill> walk(args);
  const int total = walk.items() * walk.length;
  const uint64_t policy = evict_first_policy();

  auto load_weight = [&](int step, int stage) {
    const int item = step / walk.length, offset = step % walk.length;
    const int first = walk.first_block(item, offset), kb = walk.k_block(offset);
    const int count = min(blocks, args.plan.blocks - first);
    const bool diff = args.is_diff(walk.row_tile(item));
    const uint8_t* weight = static_cast<const uint8_t*>(diff ? args.p.weight_diff : args.p.weight);
    uint8_t* dst = ring.stages + stage * ring.stage_bytes;
    barrier_arrive_expect(&ring.full[stage], stage_bytes<kTokens>(count));
    for (int b = 0; b < count; ++b) {
      const uint8_t* src = weight + (static_cast<int64_t>(first + b) * args.plan.k_blocks + kb) * kBlockBytes;
      if (kPrefill)
        bulk_load(dst + b * kBlockBytes, src, kBlockBytes, &ring.full[stage]);
      else
        bulk_load(dst + b * kBlockBytes, src, kBlockBytes, &ring.full[stage], policy);
    }
  };
  auto load_x = [&](int step, int stage) {
    const int item = step / walk.length, offset = step % walk.length;
    tensor_load(ring.stages + stage * ring.stage_bytes + blocks * kBlockBytes, x_map, walk.k_block(offset) * kBlock,
                args.row_begin(walk.row_tile(item), kTokens), &ring.full[stage]);
  };

  const int ahead = min(total, ring.num_stages);
  for (int step = 0; step < ahead; ++step) load_weight(step, step);
  if (total <= args.trigger_steps) launch_dependents();
  wait_previous_kernel();
  for (int step = 0; step < ahead; ++step) load_x(step, step);
  Cursor cursor;
  for (int step = ahead; step < total; ++step) {
    barrier_wait(&ring.empty[cursor.stage], cursor.parity);
    load_weight(step, cursor.stage);
    load_x(step, cursor.stage);
    if (step == total - args.trigger_steps) launch_dependents();
    cursor.advance(ring.num_stages);
  }
}

template <int kTokens>
__device__ __forceinline__ void multiply(float (&acc)[kTokens / 2], const uint8_t* weight, const uint8_t* x,
                                         bool accumulate) {
  using namespace sm90;
  const uint64_t a = matrix_descriptor(weight), b = matrix_descriptor(x);
#pragma unroll
  for (int k = 0; k < kBlock / 16; ++k) {
    const int add = accumulate || k > 0;
    if constexpr (kTokens == 160) {
      wgmma<128>(acc, a + k * kDescriptorStep16, b + k * kDescriptorStep16, add);
      wgmma<32>(acc + 64, a + k * kDescriptorStep16, b + k * kDescriptorStep16 + (128 * 128 >> 4), add);
    } else {
      wgmma<kTokens>(acc, a + k * kDescriptorStep16, b + k * kDescriptorStep16, add);
    }
  }
}

// acc = the sum over the next `length` stages, from zero.
template <int kTokens>
__device__ __forceinline__ void sum_segment(float (&acc)[kTokens / 2], const Ring& ring, Cursor& cursor, int length,
                                            int group, int blocks) {
  using namespace sm90;
  const bool releases = threadIdx.x % 32 == 0;
  int previous = 0;
  pin(acc);
#pragma unroll 1
  for (int i = 0; i < length; ++i) {
    barrier_wait(&ring.full[cursor.stage], cursor.parity);
    const uint8_t* stage = ring.stages + cursor.stage * ring.stage_bytes;
    wgmma_fence();
    multiply<kTokens>(acc, stage + group * kBlockBytes, stage + blocks * kBlockBytes, i > 0);
    wgmma_commit();
    if (i > 0) {
      wgmma_wait<1>();
      if (releases) barrier_arrive(&ring.empty[previous]);
    }
    previous = cursor.stage;
    cursor.advance(ring.num_stages);
  }
  wgmma_wait<0>();
  pin(acc);
  if (releases) barrier_arrive(&ring.empty[previous]);
}

__device__ __forceinline__ void consumers_sync(int blocks) {
  asm volatile("bar.sync 3, %0;" ::"r"(blocks * kGroupThreads) : "memory");
}

template <int kTokens>
__device__ void consume_decode(const RowLinearArgs& args, const Ring& ring, int group, float* staging, int32_t* flag,
                               BestLogit* best) {
  const RowLinearPlan& plan = args.plan;
  const Walk<kTokens, false> walk(args);
  const bool argmax = args.p.epilogue == static_cast<int>(Epilogue::kArgmax);
  Cursor cursor;
  float acc[kTokens / 2];
  for (int row_tile = 0; row_tile < args.row_tiles; ++row_tile) {
    const int row_begin = args.row_begin(row_tile, kTokens), row_end = args.row_end(row_tile);
    if (argmax) reset_best<kTokens>(args, best, group);
    for (int offset = 0; offset < walk.length;) {
      const int tile = (walk.begin + offset) / plan.k_blocks;
      const int kb = walk.k_block(offset);
      const int length = min(plan.k_blocks - kb, walk.length - offset);
      sum_segment<kTokens>(acc, ring, cursor, length, group, plan.blocks_per_tile);
      if (length == plan.k_blocks ||
          fold_partials<kTokens>(acc, args, args.is_diff(row_tile), tile, kb, group, flag))
        finish_block<kTokens>(acc, args, tile * plan.blocks_per_tile + group, row_begin, row_end, group, staging,
                              best + group * kTokens);
      offset += length;
    }
    if (argmax) {
      consumers_sync(plan.blocks_per_tile);
      write_best<kTokens>(args, best, row_begin, row_end);
      consumers_sync(plan.blocks_per_tile);
    }
  }
}

// Whole sums, folded in registers at the same cuts and in the same order as fold_partials does.
template <int kTokens>
__device__ void consume_prefill(const RowLinearArgs& args, const Ring& ring, int group, float* staging) {
  const RowLinearPlan& plan = args.plan;
  const Walk<kTokens, true> walk(args);
  Cursor cursor;
  float acc[kTokens / 2], sum[kTokens / 2];
  for (int item = 0, items = walk.items(); item < items; ++item) {
    const int block = walk.first_block(item, 0) + group;
    const int tile = min(block, plan.blocks - 1) / plan.blocks_per_tile;
    for (int kb = 0; kb < plan.k_blocks;) {
      const int end = plan.segment_end(tile, kb);
      sum_segment<kTokens>(acc, ring, cursor, end - kb, group, 2);
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sum[i] = kb == 0 ? acc[i] : sum[i] + acc[i];
      kb = end;
    }
    const int row_tile = walk.row_tile(item);
    if (block < plan.blocks)
      finish_block<kTokens>(sum, args, block, args.row_begin(row_tile, kTokens), args.row_end(row_tile), group,
                            staging, nullptr);
  }
}
#endif

template <int kTokens, bool kPrefill>
__global__ void __launch_bounds__(2 * kGroupThreads + 32, ctas_per_sm(kTokens, kPrefill))
    row_linear_sm90(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ RowLinearArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared[];
  const int blocks = kPrefill ? 2 : args.plan.blocks_per_tile;
  Ring ring;
  ring.stages = shared + (-sm90::smem_address(shared) & 1023);
  ring.num_stages = args.num_stages;
  ring.stage_bytes = stage_bytes<kTokens>(blocks);
  float* staging = reinterpret_cast<float*>(ring.stages + ring.num_stages * ring.stage_bytes);
  ring.full = reinterpret_cast<uint64_t*>(staging + blocks * kStagingFloats);
  ring.empty = ring.full + kMaxStages;
  int32_t* flags = reinterpret_cast<int32_t*>(ring.empty + kMaxStages);
  BestLogit* best = reinterpret_cast<BestLogit*>(flags + 4);

  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < ring.num_stages; ++s) {
      sm90::barrier_init(&ring.full[s], 1);
      sm90::barrier_init(&ring.empty[s], 4 * blocks);  // one arrival per consumer warp
    }
    sm90::fence_barrier_init();
  }
  __syncthreads();
  if (warp == 4 * blocks) {
    if (threadIdx.x % 32 == 0) {
      sm90::prefetch_map(&x_map);
      produce<kTokens, kPrefill>(args, &x_map, ring, blocks);
    }
    return;
  }
  sm90::wait_previous_kernel();
  const int group = warp / 4;
  if constexpr (kPrefill)
    consume_prefill<kTokens>(args, ring, group, staging + group * kStagingFloats);
  else
    consume_decode<kTokens>(args, ring, group, staging + group * kStagingFloats, flags + group, best);
#else
  __trap();  // never launched: row_linear.cu sends other architectures to the mma variant
#endif
}

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encode;
}

bool encode_x(CUtensorMap* map, const RowLinearParams& p, int tokens) {
  const auto encode = tensor_map_encoder();
  if (!encode) return false;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(p.in_features), static_cast<cuuint64_t>(p.num_rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(p.x_stride) * 2};
  const cuuint32_t box[2] = {kBlock, static_cast<cuuint32_t>(tokens)};
  const cuuint32_t step[2] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<bf16_t*>(p.x), size, stride, box, step,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int kTokens, bool kPrefill>
cudaError_t launch(RowLinearArgs args, cudaStream_t stream) {
  const int blocks = kPrefill ? 2 : args.plan.blocks_per_tile;
  const bool argmax = args.p.epilogue == static_cast<int>(Epilogue::kArgmax);
  const int fixed = fixed_shared(blocks, kTokens, argmax);
  const int ctas = ctas_per_sm(kTokens, kPrefill);
  const int budget = kSharedPerSm / ctas - (ctas - 1) * 1024;
  args.num_stages = min((budget - fixed) / stage_bytes<kTokens>(blocks), kMaxStages);
  args.trigger_steps = args.num_stages;
  const int shared = fixed + args.num_stages * stage_bytes<kTokens>(blocks);

  CUtensorMap x_map;
  if (!encode_x(&x_map, args.p, kTokens)) return cudaErrorInvalidValue;
  const auto kernel = row_linear_sm90<kTokens, kPrefill>;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  // The same carve-out in every variant: a change of it would keep neighbours from sharing an SM.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                     cudaSharedmemCarveoutMaxShared))
    return error;

  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = args.plan.grid;
  if (kPrefill) config.gridDim = min(args.num_sms, (args.plan.blocks + 1) / 2 * args.row_tiles);
  config.blockDim = blocks * kGroupThreads + 32;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, x_map, static_cast<const RowLinearArgs>(args));
}

}  // namespace

cudaError_t launch_row_linear_sm90(const RowLinearArgs& args, int tokens, bool prefill, cudaStream_t stream) {
  if (prefill) return launch<kTokensSm90.prefill, true>(args, stream);
  switch (tokens) {
    case 16: return launch<16, false>(args, stream);
    case 32: return launch<32, false>(args, stream);
    case 64: return launch<64, false>(args, stream);
    case 128: return launch<128, false>(args, stream);
    default: return launch<kTokensSm90.widest, false>(args, stream);
  }
}

}  // namespace orthrus::cuda
