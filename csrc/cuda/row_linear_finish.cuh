// What follows a tile's sum, shared by both instruction variants: folding the partial sums of a cut
// tile in k order, and the epilogues.
//
// A *group* is the 128 threads that own one 64-feature block. Thread t holds, for every token pair
// j = token / 8, acc[4j + {0,1}] = feature f, tokens 8j + 2*(t%4) + {0,1} and acc[4j + {2,3}] =
// feature f + 8, f = 16*(t/32) + (t%32)/4: the accumulator layout of wgmma m64nN and of four warps
// of mma.m16n8k16 alike.
#pragma once
#include "row_linear_plan.h"

namespace orthrus::cuda {

__device__ __forceinline__ void group_sync(int group) { named_barrier(group + 1, kGroupThreads); }

// Running best logit of each token in this CTA, one entry per group and token.
struct BestLogit {
  float value;
  int32_t id;
};

// NaN compares false and so never wins; equal values go to the lower id.
__device__ __forceinline__ bool beats(float value, int32_t id, const BestLogit& best) {
  return value > best.value || (value == best.value && id < best.id);
}

// Adds this CTA's partial sum of a cut tile, of its first `rows` tokens. True in the group that arrived last, whose
// acc then holds the whole sum, folded in k order; nobody waits for anybody.
template <int kTokens>
__device__ bool fold_partials(float (&acc)[kTokens / 2], const RowLinearArgs& args, int view, int tile, int kb_begin,
                              int rows, int group, int32_t* flag) {
  const RowLinearPlan& plan = args.plan;
  const int thread = threadIdx.x % kGroupThreads;
  float* workspace = static_cast<float*>(args.p.workspace);
  // A CTA cuts at most two tiles: the one its range starts inside of, and the one it ends inside of.
  auto partial = [&](int cta, int which) {
    return reinterpret_cast<float4*>(workspace + partial_offset(plan, view, cta, which, group, kTokens)) + thread;
  };
  float4* mine = partial(blockIdx.x, kb_begin == 0);
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j)
    if (8 * j < rows)
      __stcg(mine + j * kGroupThreads, make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]));

  const int first = plan.owner(tile * plan.k_blocks);
  const int last = plan.owner((tile + 1) * plan.k_blocks - 1);
  group_sync(group);
  if (thread == 0) {
    int32_t* counter = static_cast<int32_t*>(args.p.workspace) +
                       (view * plan.tiles + tile) * plan.blocks_per_tile + group;
    const bool is_last = add_acq_rel(counter, 1) == last - first;
    if (is_last) *counter = 0;  // the next launch finds it so
    *flag = is_last;
  }
  group_sync(group);
  if (!*flag) return false;

  // Loads of several partials are in flight at once, as many as registers allow beside acc: each is asked for whether
  // it exists or not (the last one then), since a branch between them would make them wait for each other.
  constexpr int kWide = kTokens == 16 ? 2 : 4;
  constexpr int kBatch = kTokens == 16 ? 3 : kTokens <= 64 ? 2 : 4;
#pragma unroll
  for (int j0 = 0; j0 < kTokens / 8; j0 += kWide) {
    if (8 * j0 >= rows) break;
#pragma unroll 1
    for (int cta0 = first; cta0 <= last; cta0 += kBatch) {
      float4 v[kBatch][kWide];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int cta = min(cta0 + b, last);
        const float4* other = partial(cta, cta == first) + j0 * kGroupThreads;
#pragma unroll
        for (int j = 0; j < kWide; ++j) v[b][j] = load_l2(other + j * kGroupThreads);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool begins = cta0 + b == first, exists = cta0 + b <= last;
        auto add = [&](float& sum, float value) { sum = begins ? value : exists ? sum + value : sum; };
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          float* sum = acc + 4 * (j0 + j);
          add(sum[0], v[b][j].x);
          add(sum[1], v[b][j].y);
          add(sum[2], v[b][j].z);
          add(sum[3], v[b][j].w);
        }
      }
    }
  }
  return true;
}

// 8 consecutive outputs of a row: one 16-byte access where the row's length keeps it aligned.
__device__ __forceinline__ void store_bf16(bf16_t* out, const float (&v)[8], int count, bool aligned) {
  const uint4 packed = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                                  pack_bf16(v[6], v[7]));
  if (aligned && count == 8) {
    *reinterpret_cast<uint4*>(out) = packed;
    return;
  }
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) out[i] = static_cast<bf16_t>(words[i / 2] >> (16 * (i % 2)));
}

__device__ __forceinline__ void add_bf16(float (&v)[8], const uint4& packed) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] += __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}

// The epilogue of one block: sums cross shared memory 16 tokens at a time, so that a thread ends
// with 8 consecutive features of one token. Called by all threads of a group.
template <int kTokens>
__device__ void finish_block(const float (&acc)[kTokens / 2], const RowLinearArgs& args, int block, int row_begin,
                             int row_end, int group, float* staging, BestLogit* best) {
  const RowLinearParams& p = args.p;
  const int thread = threadIdx.x % kGroupThreads;
  const int lane = thread % 32;
  const int my_feature = 16 * (thread / 32) + lane / 4;
  const int my_token = 2 * (lane % 4);
  const Epilogue epilogue = static_cast<Epilogue>(p.epilogue);
  const int feature = block * kBlock + 8 * (thread % 8);
  const int count = min(8, p.out_features - feature);
  const bool aligned = p.out_features % 8 == 0;  // then a thread has 8 features or none
  auto offset_at = [&](int t0) { return static_cast<int64_t>(row_begin + t0 + thread / 8) * p.out_features + feature; };
  // Aligned residuals are asked for 16 tokens ahead of their use.
  const bool adds_ahead = epilogue == Epilogue::kResidual && aligned && count > 0;
  uint4 ahead{};
  auto ask = [&](int t0) {
    if (adds_ahead && t0 < kTokens && row_begin + t0 + thread / 8 < row_end)
      ahead = *reinterpret_cast<const uint4*>(p.residual + offset_at(t0));
  };
  ask(0);
#pragma unroll 1
  for (int t0 = 0; t0 < kTokens && row_begin + t0 < row_end; t0 += kStagingTokens) {
    const uint4 residual = ahead;
    ask(t0 + kStagingTokens);
    group_sync(group);
    float* s = staging + my_token * kStagingStride + my_feature;
    // One copy of the code below, yet registers are indexed by constants.
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      if (8 * j - t0 >= 0 && 8 * j - t0 < kStagingTokens) {
        float* pair = s + (8 * j - t0) * kStagingStride;
        pair[0] = acc[4 * j];
        pair[kStagingStride] = acc[4 * j + 1];
        pair[8] = acc[4 * j + 2];
        pair[kStagingStride + 8] = acc[4 * j + 3];
      }
    }
    group_sync(group);
    const int token = t0 + thread / 8;
    const int row = row_begin + token;
    const float* sums = staging + (thread / 8) * kStagingStride;
    if (epilogue == Epilogue::kSiluMul) {
      // Gate and up alternate by 8 features; half of the threads have a pair of 8s each.
      const int chunk = thread % 8;
      const int columns = p.out_features / 2;
      const int column = block * (kBlock / 2) + 8 * chunk;
      if (row < row_end && chunk < 4 && column < columns) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float gate = sums[16 * chunk + i];
          v[i] = gate / (1.0f + expf(-gate)) * sums[16 * chunk + 8 + i];
        }
        store_bf16(static_cast<bf16_t*>(p.out) + static_cast<int64_t>(row) * columns + column, v, columns - column,
                   columns % 8 == 0);
      }
      continue;
    }
    float v[8];
    *reinterpret_cast<float4*>(v) = *reinterpret_cast<const float4*>(sums + 8 * (thread % 8));
    *reinterpret_cast<float4*>(v + 4) = *reinterpret_cast<const float4*>(sums + 8 * (thread % 8) + 4);
    const int64_t offset = offset_at(t0);
    if (epilogue == Epilogue::kArgmax) {
      BestLogit top{-INFINITY, feature};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < count && v[i] > top.value) top = {v[i], feature + i};
#pragma unroll
      for (int offset_lane = 4; offset_lane; offset_lane /= 2) {
        const float value = __shfl_xor_sync(~0u, top.value, offset_lane);
        const int32_t id = __shfl_xor_sync(~0u, top.id, offset_lane);
        if (beats(value, id, top)) top = {value, id};
      }
      if (thread % 8 == 0 && beats(top.value, top.id, best[token])) best[token] = top;
    } else if (row < row_end && count > 0) {
      if (epilogue == Epilogue::kLogits) {
        float* out = static_cast<float*>(p.out) + offset;
        if (count == 8 && p.out_features % 4 == 0) {
          reinterpret_cast<float4*>(out)[0] = make_float4(v[0], v[1], v[2], v[3]);
          reinterpret_cast<float4*>(out)[1] = make_float4(v[4], v[5], v[6], v[7]);
        } else {
          for (int i = 0; i < count; ++i) out[i] = v[i];
        }
      } else {
        if (adds_ahead) {
          add_bf16(v, residual);
        } else if (epilogue == Epilogue::kResidual) {
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (i < count) v[i] += __uint_as_float(static_cast<uint32_t>(p.residual[offset + i]) << 16);
        }
        store_bf16(static_cast<bf16_t*>(p.out) + offset, v, count, aligned);
      }
    }
  }
}

// Before the first tile of a row tile: nothing seen, and the lowest id of the CTA's range.
template <int kTokens>
__device__ void reset_best(const RowLinearArgs& args, BestLogit* best, int group) {
  const int first_block = args.plan.range_begin(blockIdx.x) / args.plan.k_blocks * args.plan.blocks_per_tile;
  for (int token = threadIdx.x % kGroupThreads; token < kTokens; token += kGroupThreads)
    best[group * kTokens + token] = {-INFINITY, first_block * kBlock};
}

// After the last tile of a row tile, by all groups together, between two CTA-wide barriers.
template <int kTokens>
__device__ void write_best(const RowLinearArgs& args, const BestLogit* best, int row_begin, int row_end) {
  for (int token = threadIdx.x; token < kTokens && row_begin + token < row_end;
       token += args.plan.blocks_per_tile * kGroupThreads) {
    BestLogit top = best[token];
    if (args.plan.blocks_per_tile == 2) {
      const BestLogit other = best[kTokens + token];
      if (beats(other.value, other.id, top)) top = other;
    }
    const int64_t slot = static_cast<int64_t>(row_begin + token) * args.p.num_partials + blockIdx.x;
    args.p.partial_value[slot] = top.value;
    args.p.partial_id[slot] = top.id;
  }
}

}  // namespace orthrus::cuda
