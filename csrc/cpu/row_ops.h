// The small row-wise ops: embed, rms_norm, qkv_commit. Sums run over 16 lanes in a fixed order.
//
// Contract (shapes in params.h): MUTATED: out or q, all rows; the AR rows' positions in the cache; the scratch. No
// rows: nothing is done. fp32 inside, one rounding. Row-invariant, deterministic: a thread takes whole rows. Bytes:
// each row read once and written once, with head_dim * 4 of cos_sin for qkv_commit. FLOP: 4 per element of rms_norm,
// and up to 7 of qkv_commit.
#pragma once
#include "orthrus/rows.h"
#include "pool.h"
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

// With fewer rows, a second thread costs more than it gains.
constexpr int64_t kMinRowsPerThread = 16;

template <typename T>
inline void embed(const EmbedParamsOf<T>& p) {
  parallel_for(p.num_rows, kMinRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t token = p.token[r];
      T* out = p.out + r * p.hidden;
      if (token < 0 || token >= p.vocab_size) {
        std::memset(out, 0, p.hidden * sizeof(T));
      } else {
        std::memcpy(out, p.table + token * p.hidden, p.hidden * sizeof(T));
      }
    }
  });
}

// 1 / sqrt(mean(x^2) + eps).
template <typename T>
ORTHRUS_INLINE float inverse_rms(const T* x, int64_t count, float eps) {
  Vec squares = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec v = load(x + i);
    squares = fma(v, v, squares);
  }
  float sum = reduce_add(squares);
  for (; i < count; ++i) sum += to_float(x[i]) * to_float(x[i]);
  return 1.f / __builtin_sqrtf(sum / static_cast<float>(count) + eps);
}

template <typename T>
inline void rms_norm(const RmsNormParamsOf<T>& p) {
  parallel_for(p.num_rows, kMinRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = p.x + int64_t{p.row_index ? p.row_index[r] : static_cast<int32_t>(r)} * p.hidden;
      T* out = p.out + r * p.hidden;
      const float scale = inverse_rms(x, p.hidden, p.eps);
      int64_t i = 0;
      for (; i + kLanes <= p.hidden; i += kLanes) {
        store(out + i, mul(mul(load(x + i), set1(scale)), load(p.weight + i)));
      }
      for (; i < p.hidden; ++i) out[i] = from_float<T>(to_float(x[i]) * scale * p.weight[i]);
    }
  });
}

// RMSNorm (if `norm`) and half-split RoPE of one head, one rounding. out may not overlap x.
template <typename T>
ORTHRUS_INLINE void rotate_head(const T* x, const float* norm, float eps, const float* cos_sin, int64_t head_dim,
                                T* out) {
  const int64_t half = head_dim / 2;
  const float scale = norm ? inverse_rms(x, head_dim, eps) : 1.f;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    Vec lo = load(x + i), hi = load(x + half + i);
    if (norm) {
      lo = mul(mul(lo, set1(scale)), load(norm + i));
      hi = mul(mul(hi, set1(scale)), load(norm + half + i));
    }
    const Vec cos = load(cos_sin + i), sin = load(cos_sin + half + i);
    store(out + i, sub(mul(lo, cos), mul(hi, sin)));
    store(out + half + i, add(mul(hi, cos), mul(lo, sin)));
  }
  for (; i < half; ++i) {
    float lo = to_float(x[i]), hi = to_float(x[half + i]);
    if (norm) {
      lo = lo * scale * norm[i];
      hi = hi * scale * norm[half + i];
    }
    const float cos = cos_sin[i], sin = cos_sin[half + i];
    out[i] = from_float<T>(lo * cos - hi * sin);
    out[half + i] = from_float<T>(hi * cos + lo * sin);
  }
}

// Whether the sum of 0 * x is 0, and not NaN.
template <typename T>
ORTHRUS_INLINE bool all_finite(const T* x, int64_t count) {
  Vec zeros = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) zeros = fma(load(x + i), zero(), zeros);
  float sum = reduce_add(zeros);
  for (; i < count; ++i) sum += 0.f * to_float(x[i]);
  return sum == 0.f;
}

// Replaces each element of the value that is not finite with zero, and the same element of the key with NaN.
template <typename T>
inline void keep_finite(T* value, T* key, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (__builtin_isfinite(to_float(value[i]))) continue;
    value[i] = from_float<T>(0.f);
    key[i] = from_float<T>(__builtin_nanf(""));
  }
}

template <typename T>
ORTHRUS_INLINE void commit_row(const QkvCommitParamsOf<T>& p, int64_t r) {
  const int64_t head_dim = p.kv.head_dim;
  const int64_t num_heads_kv = p.kv.num_heads_kv;
  const bool is_ar = r < p.rows.num_rows_ar;
  const float* q_norm = is_ar ? p.q_norm : p.q_norm_diff;
  const float* k_norm = is_ar ? p.k_norm : p.k_norm_diff;
  const int32_t position = p.rows.position[r];
  const bool valid = row_is_valid(position);
  const float* cos_sin = p.cos_sin + (valid ? position : 0) * head_dim;

  const T* q = p.qkv + r * (p.num_heads_q + 2 * num_heads_kv) * head_dim;
  const T* k = q + p.num_heads_q * head_dim;
  const T* v = k + num_heads_kv * head_dim;
  T* q_out = p.q_out + r * p.num_heads_q * head_dim;
  for (int64_t h = 0; h < p.num_heads_q; ++h) {
    rotate_head(q + h * head_dim, q_norm, p.eps, cos_sin, head_dim, q_out + h * head_dim);
  }

  T* k_out;
  T* v_out;
  int64_t stride_head;
  if (is_ar) {
    if (!valid) return;  // nowhere to write
    const int64_t page = p.kv.page_table[int64_t{p.rows.seq[r]} * p.kv.max_pages + position / kPageSize];
    const int64_t at = (page * num_heads_kv * kPageSize + position % kPageSize) * head_dim;
    k_out = p.kv.k_pages + at;
    v_out = p.kv.v_pages + at;
    stride_head = kPageSize * head_dim;
  } else {
    const int64_t at = (r - p.rows.num_rows_ar) * num_heads_kv * head_dim;
    k_out = p.scratch_k + at;
    v_out = p.scratch_v + at;
    stride_head = head_dim;
  }
  for (int64_t h = 0; h < num_heads_kv; ++h) {
    T* const key = k_out + h * stride_head;
    T* const value = v_out + h * stride_head;
    rotate_head(k + h * head_dim, k_norm, p.eps, cos_sin, head_dim, key);
    std::memcpy(value, v + h * head_dim, head_dim * sizeof(T));
    if (!all_finite(value, head_dim)) keep_finite(value, key, head_dim);
  }
}

template <typename T>
inline void qkv_commit(const QkvCommitParamsOf<T>& p) {
  parallel_for(p.rows.num_rows, kMinRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) commit_row(p, r);
  });
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
