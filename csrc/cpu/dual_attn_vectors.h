// Query tiles of dual_attn on vectors. Scores: dot() over ascending words of dims. Weights e^(score - maximum) are
// rounded to T; their sum and their product with the values, over ascending keys, use the rounded ones. Where no
// instruction multiplies pairs of bf16, products are of floats: queries and weights are widened once, keys and values
// each time they are multiplied or, where widening is costly and many queries read them, also once.
#pragma once
#include <type_traits>

#include "dual_attn.h"

namespace orthrus::cpu::ORTHRUS_ISA {

template <typename T>
struct VectorTile : QueryRows<T> {
  static constexpr int kQueries = 24;
  using Operand = std::conditional_t<kHasDot2, T, float>;  // of the products
  static constexpr bool kWidens = sizeof(Operand) > sizeof(T);
  static constexpr bool kWidensOnce = kWidens && !kWidensAtUse;  // for many queries
  using QueryRows<T>::num_queries;
  using QueryRows<T>::head_dim;
  using QueryRows<T>::sums;

  alignas(64) uint32_t k_words[kMaxHeadDim / (kWidensOnce ? 1 : kPerWord<T>)][kKeys];  // the transposed keys
  float decay[kLanes];                          // e^(old maximum - new maximum) of the current queries
  alignas(64) float score[kQueries][kKeys];
  alignas(64) Operand weight[kQueries][kKeys];  // e^(score - top)
  alignas(64) float total[kQueries][kLanes];    // sum of the weights, lane by lane
  // Widened copies of rows, head_dim apart.
  alignas(64) float wide_q[kWidens ? kQueries * kMaxHeadDim : 0];
  alignas(64) float wide_v[kWidensOnce ? kKeys * kMaxHeadDim : 0];

  // Whether keys and values are widened before they are multiplied.
  ORTHRUS_INLINE bool widens_once() const { return kWidensOnce && num_queries > kTileQueries; }
  ORTHRUS_INLINE const Operand* q_at(int64_t q) const {
    if constexpr (kWidens) {
      return wide_q + q * head_dim;
    } else {
      return this->q_row[q];
    }
  }
  ORTHRUS_INLINE void widen(const T* from, float* to) {
    for (int64_t d = 0; d < head_dim; d += kLanes) store(to + d, load(from + d));
  }

  ORTHRUS_INLINE void begin() {
    if constexpr (kWidens) {
      for (int64_t q = 0; q < num_queries; ++q) widen(this->q_row[q], wide_q + q * head_dim);
    }
  }
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
ORTHRUS_INLINE void transpose_keys(VectorTile<T>& queries, KeyRows<T>& keys) {
  const int64_t num_words = queries.head_dim / kPerWord<T>;
  for (int64_t j = 0; j < keys.num_keys; j += kLanes) {
    const uint32_t* in[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      in[i] = reinterpret_cast<const uint32_t*>(keys.k_row[min_of(j + i, keys.num_keys - 1)]);
    }
    for (int64_t d = 0; d < num_words; d += kLanes) {
      if (d > 0) {
        for (int64_t i = 0; i < kLanes; ++i) in[i] += kLanes;
      }
      keys.ahead.prefetch_lines(kLanes / 2);
      const int64_t count = min_of(kLanes, num_words - d);
      alignas(64) uint32_t pairs[VectorTile<T>::kWidensOnce ? kLanes : 0][kLanes];
      uint32_t* out = queries.widens_once() ? &pairs[0][0] : &queries.k_words[d][j];
      const int64_t stride = queries.widens_once() ? kLanes : kKeys;
      if (count == kLanes) {
        transpose16(in, out, stride);
      } else {
        for (int64_t c = 0; c < count; ++c) {
          for (int64_t i = 0; i < kLanes; ++i) out[c * stride + i] = in[i][c];
        }
      }
      if constexpr (VectorTile<T>::kWidensOnce) {
        for (int64_t c = 0; queries.widens_once() && c < count; ++c) {
          const WordVec words = load_words(pairs[c]);
          store(reinterpret_cast<float*>(&queries.k_words[2 * (d + c)][j]), first_of(words));
          store(reinterpret_cast<float*>(&queries.k_words[2 * (d + c) + 1][j]), second_of(words));
        }
      }
    }
  }
}

// Quarters of a line that a step of mixing prefetches if the tile has one group of queries; a step of scoring, over one
// word, prefetches half as many. With what the transposition prefetches, these are all lines ahead. If less than a
// line, every eighth step prefetches.
template <typename T, int kVecs>
constexpr int64_t kQuartersPerStep = sizeof(T) * kPerWord<typename VectorTile<T>::Operand> * kVecs;
template <typename T, int kVecs>
constexpr int64_t kFetchingStep = kQuartersPerStep<T, kVecs> < 4 ? 8 : 1;

// acc[q][b] += queries times keys, one word of each; kPairs: one pair, which is widened here.
template <bool kPairs, int kCount, int kVecs, typename T, typename Operand>
ORTHRUS_INLINE void add_products(Vec (&acc)[kCount][kVecs], const VectorTile<T>& queries, int64_t d, int64_t key,
                                 const Operand* const (&q_row)[kCount]) {
  const auto words = [&](int b) ORTHRUS_LAMBDA { return load_words(&queries.k_words[d][key + b * kLanes]); };
  if constexpr (kPairs) {
    const auto add_elements = [&](auto element_of, int64_t at) ORTHRUS_LAMBDA {
      ORTHRUS_UNROLL
      for (int b = 0; b < kVecs; ++b) {
        const Vec k = element_of(words(b));
        ORTHRUS_UNROLL
        for (int q = 0; q < kCount; ++q) acc[q][b] = fma(set1(q_row[q][at]), k, acc[q][b]);
      }
    };
    add_elements([](WordVec pairs) ORTHRUS_LAMBDA { return first_of(pairs); }, 2 * d);
    add_elements([](WordVec pairs) ORTHRUS_LAMBDA { return second_of(pairs); }, 2 * d + 1);
  } else {
    WordVec k[kVecs];
    ORTHRUS_UNROLL
    for (int b = 0; b < kVecs; ++b) k[b] = words(b);
    ORTHRUS_UNROLL
    for (int q = 0; q < kCount; ++q) {
      const WordVec word = set1_word(load_word(q_row[q] + kPerWord<Operand> * d));
      ORTHRUS_UNROLL
      for (int b = 0; b < kVecs; ++b) acc[q][b] = dot<Operand>(acc[q][b], k[b], word);
    }
  }
}

// Scores against the keys [key, key + 16 kVecs).
template <bool kPairs, int kCount, int kVecs, typename T>
inline void score_queries(VectorTile<T>& queries, KeyRows<T>& keys, int64_t first, int64_t key, int64_t lines) {
  using Operand = typename VectorTile<T>::Operand;
  Vec acc[kCount][kVecs];
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) {
    ORTHRUS_UNROLL
    for (int b = 0; b < kVecs; ++b) acc[q][b] = zero();
  }
  const Operand* q_row[kCount];
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) q_row[q] = queries.q_at(first + q);
  for (int64_t d = 0; d < queries.head_dim / (kPairs ? kPerWord<T> : kPerWord<Operand>); ++d) {
    if (d % kFetchingStep<T, kVecs> == 0) keys.ahead.prefetch_lines(lines);
    add_products<kPairs>(acc, queries, d, key, q_row);
  }
  const Vec scale = set1(queries.scale);
  const int64_t visible = keys.visible[first] - key;
  const bool all = visible >= kVecs * kLanes;
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) {
    ORTHRUS_UNROLL
    for (int b = 0; b < kVecs; ++b) {
      const Vec score = mul(acc[q][b], scale);
      store(&queries.score[first + q][key + b * kLanes],
            all ? score : keep_first(score, visible - b * kLanes, -__builtin_inff()));
    }
  }
}

// The same for num_vecs vectors of keys, or kVecs if there are more.
template <int kCount, int kVecs, typename T>
ORTHRUS_INLINE void score_some(VectorTile<T>& queries, KeyRows<T>& keys, int64_t first, int64_t key, int64_t num_vecs,
                               int64_t lines) {
  if constexpr (kVecs > 1) {
    if (num_vecs <= kVecs / 2) return score_some<kCount, kVecs / 2>(queries, keys, first, key, num_vecs, lines);
  }
  if constexpr (VectorTile<T>::kWidens) {
    if (!queries.widens_once()) return score_queries<true, kCount, kVecs>(queries, keys, first, key, lines);
  }
  if constexpr (VectorTile<T>::kWidensOnce || !VectorTile<T>::kWidens) {
    score_queries<false, kCount, kVecs>(queries, keys, first, key, lines);
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
  const Vec least = set1(-__FLT_MAX__);  // where only -inf has been seen: e^(-inf + inf) would be NaN
  store(queries.decay, exp(sub(old_top, max(least, load(running_top + first)))));
  for (int64_t q = first; q < first + kCount; ++q) {
    const Vec top = max(least, set1(running_top[q]));
    Vec total = mul(load(queries.total[q]), set1(queries.decay[q - first]));
    for (int64_t b = 0; b < num_vecs; ++b) {
      Vec weight = exp(sub(load(&queries.score[q][b * kLanes]), top));
      if constexpr (VectorTile<T>::kWidens) weight = second_of(round_to_bf16(weight));
      store(&queries.weight[q][b * kLanes], weight);  // rounds it where T is bf16 and not widened
      total = add(total, load(&queries.weight[q][b * kLanes]));
    }
    store(queries.total[q], total);
  }
}

// mixed = mixed * decay + weights x values, for queries that see the same number of keys. `v_row`: the values, as T or
// widened.
template <int kCount, int kVecs, typename T, typename Value>
inline void mix_queries(VectorTile<T>& queries, KeyRows<T>& keys, const Value* const* v_row, int64_t first,
                        int64_t lane, int64_t lines) {
  float* mixed = queries.sums.mixed + first * queries.head_dim + lane;
  Vec acc[kCount][kVecs];
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) {
    const Vec decay = set1(queries.decay[q]);
    ORTHRUS_UNROLL
    for (int c = 0; c < kVecs; ++c) acc[q][c] = mul(load(mixed + q * queries.head_dim + c * kLanes), decay);
  }
  const int64_t count = keys.visible[first];
  if constexpr (kPerWord<typename VectorTile<T>::Operand> == 1) {
    for (int64_t j = 0; j < count; ++j) {
      if (j % kFetchingStep<T, kVecs> == 0) keys.ahead.prefetch_lines(lines);
      ORTHRUS_UNROLL
      for (int c = 0; c < kVecs; ++c) {
        const Vec v = load(v_row[j] + lane + c * kLanes);
        ORTHRUS_UNROLL
        for (int q = 0; q < kCount; ++q) acc[q][c] = fma(set1(queries.weight[first + q][j]), v, acc[q][c]);
      }
    }
  } else {
    const auto add_keys = [&](const T* v0, const T* v1, auto weights_of) ORTHRUS_LAMBDA {
      WordVec v[kVecs];
      ORTHRUS_UNROLL
      for (int c = 0; c < kVecs; ++c) v[c] = zip_pairs(v0 + lane + c * kLanes, v1 ? v1 + lane + c * kLanes : nullptr);
      ORTHRUS_UNROLL
      for (int q = 0; q < kCount; ++q) {
        const WordVec w = set1_word(weights_of(queries.weight[first + q]));
        ORTHRUS_UNROLL
        for (int c = 0; c < kVecs; ++c) acc[q][c] = dot<T>(acc[q][c], v[c], w);
      }
    };
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      keys.ahead.prefetch_lines(lines);
      add_keys(v_row[j], v_row[j + 1], [&](const T* weight) ORTHRUS_LAMBDA { return load_word(weight + j); });
    }
    if (j < count) {  // the next key is not visible, and zero times its value may be NaN
      add_keys(v_row[j], nullptr, [&](const T* weight) ORTHRUS_LAMBDA { return uint32_t{weight[j]}; });
    }
  }
  ORTHRUS_UNROLL
  for (int q = 0; q < kCount; ++q) {
    ORTHRUS_UNROLL
    for (int c = 0; c < kVecs; ++c) store(mixed + q * queries.head_dim + c * kLanes, acc[q][c]);
  }
}

// Vectors at a time: fewer queries leave registers for more, without which a sum's steps would wait for each other.
constexpr int vecs_for(int count) {
  int vecs = kTileVecs;
  while (3 * count * vecs <= kTileQueries * kTileVecs && 2 * vecs * kLanes <= kKeys) vecs *= 2;
  return vecs;
}

struct LinesAhead {
  int64_t of_scoring, of_mixing;  // every kFetchingStep steps
};
// For each of the tile's groups of queries.
template <typename T, int kVecs>
ORTHRUS_INLINE LinesAhead lines_ahead(const VectorTile<T>& queries) {
  const int64_t of_one = kQuartersPerStep<T, kVecs> * kFetchingStep<T, kVecs> / 4;
  const int64_t of_mixing = div_up(of_one, div_up(queries.num_queries, kTileQueries));
  const bool of_pairs = VectorTile<T>::kWidens && !queries.widens_once();
  return {of_pairs ? of_mixing : div_up(of_mixing, 2), of_mixing};
}

template <int kCount, typename T, typename Value>
inline void attend_queries(VectorTile<T>& queries, KeyRows<T>& keys, const Value* const* v_row, int64_t first,
                           int64_t count) {
  if constexpr (kCount > 1) {
    if (count < kCount) return attend_queries<kCount - 1>(queries, keys, v_row, first, count);
  }
  constexpr int kVecs = vecs_for(kCount);
  const LinesAhead lines = lines_ahead<T, kVecs>(queries);
  const int64_t num_vecs = div_up(keys.visible[first], kLanes);
  for (int64_t b = 0; b < num_vecs; b += kVecs) {
    score_some<kCount, kVecs>(queries, keys, first, b * kLanes, num_vecs - b, lines.of_scoring);
  }
  weigh_queries<kCount>(queries, first, num_vecs);
  int64_t lane = 0;
  for (; lane + kVecs * kLanes <= queries.head_dim; lane += kVecs * kLanes) {
    mix_queries<kCount, kVecs>(queries, keys, v_row, first, lane, lines.of_mixing);
  }
  for (; lane < queries.head_dim; lane += kLanes) {
    mix_queries<kCount, 1>(queries, keys, v_row, first, lane, lines.of_mixing);
  }
}

// Folds the keys into every query that sees any of them.
template <typename T>
ORTHRUS_INLINE void VectorTile<T>::attend(KeyRows<T>& keys) {
  transpose_keys(*this, keys);
  const auto attend_all = [&](auto v_row) ORTHRUS_LAMBDA {
    for (int64_t first = 0, last; first < num_queries; first = last) {
      last = first + 1;
      const auto joins = [&](int64_t q) { return q < num_queries && keys.visible[q] == keys.visible[first]; };
      while (last - first < kTileQueries && joins(last)) ++last;
      if (keys.visible[first] > 0) attend_queries<kTileQueries>(*this, keys, v_row, first, last - first);
    }
  };
  if constexpr (kWidensOnce) {
    if (widens_once()) {
      const float* v_row[kKeys];
      for (int64_t j = 0; j < keys.num_keys; ++j) {
        float* wide = wide_v + j * head_dim;
        widen(keys.v_row[j], wide);
        v_row[j] = wide;
      }
      return attend_all(static_cast<const float* const*>(v_row));
    }
  }
  attend_all(static_cast<const T* const*>(keys.v_row));
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
