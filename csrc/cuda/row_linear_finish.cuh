// What follows a tile's sum, shared by both instruction variants: folding the partial sums of a cut
// tile in k order, and the epilogues.
//
// A *group* is the 128 threads that own one 64-feature block. Thread t holds, for every eight rows
// j = row / 8, acc[4j + {0,1}] = feature f, rows 8j + 2*(t%4) + {0,1} and acc[4j + {2,3}] =
// feature f + 8, f = 16*(t/32) + (t%32)/4: the accumulator layout of wgmma m64nN and of four warps
// of mma.m16n8k16 alike.
#pragma once
#include "best.cuh"
#include "row_linear_plan.h"

namespace orthrus::cuda {

// A barrier number that the compiler does not know reserves all 16 of a CTA, out of the 64 of a Hopper SM: enough for
// two CTAs and a norm's. Known numbers reserve 4, but make the compiler spill registers in two of the wgmma variants.
__device__ __forceinline__ void group_sync(int group) { named_barrier(group + 1, kGroupThreads); }

// A CTA's partial sum of a cut tile: the one inside which its range starts, or the one inside which it `ends`.
template <int kTileRows>
__device__ float4* partial_sum(const RowLinearArgs& args, int view, int group, bool ends, int cta) {
  float* workspace = static_cast<float*>(args.p.workspace);
  return reinterpret_cast<float4*>(workspace + partial_offset(args.plan, view, group, ends, cta, kTileRows)) +
         threadIdx.x % kGroupThreads;
}

// Stores this CTA's partial sum of a cut tile, of its first `rows` rows, and returns which CTAs share the tile. True in
// the group that arrives last: it finishes the tile, and no CTA waits for another.
template <int kTileRows>
__device__ bool leave_partial(const float (&acc)[kTileRows / 2], const RowLinearArgs& args, int view, int tile,
                              int kb_begin, int rows, int group, int32_t* flag,
                              RowLinearPlan::Sharers& sharers) {
  const RowLinearPlan& plan = args.plan;
  float4* mine = partial_sum<kTileRows>(args, view, group, kb_begin == 0, blockIdx.x);
#pragma unroll
  for (int j = 0; j < kTileRows / 8; ++j)
    if (8 * j < rows)
      __stcg(mine + j * kGroupThreads, make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]));

  sharers = plan.sharers(tile);  // ahead of the counter, which all wait for
  group_sync(group);
  if (threadIdx.x % kGroupThreads == 0) {
    int32_t* counter = static_cast<int32_t*>(args.p.workspace) +
                       (view * plan.tiles + tile) * plan.blocks_per_tile + group;
    const bool is_last = add_acq_rel(counter, 1) == sharers.count - 1;
    if (is_last) *counter = 0;  // as the next launch expects it
    *flag = is_last;
  }
  group_sync(group);
  return *flag;
}

// An epilogue gets a tile's sums from a class, WholeSums or FoldedSums, which loads the sums of a step of kStepRows
// rows ahead and later stages them, each thread its own.

// `s` points to the thread's first row and, by staged_at(), to its first feature, one of the lower 8 of a warp's 16.
// The thread's other feature, 8 further, is also 8 floats further.
__device__ __forceinline__ void stage_pairs(float* s, float a, float b, float c, float d) {
  s[0] = a;
  s[kStagingStride] = b;
  s[8] = c;
  s[kStagingStride + 8] = d;
}

// For a tile that was not cut: a thread's own accumulators, kStepRows rows a step.
template <int kTileRows, int kStepRows_ = kStagingRows>
struct WholeSums {
  static constexpr int kStepRows = kStepRows_;
  static_assert(kTileRows % kStepRows == 0);
  const float (&acc)[kTileRows / 2];

  __device__ void load_ahead(int) {}
  // Registers have constant names, so each step gets a branch: otherwise all steps' stores would be issued, predicated.
  template <int kStep = 0>
  __device__ void stage(int t0, float* s) const {
    if (t0 == kStep) {
#pragma unroll
      for (int j = 0; j < kStepRows / 8; ++j) {
        const float* sums = acc + (kStep + 8 * j) / 2;
        stage_pairs(s + 8 * j * kStagingStride, sums[0], sums[1], sums[2], sums[3]);
      }
    } else if constexpr (kStep + kStepRows < kTileRows) {
      stage<kStep + kStepRows>(t0, s);
    }
  }
};

// For a cut tile: the partial sums, folded in k order. They are loaded from L2 while the previous step is finished, all
// of a step at once: a branch around a load would make the next one wait for it.
template <int kTileRows>
struct FoldedSums {
  static constexpr int kStepRows = kStagingRows;
  static constexpr int kAhead = 5;  // most CTAs that share a tile, in nearly all weights of nearly all models
  const float4 *begin, *rest;       // begin: of the first CTA, which ends inside the tile; rest: as if it began there
  int count;
  float4 v[kAhead][2] = {};

  __device__ FoldedSums(const RowLinearArgs& args, int view, const RowLinearPlan::Sharers& sharers, int group)
      : begin(partial_sum<kTileRows>(args, view, group, true, sharers.first)),
        rest(partial_sum<kTileRows>(args, view, group, false, sharers.first)),
        count(sharers.count) {}
  template <bool kFirst>
  __device__ void load(int from, int t0) {
#pragma unroll
    for (int b = 0; b < kAhead; ++b) {
      const float4* p = kFirst && b == 0 ? begin : rest + (from + b) * (kTileRows * kBlock / 4);
      p += t0 / 8 * kGroupThreads;
#pragma unroll
      for (int j = 0; j < 2; ++j) load_l2_if(v[b][j], p + j * kGroupThreads, from + b < count && t0 < kTileRows);
    }
  }
  template <bool kFirst>
  __device__ void add(int from, float (&sum)[kStepRows / 2]) const {
#pragma unroll
    for (int b = 0; b < kAhead; ++b) {
      const bool exists = from + b < count;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float values[4] = {v[b][j].x, v[b][j].y, v[b][j].z, v[b][j].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& s = sum[4 * j + i];
          s = kFirst && b == 0 ? values[i] : exists ? s + values[i] : s;
        }
      }
    }
  }
  __device__ void load_ahead(int t0) { load<true>(0, t0); }
  __device__ void stage(int t0, float* s) {
    float sum[kStepRows / 2];
    add<true>(0, sum);
#pragma unroll 1
    for (int from = kAhead; from < count; from += kAhead) {
      load<false>(from, t0);
      add<false>(from, sum);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
      stage_pairs(s + 8 * j * kStagingStride, sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
  }
};

__device__ __forceinline__ float widen(bf16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

__device__ __forceinline__ uint4 pack8(const float (&v)[8]) {
  return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

__device__ __forceinline__ void add8(float (&v)[8], const uint4& packed) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] += __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}

// Staged features from 32 on have neighbouring fours exchanged: otherwise the eight threads of a row, each of which
// reads eight features, would hit only half the banks.
__device__ __forceinline__ uint32_t staged_at(uint32_t feature) { return feature ^ feature / 32 * 4; }

// Eight staged features of a row from `feature` on, a multiple of 8.
__device__ __forceinline__ void load8(float (&v)[8], const float* tile_row, uint32_t feature) {
  *reinterpret_cast<float4*>(v) = *reinterpret_cast<const float4*>(tile_row + staged_at(feature));
  *reinterpret_cast<float4*>(v + 4) = *reinterpret_cast<const float4*>(tile_row + staged_at(feature + 4));
}

// Stores 8 consecutive outputs of an aligned row, or up to 8 of another, which are added to `residual` if there is one.
// No model has rows that are not aligned: they may be slow, but must not take registers.
__device__ __forceinline__ void store_bf16(bf16_t* out, const float (&v)[8], int count, bool aligned,
                                           const bf16_t* residual) {
  if (aligned) {
    *reinterpret_cast<uint4*>(out) = pack8(v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) out[i] = static_cast<bf16_t>(pack_bf16(residual ? v[i] + widen(residual[i]) : v[i], 0.0f));
}

__device__ __forceinline__ void store_f32(float* out, const float (&v)[8], int count, bool aligned) {
  if (aligned && count >= 8) {
    reinterpret_cast<float4*>(out)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(out)[1] = make_float4(v[4], v[5], v[6], v[7]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) out[i] = v[i];
}

// silu(gate) * up; they alternate every 8 features. The division is accurate to 2 ulp; quotients below 1.1e-36 become
// 0. The compiler finds no product and sum to contract, so every instantiation rounds alike.
__device__ __forceinline__ void silu_mul(float (&v)[8], const float* tile_row, uint32_t feature) {
  float up[8];
  load8(v, tile_row, feature);
  load8(up, tile_row, feature + 8);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(__fdividef(v[i], __fadd_rn(1.0f, expf(-v[i]))), up[i]);
}

// Updates a row's best with the 8 features of each of its 8 threads.
__device__ __forceinline__ void keep_best(Best* best, const float (&v)[8], int count, int feature) {
  Best top{-INFINITY, feature};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count && v[i] > top.value) top = {v[i], feature + i};
  top = warp_best<8>(top);
  if (threadIdx.x % 8 == 0 && beats(top, *best)) *best = top;
}

// The epilogue of one block. Sums pass through shared memory in steps of once or twice kStagingRows rows, after which a
// thread has 8 consecutive features of each of one or two rows. Called by all threads of a group.
template <int kTileRows, class Sums>
__device__ void finish_block(Sums sums, const RowLinearArgs& args, int block, int row_begin, int row_end, int group,
                             float* staging, Best* best) {
  const RowLinearParams& p = args.p;
  const Epilogue epilogue = p.epilogue;
  constexpr int kStep = Sums::kStepRows, kParts = kStep / kStagingRows;
  uint4 residual[kParts];  // for aligned rows; used only where it was loaded
  auto residual_at = [&](int t0, int i) {
    const uint32_t thread = thread_here();
    const int row = row_begin + t0 + thread / 8, column = block * kBlock + thread % 8 * 8;
    if (epilogue == Epilogue::kResidual && p.out_features % 8 == 0 && column < p.out_features && t0 < kTileRows &&
        row < row_end)
      residual[i] = *reinterpret_cast<const uint4*>(p.residual + static_cast<int64_t>(row) * p.out_features + column);
  };
#pragma unroll
  for (int i = 0; i < kParts; ++i) residual_at(i * kStagingRows, i);
  // `quarter`: which 16 of the block's features, and so which 8 outputs.
  auto finish_silu_mul = [&](int t0, uint32_t step_row, uint32_t quarter) {
    const int columns = p.out_features / 2, column = block * (kBlock / 2) + 8 * quarter;
    const int row = row_begin + t0 + step_row;
    if (row < row_end && column < columns) {
      float v[8];
      silu_mul(v, staging + step_row * kStagingStride, 16 * quarter);
      store_bf16(static_cast<bf16_t*>(p.out) + static_cast<int64_t>(row) * columns + column, v, columns - column,
                 columns % 8 == 0, nullptr);
    }
  };
  sums.load_ahead(0);
#pragma unroll 1
  for (int t0 = 0; t0 < kTileRows && row_begin + t0 < row_end; t0 += kStep) {
    const uint32_t thread = thread_here(), eighth = thread % 8, tile_row = thread / 8;
    group_sync(group);
    sums.stage(t0, staging + thread % 4 * 2 * kStagingStride + staged_at(thread / 32 * 16 + thread % 32 / 4));
    sums.load_ahead(t0 + kStep);
    group_sync(group);
    if (epilogue == Epilogue::kSiluMul) {
      if constexpr (kParts == 2)  // four threads per row; eight neighbours take two rows whose banks differ
        finish_silu_mul(t0, thread / 16 * 4 + thread / 4 % 2 * 2 + thread / 8 % 2, thread % 4);
      else if (eighth < 4)
        finish_silu_mul(t0, tile_row, eighth);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int t = t0 + i * kStagingRows;
      const float* staged = staging + (i * kStagingRows + tile_row) * kStagingStride;
      const int row = row_begin + t + tile_row;
      float v[8];
      load8(v, staged, 8 * eighth);
      const int columns = p.out_features, column = block * kBlock + 8 * eighth, count = columns - column;
      const int64_t offset = static_cast<int64_t>(row) * columns + column;
      if (kParts == 1 && epilogue == Epilogue::kArgmax) {  // never of many rows
        keep_best(best + t + tile_row, v, count, column);
      } else if (row < row_end && count > 0) {
        const bool aligned = columns % 8 == 0;
        if (epilogue == Epilogue::kLogits) {
          store_f32(static_cast<float*>(p.out) + offset, v, count, columns % 4 == 0);
        } else {
          const bool adds = epilogue == Epilogue::kResidual;
          if (adds && aligned) {
            add8(v, residual[i]);
            residual_at(t + kStep, i);
          }
          store_bf16(static_cast<bf16_t*>(p.out) + offset, v, count, aligned,
                     adds && !aligned ? p.residual + offset : nullptr);
        }
      }
    }
  }
}

// `best` is the best logit so far in this CTA, one entry per group and row.
// Before the first tile of a row tile: nothing seen, and the lowest id of the CTA's range.
template <int kTileRows>
__device__ void reset_best(const RowLinearArgs& args, Best* best, int group) {
  const int first_block = args.plan.range_begin(blockIdx.x) / args.plan.k_blocks * args.plan.blocks_per_tile;
  for (int tile_row = threadIdx.x % kGroupThreads; tile_row < kTileRows; tile_row += kGroupThreads)
    best[group * kTileRows + tile_row] = {-INFINITY, first_block * kBlock};
}

// After the last tile of a row tile, by all groups together, between two CTA-wide barriers.
template <int kTileRows>
__device__ void write_best(const RowLinearArgs& args, const Best* best, int row_begin, int row_end) {
  for (int tile_row = threadIdx.x; tile_row < kTileRows && row_begin + tile_row < row_end;
       tile_row += args.plan.blocks_per_tile * kGroupThreads) {
    Best top = best[tile_row];
    if (args.plan.blocks_per_tile == 2 && beats(best[kTileRows + tile_row], top)) top = best[kTileRows + tile_row];
    const int64_t slot = static_cast<int64_t>(row_begin + tile_row) * args.p.num_partials + blockIdx.x;
    args.p.partial_value[slot] = top.value;
    args.p.partial_id[slot] = top.id;
  }
}

}  // namespace orthrus::cuda
