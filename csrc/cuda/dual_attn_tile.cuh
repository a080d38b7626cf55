// The arithmetic of dual_attn on one tile of 64 keys, for one warp with kFrags fragments of 16 query rows, which share
// the keys and values that it reads; the products by mma.sync. Every variant of the kernel does the same operations for
// a row in the same order, so among variants with the same products a row's bits do not depend on the variant.
#pragma once
#include <cstdint>

#include "orthrus/sm80.cuh"

namespace orthrus::cuda {

// Shared memory holds tiles of rows x head_dim bf16, cut into halves of 64 columns (128 bytes a row). 16-byte chunks
// are swizzled by the row, so that eight rows of one column chunk hit distinct banks. Tiles are aligned to 1024 bytes,
// as wgmma needs, so other rows and chunks are an XOR and an immediate offset away from a first one.
__device__ __forceinline__ SharedAddress chunk_address(SharedAddress tile, int row, int chunk) {
  return tile + row * 128 + ((chunk ^ row) & 7) * 16;
}

// From the address of (row, chunk), row below 16 and chunk below 2, gives that of (row + 16 * rows, chunk + 2 * pairs).
template <int kRows>
__device__ __forceinline__ SharedAddress fragment_address(SharedAddress first, int rows, int pairs) {
  return (first ^ (pairs % 4 * 32)) + pairs / 4 * (kRows * 128) + rows * (16 * 128);
}

__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// Softmax state of the two rows that a thread holds of each 16-row fragment (lane/4 and lane/4 + 8).
// `top` is the running maximum of the scaled scores in units of log2; -inf: no visible key yet, or only NaN.
struct RowState {
  float top[2];
  float total[2];  // this thread's columns only, until reduced over the four threads of a row
};

__device__ __forceinline__ RowState empty_state() {
  return {{-INFINITY, -INFINITY}, {0.f, 0.f}};
}

// scores = q . k^T for 64 keys. `q` and `k` are shared-memory tiles; the warp's rows start at `q_row`.
template <int kTileM, int kHeadDim, int kFrags>
__device__ __forceinline__ void score_tile(float (&scores)[kFrags][8][4], SharedAddress q, int q_row, SharedAddress k,
                                           int lane) {
#pragma unroll
  for (int f = 0; f < kFrags; ++f) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[f][j][e] = 0.f;
    }
  }
  const SharedAddress first_q = chunk_address(q + q_row * 128, lane % 16, lane / 16);
  const SharedAddress first_k = chunk_address(k, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int kk = 0; kk < kHeadDim / 16; ++kk) {
    uint32_t a[kFrags][4];
#pragma unroll
    for (int f = 0; f < kFrags; ++f) load_matrices(a[f], fragment_address<kTileM>(first_q, f, kk));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t b[4];
      load_matrices(b, fragment_address<64>(first_k, j, kk));
#pragma unroll
      for (int f = 0; f < kFrags; ++f) {
        mma(scores[f][2 * j], a[f], b[0], b[1]);
        mma(scores[f][2 * j + 1], a[f], b[2], b[3]);
      }
    }
  }
}

// Hides the keys that a row must not see: row `i` sees column c of the tile if c < visible[i] and
// bit c of `keys` is set. Hidden scores become -inf whatever they were, NaN included.
__device__ __forceinline__ void mask_tile(float (&scores)[8][4], const int (&visible)[2], uint64_t keys, int lane) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = j * 8 + lane % 4 * 2 + e % 2;
      if (column >= visible[e / 2] || !(keys >> column & 1)) scores[j][e] = -INFINITY;
    }
  }
}

// Online softmax: probabilities relative to the new running maximum, rounded to bf16 as the left operand of the product
// with the values. `decay` is the factor for what was accumulated before. A row that sees nothing of the tile keeps
// what it had.
__device__ __forceinline__ void softmax_tile(uint32_t (&probs)[4][4], float (&scores)[8][4], RowState& state,
                                             float (&decay)[2], float scale_log2) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    top = fmaxf(state.top[i], __fmul_rn(top, scale_log2));
    const float base = top == -INFINITY ? 0.f : top;
    decay[i] = exp2_fast(__fsub_rn(state.top[i], base));
    state.top[i] = top;
    float total = __fmul_rn(state.total[i], decay[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 2 * i; e < 2 * i + 2; ++e) {
        scores[j][e] = exp2_fast(__fmaf_rn(scores[j][e], scale_log2, -base));
        total = __fadd_rn(total, scores[j][e]);
      }
    }
    state.total[i] = total;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) probs[j / 2][j % 2 * 2 + i] = pack_bf16(scores[j][2 * i], scores[j][2 * i + 1]);
  }
}

// mixed = mixed * decay. Multiplying by one changes no bit, so a warp may skip it.
template <int kColumns>
__device__ __forceinline__ void decay_mixed(float (&mixed)[kColumns / 8][4], const float (&decay)[2]) {
  if (!__any_sync(~0u, decay[0] != 1.f || decay[1] != 1.f)) return;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) mixed[j][e] = __fmul_rn(mixed[j][e], decay[e / 2]);
  }
}

// mixed += probabilities . v, for kColumns columns from first_column on, a multiple of kColumns.
template <int kColumns, int kFrags>
__device__ __forceinline__ void mix_tile(float (&mixed)[kFrags][kColumns / 8][4], const uint32_t (&probs)[kFrags][4][4],
                                         SharedAddress v, int first_column, int lane) {
  const SharedAddress first_v =
      fragment_address<64>(chunk_address(v, lane % 16, lane / 16), 0, first_column / 16);
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      uint32_t b[4];
      load_matrices_transposed(b, fragment_address<64>(first_v, kk, j));
#pragma unroll
      for (int f = 0; f < kFrags; ++f) {
        mma(mixed[f][2 * j], probs[f][kk], b[0], b[1]);
        mma(mixed[f][2 * j + 1], probs[f][kk], b[2], b[3]);
      }
    }
  }
}

// Row totals over the four threads that share a row; all four get the same bits.
__device__ __forceinline__ void reduce_totals(RowState& state) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state.total[i] = __fadd_rn(state.total[i], __shfl_xor_sync(~0u, state.total[i], 1));
    state.total[i] = __fadd_rn(state.total[i], __shfl_xor_sync(~0u, state.total[i], 2));
  }
}

// One step of the ascending fold of splits: how the running result and the next split enter it. A split that saw
// nothing leaves the running result as it is; the first that saw something is copied unchanged, so a row with one split
// has the same bits whether it was folded or not.
struct Fold {
  float keep;   // factor of the running result
  float take;   // factor of the split
  bool replace;  // the running result is empty
  bool skip;     // the split adds nothing
};

__device__ __forceinline__ float fold(const Fold& step, float running, float split) {
  const float both = __fmaf_rn(split, step.take, __fmul_rn(running, step.keep));
  return step.replace ? split : step.skip ? running : both;
}

// `before` and `after`: the running maximum. `replace` assumes a running total that is not NaN.
__device__ __forceinline__ Fold fold_between(float before, float after, float split_top, float split_total) {
  const float keep = exp2_fast(__fsub_rn(before, after)), take = exp2_fast(__fsub_rn(split_top, after));
  return {keep, take, before == -INFINITY, take == 0.f && split_total == split_total};
}

// fmaxf drops NaN scores, totals keep them: a NaN total is neither replaced nor skipped, and survives the fold.
__device__ __forceinline__ Fold fold_step(float& top, float& total, float split_top, float split_total) {
  const float new_top = fmaxf(top, split_top);
  Fold step = fold_between(top, new_top, split_top, split_total);
  step.replace &= total == total;
  top = new_top;
  total = fold(step, total, split_total);
  return step;
}

}  // namespace orthrus::cuda
