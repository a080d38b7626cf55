// Paged attention of AR and diffusion rows under the mask of rows.h: the walk over queries and keys.
//
// Keys are taken 64 at a time at fixed absolute positions, a block's own keys last, in an online
// softmax. A query is one row's head; a tile holds queries that share a KV head, as many as its arithmetic
// likes. A key that a query does not see never enters that query's sums, so tiles change no bit and unused
// cache may hold anything.
//
// A tile is a QueryRows with begin(), attend(keys) for every 64 keys, and finish(): dual_attn_vectors.h,
// dual_attn_amx.h.
#pragma once
#include "orthrus/rows.h"
#include "pool.h"
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr int kKeys = 64;
constexpr int kMaxQueries = 32;
constexpr int kMaxHeadDim = 256;

// Up to 64 keys as a query tile sees them.
template <typename T>
struct KeyRows {
  const T* k_row[kKeys];
  const T* v_row[kKeys];
  int64_t num_keys;
  int32_t visible[kMaxQueries];  // the first so many keys are visible to the query
};

template <typename T>
struct QueryRows {
  using Element = T;
  const T* q_row[kMaxQueries];
  T* out_row[kMaxQueries];
  int32_t row[kMaxQueries];
  int64_t num_queries;
  int64_t head_dim;
  float scale;
};

template <typename Tile, typename T>
ORTHRUS_INLINE void attend_prefix(const DualAttnParamsOf<T>& p, int64_t slot, int64_t head_kv, Tile& queries,
                                  KeyRows<T>& keys) {
  int64_t longest = 0;
  for (int64_t q = 0; q < queries.num_queries; ++q) longest = max_of(longest, p.rows.prefix_len[queries.row[q]]);
  const int32_t* pages = p.kv.page_table + slot * p.kv.max_pages;
  const int64_t page_size = p.kv.page_size;
  for (int64_t begin = 0; begin < longest; begin += kKeys) {
    keys.num_keys = min_of(kKeys, longest - begin);
    for (int64_t j = 0; j < keys.num_keys;) {
      const int64_t page = pages[(begin + j) / page_size];
      const int64_t slot = (begin + j) % page_size;
      int64_t at = ((page * p.kv.num_heads_kv + head_kv) * page_size + slot) * queries.head_dim;
      for (int64_t in_page = slot; in_page < page_size && j < keys.num_keys; ++in_page, ++j, at += queries.head_dim) {
        keys.k_row[j] = p.kv.k_pages + at;
        keys.v_row[j] = p.kv.v_pages + at;
      }
    }
    for (int64_t q = 0; q < queries.num_queries; ++q) {
      keys.visible[q] =
          static_cast<int32_t>(max_of(0, min_of(keys.num_keys, p.rows.prefix_len[queries.row[q]] - begin)));
    }
    queries.attend(keys);
  }
}

template <typename Tile, typename T>
ORTHRUS_INLINE void attend_block(const DualAttnParamsOf<T>& p, int64_t begin, int64_t end, int64_t head_kv,
                                 Tile& queries, KeyRows<T>& keys) {
  for (int64_t row = begin; row < end;) {
    keys.num_keys = 0;
    for (; row < end && keys.num_keys < kKeys; ++row) {
      if (!sees_block(p.rows.position[row])) continue;
      const int64_t at = ((row - p.rows.num_rows_ar) * p.kv.num_heads_kv + head_kv) * queries.head_dim;
      keys.k_row[keys.num_keys] = p.scratch_k + at;
      keys.v_row[keys.num_keys] = p.scratch_v + at;
      ++keys.num_keys;
    }
    for (int64_t q = 0; q < queries.num_queries; ++q) {
      keys.visible[q] = row_is_valid(p.rows.position[queries.row[q]]) ? static_cast<int32_t>(keys.num_keys) : 0;
    }
    if (keys.num_keys > 0) queries.attend(keys);
  }
}

template <typename Tile, typename T>
ORTHRUS_INLINE void attend_tile(const DualAttnParamsOf<T>& p, int64_t group, int64_t tile, int64_t head_kv) {
  static_assert(Tile::kQueries <= kMaxQueries);
  const int64_t begin = p.rows.group_start[group], end = p.rows.group_start[group + 1];
  const int64_t heads_per_kv = p.num_heads_q / p.kv.num_heads_kv;
  const int64_t first = tile * Tile::kQueries;
  if (first >= (end - begin) * heads_per_kv) return;

  Tile queries;
  KeyRows<T> keys;
  queries.num_queries = min_of(Tile::kQueries, (end - begin) * heads_per_kv - first);
  queries.head_dim = p.kv.head_dim;
  queries.scale = p.softmax_scale;
  for (int64_t q = 0; q < queries.num_queries; ++q) {
    const int64_t row = begin + (first + q) / heads_per_kv;
    const int64_t at = (row * p.num_heads_q + head_kv * heads_per_kv + (first + q) % heads_per_kv) * queries.head_dim;
    queries.row[q] = static_cast<int32_t>(row);
    queries.q_row[q] = p.q + at;
    queries.out_row[q] = p.out + at;
  }
  queries.begin();
  attend_prefix(p, p.rows.seq[begin], head_kv, queries, keys);
  if (group >= p.rows.num_groups_ar) attend_block(p, begin, end, head_kv, queries, keys);
  queries.finish();
}

template <typename Tile>
inline void dual_attn(const DualAttnParamsOf<typename Tile::Element>& p) {
  const int64_t heads_per_kv = p.num_heads_q / p.kv.num_heads_kv;
  const int64_t tiles = div_up(p.rows.max_group_rows * heads_per_kv, Tile::kQueries);
  const int64_t num_items = p.rows.num_groups * tiles * p.kv.num_heads_kv;
  // Backwards: in a causal chunk the last tiles are the longest.
  parallel_each(num_items, [&](int64_t i) {
    const int64_t item = num_items - 1 - i;
    attend_tile<Tile>(p, item / p.kv.num_heads_kv / tiles, item / p.kv.num_heads_kv % tiles,
                      item % p.kv.num_heads_kv);
  });
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
