// QK RMSNorm, RoPE and the write of keys and values; contract in orthrus/params.h.
//
// One launch, head_dim / 4 threads per head: each thread holds two dims of the lower half and their partners of the
// upper half, so that rotation stays in registers. fp32 inside, one rounding to T; the norm's sum is four squares per
// thread, then a butterfly over the head's threads: the same order for every row. Row-invariant, deterministic,
// graph-safe. MUTATED: q, and the rows' positions in cache and scratch. No rows: nothing is launched. Moves (q + 2 *
// kv) * head_dim elements per row in and as many out, plus head_dim * 4 bytes of cos_sin; a key's threads read its
// value too, from L1 or L2.
#include <cuda_bf16.h>

#include "orthrus/aligned.h"
#include "orthrus/launch.cuh"
#include "orthrus/ops.h"
#include "orthrus/rows.h"

namespace orthrus::cuda {
namespace {

constexpr int kThreads = 256;

struct Dims {
  float lo[2], hi[2];  // dims 2t, 2t+1 and head_dim/2 + 2t, head_dim/2 + 2t + 1 of thread t
};

__device__ Dims load_dims(const bf16_t* head, int t, int half) {
  const float2 lo = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(head + 2 * t));
  const float2 hi = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(head + half + 2 * t));
  return {{lo.x, lo.y}, {hi.x, hi.y}};
}

__device__ Dims load_dims(const float* head, int t, int half) {
  const float2 lo = *reinterpret_cast<const float2*>(head + 2 * t);
  const float2 hi = *reinterpret_cast<const float2*>(head + half + 2 * t);
  return {{lo.x, lo.y}, {hi.x, hi.y}};
}

__device__ void store_dims(bf16_t* head, int t, int half, const Dims& x) {
  *reinterpret_cast<__nv_bfloat162*>(head + 2 * t) = __floats2bfloat162_rn(x.lo[0], x.lo[1]);
  *reinterpret_cast<__nv_bfloat162*>(head + half + 2 * t) = __floats2bfloat162_rn(x.hi[0], x.hi[1]);
}

__device__ void store_dims(float* head, int t, int half, const Dims& x) {
  *reinterpret_cast<float2*>(head + 2 * t) = {x.lo[0], x.lo[1]};
  *reinterpret_cast<float2*>(head + half + 2 * t) = {x.hi[0], x.hi[1]};
}

template <int kHeadDim>
__device__ void normalise(Dims& x, const Dims& weight, float eps) {
  float sum = 0.f;
  for (int i = 0; i < 2; ++i) sum = __fadd_rn(sum, __fmul_rn(x.lo[i], x.lo[i]));
  for (int i = 0; i < 2; ++i) sum = __fadd_rn(sum, __fmul_rn(x.hi[i], x.hi[i]));
  for (int mask = kHeadDim / 8; mask > 0; mask /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, mask));
  const float scale = rsqrtf(sum / kHeadDim + eps);
  for (int i = 0; i < 2; ++i) {
    x.lo[i] = x.lo[i] * scale * weight.lo[i];
    x.hi[i] = x.hi[i] * scale * weight.hi[i];
  }
}

// `table`: from the cos_sin row of the position, cos of the half-dims, then sin.
__device__ void rotate(Dims& x, const Dims& table) {
  for (int i = 0; i < 2; ++i) {
    const float cos = table.lo[i], sin = table.hi[i], lo = x.lo[i], hi = x.hi[i];
    x.lo[i] = lo * cos - hi * sin;
    x.hi[i] = hi * cos + lo * sin;
  }
}

__device__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// Replaces each element that is not finite with zero.
__device__ void keep_finite(Dims& value) {
  for (int i = 0; i < 2; ++i) {
    if (!is_finite(value.lo[i])) value.lo[i] = 0.f;
    if (!is_finite(value.hi[i])) value.hi[i] = 0.f;
  }
}

// Sets the key to NaN where the value is not finite.
__device__ void spoil(Dims& key, const Dims& value) {
  for (int i = 0; i < 2; ++i) {
    if (!is_finite(value.lo[i])) key.lo[i] = NAN;
    if (!is_finite(value.hi[i])) key.hi[i] = NAN;
  }
}

// One row and some of its heads per CTA: q heads first, then keys, then values.
template <int kHeadDim, typename T>
__global__ void __launch_bounds__(kThreads) qkv_commit_kernel(const __grid_constant__ QkvCommitParamsOf<T> p) {
  constexpr int kHalf = kHeadDim / 2, kHeadThreads = kHeadDim / 4;
  pdl_launch_dependents();
  const int heads_kv = p.kv.num_heads_kv, last = p.num_heads_q + 2 * heads_kv - 1;
  const int row = blockIdx.x, index = blockIdx.y * (kThreads / kHeadThreads) + threadIdx.x / kHeadThreads;
  // Surplus threads redo the last head without storing it, so that whole warps take part in the reductions.
  const int head = min(index, last), t = threadIdx.x % kHeadThreads;
  const bool diff = row >= p.rows.num_rows_ar;
  const bool is_q = head < p.num_heads_q, is_v = head >= p.num_heads_q + heads_kv;
  const float* const norm = is_q ? (diff ? p.q_norm_diff : p.q_norm) : (diff ? p.k_norm_diff : p.k_norm);
  Dims weight{};
  if (norm) weight = load_dims(norm, t, kHalf);
  pdl_wait();
  // Two trips to memory: a load waits only if its address comes from another load, and none is in a branch, which would
  // wait for its condition. Threads that need no value or page read one that they do not use.
  const int position = p.rows.position[row], seq = p.rows.seq[row];
  const T* const own = p.qkv + (static_cast<int64_t>(row) * (last + 1) + head) * kHeadDim;
  const Dims x = load_dims(own, t, kHalf), value = load_dims(is_q || is_v ? own : own + heads_kv * kHeadDim, t, kHalf);
  const bool valid = row_is_valid(position), paged = !is_q && !diff && valid;
  const int64_t entry = static_cast<int64_t>(seq) * p.kv.max_pages + position / kPageSize;
  const int64_t page = p.kv.page_table[paged ? entry : 0];
  const Dims table = load_dims(p.cos_sin + static_cast<int64_t>(valid ? position : 0) * kHeadDim, t, kHalf);

  Dims y = x;
  if (norm) normalise<kHeadDim>(y, weight, p.eps);
  rotate(y, table);
  if (index > last) return;

  if (is_q) {
    store_dims(p.q_out + (static_cast<int64_t>(row) * p.num_heads_q + head) * kHeadDim, t, kHalf, y);
    return;
  }
  if (!diff && !valid) return;  // nowhere to write
  const int head_kv = head - p.num_heads_q - (is_v ? heads_kv : 0);
  const int64_t place = diff ? static_cast<int64_t>(row - p.rows.num_rows_ar) * heads_kv + head_kv
                             : (page * heads_kv + head_kv) * kPageSize + position % kPageSize;
  if (is_v) {
    Dims kept = x;
    keep_finite(kept);
    store_dims((diff ? p.scratch_v : p.kv.v_pages) + place * kHeadDim, t, kHalf, kept);
  } else {
    spoil(y, value);
    store_dims((diff ? p.scratch_k : p.kv.k_pages) + place * kHeadDim, t, kHalf, y);
  }
}

template <int kHeadDim, typename T>
int run(const QkvCommitParamsOf<T>& p, void* stream) {
  constexpr int kHeads = kThreads / (kHeadDim / 4), kMostGridY = 65535;
  const int64_t heads = int64_t{p.num_heads_q} + 2 * p.kv.num_heads_kv;
  if (heads > kHeads * kMostGridY) return cudaErrorInvalidValue;
  const dim3 grid(p.rows.num_rows, static_cast<unsigned>(div_up(heads, kHeads)));
  return launch(qkv_commit_kernel<kHeadDim, T>, p, grid, kThreads, 0, stream, device_info());
}

template <typename T>
int run(const QkvCommitParamsOf<T>& p, void* stream) {
  if (p.rows.num_rows == 0) return cudaSuccess;
  // A warp may hold a query head and a key head, which are normalised together or not at all.
  if (!p.q_norm != !p.k_norm || !p.q_norm_diff != !p.k_norm_diff) return cudaErrorInvalidValue;
  if (!aligned(2 * sizeof(T), p.qkv, p.q_out, p.kv.k_pages, p.kv.v_pages, p.scratch_k, p.scratch_v))
    return cudaErrorMisalignedAddress;
  if (!aligned(sizeof(float2), p.cos_sin, p.q_norm, p.k_norm, p.q_norm_diff, p.k_norm_diff))
    return cudaErrorMisalignedAddress;
  if (p.kv.head_dim == 64) return run<64>(p, stream);
  if (p.kv.head_dim == 128) return run<128>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int qkv_commit(const QkvCommitParams& p, void* stream) { return run(p, stream); }
int qkv_commit(const QkvCommitParamsOf<float>& p, void* stream) { return run(p, stream); }

}  // namespace orthrus::cuda
