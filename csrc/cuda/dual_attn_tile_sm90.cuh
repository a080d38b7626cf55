// The two products of dual_attn on one tile of 64 keys by wgmma, for the 64 query rows of a warpgroup, 16 per warp. It
// reads queries, keys and values from shared memory itself, in the layout of dual_attn_tile.cuh, and leaves scores and
// sums in the registers where mma.sync would. Every row, whatever its variant, is multiplied by the same instructions;
// in company also for tiles of which it sees nothing, which add 0 times a finite value.
#pragma once
#include "dual_attn_tile.cuh"
#include "orthrus/sm90.cuh"

namespace orthrus::cuda {

// Begins scores = q . k^T, a group of products of its own. `q`: the first of the 64 rows, in a tile of kTileM.
template <int kTileM, int kHeadDim>
__device__ __forceinline__ void begin_scores(float (&scores)[8][4], SharedAddress q, SharedAddress k) {
  const uint64_t of_q = sm90::matrix_descriptor(q), of_k = sm90::matrix_descriptor(k);
  sm90::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < kHeadDim / 16; ++kk) {
    const int half = kk / 4, bytes = kk % 4 * 32;
    sm90::wgmma<64>(scores[0], of_q + sm90::descriptor_offset(half * (kTileM * 128) + bytes),
                    of_k + sm90::descriptor_offset(half * (64 * 128) + bytes), kk > 0);
  }
  sm90::wgmma_commit();
}

// Begins mixed += probabilities . v, likewise. The probabilities must not change before these products are waited for.
template <int kHeadDim>
__device__ __forceinline__ void begin_mix(float (&mixed)[kHeadDim / 8][4], const uint32_t (&probs)[4][4],
                                          SharedAddress v) {
  const uint64_t of_v = sm90::transposed_descriptor(v, 64 * 128);
  sm90::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk)
    sm90::wgmma_transposed<kHeadDim>(mixed[0], probs[kk], of_v + sm90::descriptor_offset(kk * (16 * 128)), true);
  sm90::wgmma_commit();
}

}  // namespace orthrus::cuda
