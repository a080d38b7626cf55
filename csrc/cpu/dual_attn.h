// Paged attention of AR and diffusion rows under the mask of rows.h: the walk over queries and keys.
//
// A prefix is cut into splits at fixed absolute positions. The keys of a split are taken 64 at a time, in an online
// softmax that starts anew with every split, and a query's splits are folded in ascending order. A block's own keys
// come last, within the last split of the query's prefix. A query is one head of one row; a tile holds queries that
// share a KV head, as many as suit its arithmetic. Keys that a query does not see, and splits in which it sees nothing,
// do not enter its sums, so tiles change no bit and unused cache may hold anything.
//
// Two ways lead to the same bits: a tile folds its splits one by one (many tiles: prefill), or every split is a work
// item of its own, and its sums are kept until all splits can be folded (few tiles: decoding).
//
// Rounding points: the weights, before they are summed and multiplied by the values, and the output.
//
// Contract (shapes in params.h): MUTATED: out, all rows. No rows: nothing is done. Row-invariant, deterministic.
// std::bad_alloc if there is no memory for the splits' sums.
// Bytes: each tile's visible keys and values once, from the caches except the first time; q and out once. FLOP:
// 4 * head_dim per visible (row, head, key).
// Method: online softmax (Milakov, Gimelshein, arXiv 1805.02867) in tiles; splits along the keys as in Flash-Decoding
// (Dao, Haziza, Massa, Sizov 2023), here at fixed positions.
//
// A tile is a QueryRows with begin() and, for every split, begin_split(sums), attend(keys) for every 64 keys, and
// end_split(): dual_attn_vectors.h, dual_attn_amx.h.
#pragma once
#include "dual_attn_sums.h"
#include "orthrus/rows.h"
#include "pool.h"
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr int kKeys = kPageSize;
constexpr int kMaxQueries = 32;
constexpr int kMaxHeadDim = 256;
constexpr int64_t kSplitKeys = 512;
static_assert(kSplitKeys % kKeys == 0);  // so that 64 keys of a prefix are one page

// At least one: for the block, if there is no prefix.
ORTHRUS_INLINE int64_t num_splits(int64_t prefix_len) { return max_of(1, div_up(prefix_len, kSplitKeys)); }

// Where the next 64 keys and values are: on a page of their own, which the hardware prefetcher cannot predict.
class KeysAhead {
 public:
  KeysAhead() = default;
  ORTHRUS_INLINE KeysAhead(const void* k, const void* v, int64_t num_bytes)
      : at_(static_cast<const char*>(k)), end_(at_ + num_bytes), v_(static_cast<const char*>(v)), v_bytes_(num_bytes) {}

  // Prefetches the next `count` lines, keys first, until none is left. A few at a time, throughout the arithmetic: a
  // processor with as many loads in flight as it supports stalls until some arrive.
  ORTHRUS_INLINE void prefetch_lines(int64_t count) {
    for (; count > 0; --count, at_ += kLineBytes) {
      if (at_ == end_) {
        if (!v_) return;
        at_ = v_;
        end_ = v_ + v_bytes_;
        v_ = nullptr;
      }
      prefetch(at_);
    }
  }

 private:
  const char* at_ = nullptr;
  const char* end_ = nullptr;
  const char* v_ = nullptr;  // until it is the values' turn
  int64_t v_bytes_ = 0;
};

// Up to 64 keys as a query tile sees them.
template <typename T>
struct KeyRows {
  KeysAhead ahead;
  const T* k_row[kKeys];
  const T* v_row[kKeys];
  int64_t num_keys;
  int32_t visible[kMaxQueries];  // how many of them, from the first on, the query sees
};

template <typename T>
struct QueryRows {
  using Element = T;
  const T* q_row[kMaxQueries];
  int32_t row[kMaxQueries];
  int32_t prefix_len[kMaxQueries];
  int64_t index[kMaxQueries];  // of the query in q and out
  int64_t num_queries;
  int64_t longest;  // of the prefixes
  int64_t head_dim;
  float scale;
  Sums sums;  // of the current split
};

struct TileItem {
  int64_t group, tile, head_kv;
};

// False if the group has no such tile.
template <typename Tile, typename T>
ORTHRUS_INLINE bool take_queries(const DualAttnParamsOf<T>& p, const TileItem& item, Tile& queries) {
  static_assert(Tile::kQueries <= kMaxQueries);
  const int64_t begin = p.rows.group_start[item.group], end = p.rows.group_start[item.group + 1];
  const int64_t heads_per_kv = p.num_heads_q / p.kv.num_heads_kv;
  const int64_t first = item.tile * Tile::kQueries;
  queries.num_queries = min_of(Tile::kQueries, (end - begin) * heads_per_kv - first);
  if (queries.num_queries <= 0) return false;
  queries.head_dim = p.kv.head_dim;
  queries.scale = p.softmax_scale;
  queries.longest = 0;
  for (int64_t q = 0; q < queries.num_queries; ++q) {
    const int64_t row = begin + (first + q) / heads_per_kv;
    const int64_t head = item.head_kv * heads_per_kv + (first + q) % heads_per_kv;
    queries.row[q] = static_cast<int32_t>(row);
    queries.prefix_len[q] = p.rows.prefix_len[row];
    queries.longest = max_of(queries.longest, queries.prefix_len[q]);
    queries.index[q] = row * p.num_heads_q + head;
    queries.q_row[q] = p.q + queries.index[q] * queries.head_dim;
  }
  return true;
}

template <typename Tile, typename T>
ORTHRUS_INLINE void attend_prefix(const DualAttnParamsOf<T>& p, const TileItem& item, int64_t split, Tile& queries,
                                  KeyRows<T>& keys) {
  const int64_t seq = p.rows.seq[p.rows.group_start[item.group]];
  const int32_t* pages = p.kv.page_table + seq * p.kv.max_pages;
  const auto offset_of = [&](int64_t page) ORTHRUS_LAMBDA {
    return (int64_t{pages[page]} * p.kv.num_heads_kv + item.head_kv) * kPageSize * queries.head_dim;
  };
  const int64_t end = min_of((split + 1) * kSplitKeys, queries.longest);
  for (int64_t begin = split * kSplitKeys; begin < end; begin += kKeys) {
    keys.num_keys = min_of(kKeys, end - begin);
    int64_t at = offset_of(begin / kPageSize);
    for (int64_t j = 0; j < keys.num_keys; ++j, at += queries.head_dim) {
      keys.k_row[j] = p.kv.k_pages + at;
      keys.v_row[j] = p.kv.v_pages + at;
    }
    for (int64_t q = 0; q < queries.num_queries; ++q) {
      keys.visible[q] = static_cast<int32_t>(max_of(0, min_of(keys.num_keys, queries.prefix_len[q] - begin)));
    }
    keys.ahead = {};
    if (begin + kKeys < queries.longest) {
      const int64_t next = offset_of(begin / kPageSize + 1);
      keys.ahead = {p.kv.k_pages + next, p.kv.v_pages + next, kKeys * queries.head_dim * int64_t{sizeof(T)}};
    }
    queries.attend(keys);
  }
}

template <typename Tile, typename T>
ORTHRUS_INLINE void attend_block(const DualAttnParamsOf<T>& p, const TileItem& item, int64_t split, Tile& queries,
                                 KeyRows<T>& keys) {
  bool sees[kMaxQueries], any = false;
  for (int64_t q = 0; q < queries.num_queries; ++q) {
    sees[q] = row_is_valid(p.rows.position[queries.row[q]]) && split == num_splits(queries.prefix_len[q]) - 1;
    any |= sees[q];
  }
  if (!any) return;
  const int64_t end = p.rows.group_start[item.group + 1];
  for (int64_t row = p.rows.group_start[item.group]; row < end;) {
    keys.num_keys = 0;
    for (; row < end && keys.num_keys < kKeys; ++row) {
      if (!sees_block(p.rows.position[row])) continue;
      const int64_t at = ((row - p.rows.num_rows_ar) * p.kv.num_heads_kv + item.head_kv) * queries.head_dim;
      keys.k_row[keys.num_keys] = p.scratch_k + at;
      keys.v_row[keys.num_keys] = p.scratch_v + at;
      ++keys.num_keys;
    }
    for (int64_t q = 0; q < queries.num_queries; ++q) {
      keys.visible[q] = sees[q] ? static_cast<int32_t>(keys.num_keys) : 0;
    }
    if (keys.num_keys > 0) queries.attend(keys);
  }
}

// The queries' sums over one split, written to `sums`.
template <typename Tile, typename T>
inline void attend_split(const DualAttnParamsOf<T>& p, const TileItem& item, int64_t split, Tile& queries,
                         const Sums& sums) {
  KeyRows<T> keys;
  queries.begin_split(sums);
  attend_prefix(p, item, split, queries, keys);
  if (item.group >= p.rows.num_groups_ar) attend_block(p, item, split, queries, keys);
  queries.end_split();
}

struct TileSums {
  alignas(64) float top[kMaxQueries + kLanes] = {};
  alignas(64) float total[kMaxQueries + kLanes] = {};
  alignas(64) float mixed[kMaxQueries * kMaxHeadDim];

  Sums view() { return {top, total, mixed}; }
};

template <typename Tile, typename T>
inline void attend_tile(const DualAttnParamsOf<T>& p, const TileItem& item) {
  Tile queries;
  if (!take_queries(p, item, queries)) return;
  TileSums folded, next;
  queries.begin();
  attend_split(p, item, 0, queries, folded.view());
  for (int64_t split = 1; split < num_splits(queries.longest); ++split) {
    attend_split(p, item, split, queries, next.view());
    fold(folded.view(), next.view(), queries.num_queries, queries.head_dim,
         [&](int64_t q) ORTHRUS_LAMBDA { return split < num_splits(queries.prefix_len[q]); });
  }
  for (int64_t q = 0; q < queries.num_queries; ++q) {
    finish(p.out + queries.index[q] * queries.head_dim, folded.view(), q, queries.head_dim);
  }
}

template <typename Tile, typename T>
inline void attend_tile_split(const DualAttnParamsOf<T>& p, const TileItem& item, int64_t split,
                              const SplitSums& splits) {
  Tile queries;
  if (!take_queries(p, item, queries) || split >= num_splits(queries.longest)) return;
  TileSums sums;
  queries.begin();
  attend_split(p, item, split, queries, sums.view());
  for (int64_t q = 0; q < queries.num_queries; ++q) {
    const Sums out = splits.at(split, queries.index[q]);
    *out.top = sums.top[q];
    *out.total = sums.total[q];
    std::memcpy(out.mixed, sums.mixed + q * queries.head_dim, queries.head_dim * sizeof(float));
  }
}

// Queries [first, first + 16), or as many of them as there are.
template <typename T>
inline void fold_splits(const DualAttnParamsOf<T>& p, int64_t first, const SplitSums& splits) {
  const int64_t num_queries = min_of(kLanes, p.rows.num_rows * int64_t{p.num_heads_q} - first);
  int64_t count[kLanes], most = 1;
  for (int64_t q = 0; q < num_queries; ++q) {
    count[q] = num_splits(p.rows.prefix_len[(first + q) / p.num_heads_q]);
    most = max_of(most, count[q]);
  }
  const Sums folded = splits.at(0, first);
  for (int64_t split = 1; split < most; ++split) {
    fold(folded, splits.at(split, first), num_queries, p.kv.head_dim,
         [&](int64_t q) ORTHRUS_LAMBDA { return split < count[q]; });
  }
  for (int64_t q = 0; q < num_queries; ++q) finish(p.out + (first + q) * p.kv.head_dim, folded, q, p.kv.head_dim);
}

template <typename Tile>
inline void dual_attn(const DualAttnParamsOf<typename Tile::Element>& p) {
  constexpr int64_t kItemsPerThread = 2;  // with fewer, threads idle at the end
  constexpr int64_t kMaxFloats = 32 << 20;  // memory that the thread keeps
  const int64_t heads_per_kv = p.num_heads_q / p.kv.num_heads_kv;
  const int64_t tiles = div_up(p.rows.max_group_rows * heads_per_kv, Tile::kQueries);
  const int64_t num_items = p.rows.num_groups * tiles * p.kv.num_heads_kv;
  const auto item_at = [&](int64_t i) ORTHRUS_LAMBDA {
    return TileItem{i / p.kv.num_heads_kv / tiles, i / p.kv.num_heads_kv % tiles, i % p.kv.num_heads_kv};
  };
  int64_t most = 1;
  for (int64_t r = 0; r < p.rows.num_rows; ++r) most = max_of(most, num_splits(p.rows.prefix_len[r]));
  SplitSums splits(p.rows.num_rows * int64_t{p.num_heads_q}, p.kv.head_dim);
  const int64_t num_floats = most * splits.floats_per_split();
  const bool few = num_threads() > 1 && num_items < kItemsPerThread * num_threads();
  if (few && most > 1 && num_floats <= kMaxFloats) {
    splits.data = thread_scratch(num_floats);
    // The last splits come last, as they may be short.
    parallel_each(num_items * most, [&](int64_t i) {
      attend_tile_split<Tile>(p, item_at(i % num_items), i / num_items, splits);
    });
    parallel_each(splits.num_queries / kLanes, [&](int64_t i) { fold_splits(p, i * kLanes, splits); });
  } else {
    // Backwards, as in a causal chunk the last tiles are the longest.
    parallel_each(num_items, [&](int64_t i) { attend_tile<Tile>(p, item_at(num_items - 1 - i)); });
  }
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
