// Paged attention of AR and diffusion rows under the mask of rows.h.
//
// Keys are taken 64 at a time at fixed absolute positions, a block's own keys last, in an online
// softmax. A query is one row's head; a tile holds up to 24 queries that share a KV head. A key that
// a query does not see never enters that query's sums, so tiles change no bit and unused cache may
// hold anything. Scores: dot over ascending words of lanes. Weights e^(score - maximum) are rounded
// to T; their sum and, by dot over ascending words of keys, their product with the values take the
// rounded ones.
#pragma once
#include "orthrus/rows.h"
#include "pool.h"
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr int kKeys = 64;
constexpr int kKeyVecs = kKeys / kLanes;
constexpr int kQueries = 24;
constexpr int kMaxHeadDim = 256;

// One tile of keys as a query tile sees it.
template <typename T>
struct KeyTile {
  const T* k_row[kKeys];
  const T* v_row[kKeys];
  int64_t num_keys;
  int64_t visible[kQueries];                       // the first so many keys are visible to the query
  alignas(64) uint32_t k_words[kMaxHeadDim / kPerWord<T>][kKeys];  // k_row transposed, in words
};

template <typename T>
struct QueryTile {
  const T* q_row[kQueries];
  T* out_row[kQueries];
  int32_t row[kQueries];
  int64_t num_queries;
  int64_t head_dim;
  float scale;
  float top[kQueries + kLanes];                    // running maximum of the scores
  float decay[kLanes];                             // e^(old maximum - new maximum) of the queries at hand
  alignas(64) float score[kQueries][kKeys];
  alignas(64) T weight[kQueries][kKeys];           // e^(score - top)
  alignas(64) float total[kQueries][kLanes];       // running sum of the weights, lane by lane
  alignas(64) float mixed[kQueries][kMaxHeadDim];  // running weighted sum of the values
};

template <typename T>
ORTHRUS_INLINE void transpose_keys(KeyTile<T>& keys, int64_t head_dim) {
  const int64_t num_words = head_dim / kPerWord<T>;
  for (int64_t j = 0; j < keys.num_keys; j += kLanes) {
    const uint32_t* in[kLanes];
    for (int64_t d = 0; d < num_words; d += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        in[i] = reinterpret_cast<const uint32_t*>(keys.k_row[min_of(j + i, keys.num_keys - 1)]) + d;
      }
      if (d + kLanes <= num_words) {
        transpose16(in, &keys.k_words[d][j], kKeys);
      } else {
        for (int64_t c = d; c < num_words; ++c) {
          for (int64_t i = 0; i < kLanes; ++i) keys.k_words[c][j + i] = in[i][c - d];
        }
      }
    }
  }
}

template <int kCount, int kVecs, typename T>
inline void score_queries(QueryTile<T>& queries, const KeyTile<T>& keys, int64_t first, int64_t first_key) {
  Vec acc[kCount][kVecs];
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) {
    ORTHRUS_UNROLL
    for (int b = 0; b < kVecs; ++b) acc[q][b] = zero();
  }
  const T* q_row[kCount];
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) q_row[q] = queries.q_row[first + q];
  for (int64_t d = 0; d < queries.head_dim / kPerWord<T>; ++d) {
    WordVec k[kVecs];
    ORTHRUS_UNROLL
    for (int b = 0; b < kVecs; ++b) {
      k[b] = load_words(&keys.k_words[d][first_key + b * kLanes]);
    }
    ORTHRUS_UNROLL
    for (int q = 0; q < kCount; ++q) {
      const WordVec word = set1_word(load_word(q_row[q] + kPerWord<T> * d));
      ORTHRUS_UNROLL
      for (int b = 0; b < kVecs; ++b) acc[q][b] = dot<T>(acc[q][b], k[b], word);
    }
  }
  const Vec scale = set1(queries.scale);
  const int64_t visible = keys.visible[first];
  const bool all = visible >= first_key + kVecs * kLanes;
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) {
    ORTHRUS_UNROLL
    for (int b = 0; b < kVecs; ++b) {
      const int64_t key = first_key + b * kLanes;
      const Vec score = mul(acc[q][b], scale);
      store(&queries.score[first + q][key], all ? score : keep_first(score, visible - key, -__builtin_inff()));
    }
  }
}

// Scores to weights, for queries [first, first + kCount): new maxima, e^(score - maximum), running sums.
template <int kCount, typename T>
inline void weigh_queries(QueryTile<T>& queries, int64_t first, int64_t num_vecs) {
  static_assert(kCount <= kLanes);
  const Vec old_top = load(&queries.top[first]);
  for (int64_t q = first; q < first + kCount; ++q) {
    Vec top = load(queries.score[q]);
    for (int64_t b = 1; b < num_vecs; ++b) top = max(top, load(&queries.score[q][b * kLanes]));
    const float tile_top = reduce_max(top);
    if (tile_top > queries.top[q]) queries.top[q] = tile_top;
  }
  store(queries.decay, exp(sub(old_top, load(&queries.top[first]))));
  for (int64_t q = first; q < first + kCount; ++q) {
    const Vec top = set1(queries.top[q]);
    Vec total = mul(load(queries.total[q]), set1(queries.decay[q - first]));
    for (int64_t b = 0; b < num_vecs; ++b) {
      T* weight = &queries.weight[q][b * kLanes];
      store(weight, exp(sub(load(&queries.score[q][b * kLanes]), top)));
      total = add(total, load(weight));
    }
    store(queries.total[q], total);
  }
}

// Lane i: element d + i of the rows of as many keys as a word holds.
ORTHRUS_INLINE WordVec zip_words(const bf16_t* const* rows, int64_t d) { return zip_pairs(rows[0] + d, rows[1] + d); }
ORTHRUS_INLINE WordVec zip_words(const float* const* rows, int64_t d) { return load_words(rows[0] + d); }

// mixed = mixed * decay + weights x values, for queries that see the same number of keys.
template <int kCount, int kVecs, typename T>
inline void mix_queries(QueryTile<T>& queries, const KeyTile<T>& keys, int64_t first, int64_t lane) {
  Vec acc[kCount][kVecs];
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) {
    const Vec decay = set1(queries.decay[q]);
    ORTHRUS_UNROLL
    for (int c = 0; c < kVecs; ++c) acc[q][c] = mul(load(&queries.mixed[first + q][lane + c * kLanes]), decay);
  }
  const auto add_keys = [&](auto values_of, auto weights_of) ORTHRUS_LAMBDA {
    WordVec v[kVecs];
    ORTHRUS_UNROLL
    for (int c = 0; c < kVecs; ++c) v[c] = values_of(lane + c * kLanes);
    ORTHRUS_UNROLL
    for (int q = 0; q < kCount; ++q) {
      const WordVec w = set1_word(weights_of(queries.weight[first + q]));
      ORTHRUS_UNROLL
      for (int c = 0; c < kVecs; ++c) acc[q][c] = dot<T>(acc[q][c], v[c], w);
    }
  };
  const int64_t count = keys.visible[first];
  int64_t j = 0;
  for (; j + kPerWord<T> <= count; j += kPerWord<T>) {
    add_keys([&](int64_t d) ORTHRUS_LAMBDA { return zip_words(&keys.v_row[j], d); },
             [&](const T* weight) ORTHRUS_LAMBDA { return load_word(weight + j); });
  }
  if constexpr (kPerWord<T> == 2) {
    if (j < count) {  // the next key is not visible, and zero times its value may be NaN
      add_keys([&](int64_t d) ORTHRUS_LAMBDA { return zip_pairs(keys.v_row[j] + d, nullptr); },
               [&](const T* weight) ORTHRUS_LAMBDA { return uint32_t{weight[j]}; });
    }
  }
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) {
    ORTHRUS_UNROLL
    for (int c = 0; c < kVecs; ++c) store(&queries.mixed[first + q][lane + c * kLanes], acc[q][c]);
  }
}

template <int kCount, typename T>
inline void attend_queries(QueryTile<T>& queries, const KeyTile<T>& keys, int64_t first, int64_t count) {
  if constexpr (kCount > 1) {
    if (count < kCount) return attend_queries<kCount - 1>(queries, keys, first, count);
  }
  const int64_t num_vecs = div_up(keys.visible[first], kLanes);
  if (num_vecs > 2) {
    score_queries<kCount, 4>(queries, keys, first, 0);
  } else if (num_vecs > 1) {
    score_queries<kCount, 2>(queries, keys, first, 0);
  } else {
    score_queries<kCount, 1>(queries, keys, first, 0);
  }
  weigh_queries<kCount>(queries, first, num_vecs);
  int64_t lane = 0;
  for (; lane + 4 * kLanes <= queries.head_dim; lane += 4 * kLanes) mix_queries<kCount, 4>(queries, keys, first, lane);
  for (; lane < queries.head_dim; lane += kLanes) mix_queries<kCount, 1>(queries, keys, first, lane);
}

// Folds one tile of keys into every query that sees any of it.
template <typename T>
ORTHRUS_INLINE void attend_keys(QueryTile<T>& queries, KeyTile<T>& keys) {
  transpose_keys(keys, queries.head_dim);
  for (int64_t first = 0, last; first < queries.num_queries; first = last) {
    last = first + 1;
    const auto joins = [&](int64_t q) { return q < queries.num_queries && keys.visible[q] == keys.visible[first]; };
    while (last - first < kTileQueries && joins(last)) ++last;
    if (keys.visible[first] > 0) attend_queries<kTileQueries>(queries, keys, first, last - first);
  }
}

template <typename T>
ORTHRUS_INLINE void attend_prefix(const DualAttnParamsOf<T>& p, int64_t slot, int64_t head_kv, QueryTile<T>& queries,
                                  KeyTile<T>& keys) {
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
      keys.visible[q] = max_of(0, min_of(keys.num_keys, p.rows.prefix_len[queries.row[q]] - begin));
    }
    attend_keys(queries, keys);
  }
}

template <typename T>
ORTHRUS_INLINE void attend_block(const DualAttnParamsOf<T>& p, int64_t begin, int64_t end, int64_t head_kv,
                                 QueryTile<T>& queries, KeyTile<T>& keys) {
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
      keys.visible[q] = row_is_valid(p.rows.position[queries.row[q]]) ? keys.num_keys : 0;
    }
    if (keys.num_keys > 0) attend_keys(queries, keys);
  }
}

template <typename T>
ORTHRUS_INLINE void attend_tile(const DualAttnParamsOf<T>& p, int64_t group, int64_t tile, int64_t head_kv) {
  const int64_t begin = p.rows.group_start[group], end = p.rows.group_start[group + 1];
  const int64_t heads_per_kv = p.num_heads_q / p.kv.num_heads_kv;
  const int64_t first = tile * kQueries;
  if (first >= (end - begin) * heads_per_kv) return;

  QueryTile<T> queries;
  KeyTile<T> keys;
  queries.num_queries = min_of(kQueries, (end - begin) * heads_per_kv - first);
  queries.head_dim = p.kv.head_dim;
  queries.scale = p.softmax_scale;
  for (float& top : queries.top) top = -__builtin_inff();
  for (int64_t q = 0; q < queries.num_queries; ++q) {
    const int64_t row = begin + (first + q) / heads_per_kv;
    const int64_t at = (row * p.num_heads_q + head_kv * heads_per_kv + (first + q) % heads_per_kv) * queries.head_dim;
    queries.row[q] = static_cast<int32_t>(row);
    queries.q_row[q] = p.q + at;
    queries.out_row[q] = p.out + at;
    std::memset(queries.total[q], 0, sizeof queries.total[q]);
    std::memset(queries.mixed[q], 0, queries.head_dim * sizeof(float));
  }

  attend_prefix(p, p.rows.seq[begin], head_kv, queries, keys);
  if (group >= p.rows.num_groups_ar) attend_block(p, begin, end, head_kv, queries, keys);

  for (int64_t q = 0; q < queries.num_queries; ++q) {
    const float total = reduce_add(load(queries.total[q]));
    const float inverse = total == 0.f ? 0.f : 1.f / total;  // a row that sees nothing yields zeros
    for (int64_t d = 0; d < queries.head_dim; d += kLanes) {
      store(queries.out_row[q] + d, mul(load(&queries.mixed[q][d]), set1(inverse)));
    }
  }
}

template <typename T>
inline void dual_attn(const DualAttnParamsOf<T>& p) {
  const int64_t heads_per_kv = p.num_heads_q / p.kv.num_heads_kv;
  const int64_t tiles = div_up(p.rows.max_group_rows * heads_per_kv, kQueries);
  const int64_t num_items = p.rows.num_groups * tiles * p.kv.num_heads_kv;
  // Backwards: in a causal chunk the last tiles are the longest.
  parallel_each(num_items, [&](int64_t i) {
    const int64_t item = num_items - 1 - i;
    attend_tile(p, item / p.kv.num_heads_kv / tiles, item / p.kv.num_heads_kv % tiles, item % p.kv.num_heads_kv);
  });
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
