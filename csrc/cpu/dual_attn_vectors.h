// Query tiles of dual_attn on vectors. Scores: dot() over ascending words of dims. Weights e^(score - maximum) are
// rounded to T; their sum and their product with the values, dot() over ascending words of keys, use the rounded ones.
#pragma once
#include "dual_attn.h"

namespace orthrus::cpu::ORTHRUS_ISA {

template <typename T>
struct VectorTile : QueryRows<T> {
  static constexpr int kQueries = 24;
  using QueryRows<T>::num_queries;
  using QueryRows<T>::head_dim;
  using QueryRows<T>::sums;

  alignas(64) uint32_t k_words[kMaxHeadDim / kPerWord<T>][kKeys];  // the keys transposed, in words
  float decay[kLanes];                        // e^(old maximum - new maximum) of the queries at hand
  alignas(64) float score[kQueries][kKeys];
  alignas(64) T weight[kQueries][kKeys];      // e^(score - top)
  alignas(64) float total[kQueries][kLanes];  // sum of the weights, lane by lane

  ORTHRUS_INLINE void begin() {}
  ORTHRUS_INLINE void begin_split(const Sums& into) {
    sums = into;
    for (int64_t q = 0; q < num_queries; ++q) {
      sums.top[q] = -__builtin_inff();
      std::memset(total[q], 0, sizeof total[q]);
    }
    std::memset(sums.mixed, 0, num_queries * head_dim * sizeof(float));
  }
  ORTHRUS_INLINE void attend(KeyRows<T>& keys);
  ORTHRUS_INLINE void end_split() {
    for (int64_t q = 0; q < num_queries; ++q) sums.total[q] = reduce_add(load(total[q]));
  }
};

template <typename T>
ORTHRUS_INLINE void transpose_keys(KeyRows<T>& keys, int64_t head_dim, uint32_t (*k_words)[kKeys]) {
  const int64_t num_words = head_dim / kPerWord<T>;
  for (int64_t j = 0; j < keys.num_keys; j += kLanes) {
    const uint32_t* in[kLanes];
    for (int64_t d = 0; d < num_words; d += kLanes) {
      keys.ahead.prefetch_lines(kLanes / 2);
      for (int64_t i = 0; i < kLanes; ++i) {
        in[i] = reinterpret_cast<const uint32_t*>(keys.k_row[min_of(j + i, keys.num_keys - 1)]) + d;
      }
      if (d + kLanes <= num_words) {
        transpose16(in, &k_words[d][j], kKeys);
      } else {
        for (int64_t c = d; c < num_words; ++c) {
          for (int64_t i = 0; i < kLanes; ++i) k_words[c][j + i] = in[i][c - d];
        }
      }
    }
  }
}

template <int kCount, int kVecs, typename T>
inline void score_queries(VectorTile<T>& queries, KeyRows<T>& keys, int64_t first, int64_t lines) {
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
    keys.ahead.prefetch_lines(lines);
    WordVec k[kVecs];
    ORTHRUS_UNROLL
    for (int b = 0; b < kVecs; ++b) {
      k[b] = load_words(&queries.k_words[d][b * kLanes]);
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
  const bool all = visible >= kVecs * kLanes;
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) {
    ORTHRUS_UNROLL
    for (int b = 0; b < kVecs; ++b) {
      const int64_t key = b * kLanes;
      const Vec score = mul(acc[q][b], scale);
      store(&queries.score[first + q][key], all ? score : keep_first(score, visible - key, -__builtin_inff()));
    }
  }
}

// Turns the scores of queries [first, first + kCount) into weights: new maxima, e^(score - maximum), running sums.
template <int kCount, typename T>
inline void weigh_queries(VectorTile<T>& queries, int64_t first, int64_t num_vecs) {
  static_assert(kCount <= kLanes);
  float* const running_top = queries.sums.top;
  const Vec old_top = load(running_top + first);
  for (int64_t q = first; q < first + kCount; ++q) {
    Vec top = load(queries.score[q]);
    for (int64_t b = 1; b < num_vecs; ++b) top = max(top, load(&queries.score[q][b * kLanes]));
    const float tile_top = reduce_max(top);
    if (tile_top > running_top[q]) running_top[q] = tile_top;
  }
  store(queries.decay, exp(sub(old_top, load(running_top + first))));
  for (int64_t q = first; q < first + kCount; ++q) {
    const Vec top = set1(running_top[q]);
    Vec total = mul(load(queries.total[q]), set1(queries.decay[q - first]));
    for (int64_t b = 0; b < num_vecs; ++b) {
      T* weight = &queries.weight[q][b * kLanes];
      store(weight, exp(sub(load(&queries.score[q][b * kLanes]), top)));
      total = add(total, load(weight));
    }
    store(queries.total[q], total);
  }
}

// Lane i: the word of element d + i of two keys' rows (bf16), or of one's (float).
ORTHRUS_INLINE WordVec zip_words(const bf16_t* const* rows, int64_t d) { return zip_pairs(rows[0] + d, rows[1] + d); }
ORTHRUS_INLINE WordVec zip_words(const float* const* rows, int64_t d) { return load_words(rows[0] + d); }

// mixed = mixed * decay + weights x values, for queries that see the same number of keys.
template <int kCount, int kVecs, typename T>
inline void mix_queries(VectorTile<T>& queries, KeyRows<T>& keys, int64_t first, int64_t lane, int64_t lines) {
  float* mixed = queries.sums.mixed + first * queries.head_dim + lane;
  Vec acc[kCount][kVecs];
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) {
    const Vec decay = set1(queries.decay[q]);
    ORTHRUS_UNROLL
    for (int c = 0; c < kVecs; ++c) acc[q][c] = mul(load(mixed + q * queries.head_dim + c * kLanes), decay);
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
    keys.ahead.prefetch_lines(lines);
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
    for (int c = 0; c < kVecs; ++c) store(mixed + q * queries.head_dim + c * kLanes, acc[q][c]);
  }
}

template <int kCount, typename T>
inline void attend_queries(VectorTile<T>& queries, KeyRows<T>& keys, int64_t first, int64_t count, int64_t lines) {
  if constexpr (kCount > 1) {
    if (count < kCount) return attend_queries<kCount - 1>(queries, keys, first, count, lines);
  }
  const int64_t num_vecs = div_up(keys.visible[first], kLanes);
  if (num_vecs > 2) {
    score_queries<kCount, 4>(queries, keys, first, div_up(lines, 2));
  } else if (num_vecs > 1) {
    score_queries<kCount, 2>(queries, keys, first, div_up(lines, 2));
  } else {
    score_queries<kCount, 1>(queries, keys, first, div_up(lines, 2));
  }
  weigh_queries<kCount>(queries, first, num_vecs);
  int64_t lane = 0;
  for (; lane + 4 * kLanes <= queries.head_dim; lane += 4 * kLanes) {
    mix_queries<kCount, 4>(queries, keys, first, lane, lines);
  }
  for (; lane < queries.head_dim; lane += kLanes) mix_queries<kCount, 1>(queries, keys, first, lane, lines);
}

// Folds the keys into every query that sees any of them.
template <typename T>
ORTHRUS_INLINE void VectorTile<T>::attend(KeyRows<T>& keys) {
  transpose_keys(keys, head_dim, k_words);
  // For each step of mixing, half as many for one of scoring: with those of the transposition, all that is ahead.
  const int64_t lines = div_up(4, div_up(num_queries, kTileQueries));
  for (int64_t first = 0, last; first < num_queries; first = last) {
    last = first + 1;
    const auto joins = [&](int64_t q) { return q < num_queries && keys.visible[q] == keys.visible[first]; };
    while (last - first < kTileQueries && joins(last)) ++last;
    if (keys.visible[first] > 0) attend_queries<kTileQueries>(*this, keys, first, last - first, lines);
  }
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
