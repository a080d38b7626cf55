// Query tiles of dual_attn on AMX, 16 or 32 queries.
//
// Scores are computed transposed, keys x queries: keys are read as they lie in the cache, and in the softmax each lane
// is a query. Weights e^(score - maximum) are rounded to bf16; their sum and their product with the values use the
// rounded ones. A key that a query does not see has weight zero, which at most turns a sum of -0 into +0 (finish()
// makes both +0). Values that are not finite are kept out of the product and added only for the queries that see them.
#pragma once
#include <immintrin.h>

#include "amx.h"
#include "dual_attn.h"

namespace orthrus::cpu::ORTHRUS_ISA {

struct AmxTile : QueryRows<bf16_t> {
  static constexpr int kQueries = 2 * kTileHeight;
  static constexpr int kPairs = kKeys / 2;

  alignas(64) uint32_t q_words[2][kMaxHeadDim / 2][kTileHeight];  // the queries transposed, in words
  alignas(64) uint32_t v_words[kPairs * kMaxHeadDim];             // [pair of keys][head_dim]
  alignas(64) bf16_t k_copy[2][kTileHeight * kMaxHeadDim];        // keys that are not evenly spaced
  alignas(64) float score[kKeys][kQueries];
  alignas(64) uint32_t weight_words[kPairs][kTileHeight];
  alignas(64) bf16_t weight[kQueries][kKeys];                     // e^(score - top)
  alignas(64) int32_t visible[kQueries];

  bool two() const { return num_queries > kTileHeight; }
  // Lines to prefetch per two keys, in each of the two loops over the keys.
  int64_t lines_ahead() const { return div_up(kKeys * head_dim * sizeof(bf16_t), kPairs * kLineBytes); }
  int64_t depth() const { return div_up(head_dim, kTileDepth) * kTileDepth; }

  TileShapes shapes{kTileHeight};

  ORTHRUS_INLINE void begin() {
    for (int t = 0; t < 1 + two(); ++t) transpose_queries(t);
  }

  ORTHRUS_INLINE void begin_split(const Sums& into) {
    sums = into;
    for (int q = 0; q < kQueries; ++q) {
      sums.top[q] = -__builtin_inff();
      sums.total[q] = 0.f;
    }
    std::memset(sums.mixed, 0, (1 + two()) * kTileHeight * head_dim * sizeof(float));
  }

  ORTHRUS_INLINE void attend(KeyRows<bf16_t>& keys) {
    for (int q = 0; q < kQueries; ++q) visible[q] = q < num_queries ? keys.visible[q] : 0;
    if (two()) {
      make_scores<true>(keys);
    } else {
      make_scores<false>(keys);
    }
    for (int t = 0; t < 1 + two(); ++t) make_weights(t, keys);
    const bool finite = pair_values(keys);
    if (!finite) zero_nonfinite_values(keys.num_keys);
    if (two()) {
      mix_values<true>(keys.num_keys);
    } else {
      mix_values<false>(keys.num_keys);
    }
    if (!finite) add_nonfinite_values(keys);
  }

  ORTHRUS_INLINE void end_split() {}

 private:
  ORTHRUS_INLINE void transpose_queries(int t) {
    alignas(64) bf16_t rows[kTileHeight][kMaxHeadDim];
    const uint32_t* in[kTileHeight];
    std::memset(rows, 0, sizeof rows);
    for (int i = 0; i < kTileHeight && t * kTileHeight + i < num_queries; ++i) {
      std::memcpy(rows[i], q_row[t * kTileHeight + i], head_dim * sizeof(bf16_t));
    }
    for (int64_t d = 0; d < depth() / 2; d += kLanes) {
      for (int i = 0; i < kTileHeight; ++i) in[i] = reinterpret_cast<const uint32_t*>(rows[i]) + d;
      transpose16(in, q_words[t][d], kTileHeight);
    }
  }

  // 16 keys from `first` on as rows of a tile: in place if evenly spaced, else in a zero-padded copy.
  ORTHRUS_INLINE TileRows rows_of_keys(const KeyRows<bf16_t>& keys, int64_t first, bf16_t* copy) {
    const int64_t count = min_of(kTileHeight, keys.num_keys - first);
    const int64_t stride = count > 1 ? keys.k_row[first + 1] - keys.k_row[first] : 0;
    bool even = count == kTileHeight && head_dim % kTileDepth == 0;
    for (int64_t j = 1; even && j < kTileHeight; ++j) even = keys.k_row[first + j] == keys.k_row[first] + j * stride;
    if (even) return {keys.k_row[first], stride};
    std::memset(copy, 0, kTileHeight * depth() * sizeof(bf16_t));
    for (int64_t j = 0; j < count; ++j) {
      std::memcpy(copy + j * depth(), keys.k_row[first + j], head_dim * sizeof(bf16_t));
    }
    return {copy, depth()};
  }

  template <bool kTwo>
  ORTHRUS_INLINE void make_scores(const KeyRows<bf16_t>& keys) {
    for (int64_t first = 0; first < keys.num_keys; first += 2 * kTileHeight) {
      const bool two_rows = first + kTileHeight < keys.num_keys;
      const TileRows rows0 = rows_of_keys(keys, first, k_copy[0]);
      const TileRows rows1 = two_rows ? rows_of_keys(keys, first + kTileHeight, k_copy[1]) : rows0;
      tile_zero<kSum00>();
      tile_zero<kSum01>();
      tile_zero<kSum10>();
      tile_zero<kSum11>();
      for (int64_t d = 0; d < depth(); d += kTileDepth) {
        const TileRows at0{rows0.from + d, rows0.stride}, at1{rows1.from + d, rows1.stride};
        if (two_rows) {
          tile_step<true, kTwo>(at0, at1, q_words[0][d / 2], q_words[1][d / 2], sizeof q_words[0][0]);
        } else {
          tile_step<false, kTwo>(at0, at1, q_words[0][d / 2], q_words[1][d / 2], sizeof q_words[0][0]);
        }
      }
      tile_store<kSum00>(&score[first][0], sizeof score[0]);
      if (kTwo) tile_store<kSum01>(&score[first][kTileHeight], sizeof score[0]);
      if (two_rows) tile_store<kSum10>(&score[first + kTileHeight][0], sizeof score[0]);
      if (two_rows && kTwo) tile_store<kSum11>(&score[first + kTileHeight][kTileHeight], sizeof score[0]);
    }
  }

  // Turns the scores of 16 queries into weights: new maxima, e^(score - maximum), running sums; decays the old `mixed`.
  ORTHRUS_INLINE void make_weights(int t, KeyRows<bf16_t>& keys) {
    const Vec none = set1(-__builtin_inff());
    const __m512i seen = _mm512_load_si512(&visible[t * kTileHeight]);
    const int64_t num_rows = div_up(keys.num_keys, kTileHeight) * kTileHeight;
    Vec best[4] = {none, none, none, none};
    for (int64_t j = 0; j < num_rows; j += 4) {
      ORTHRUS_UNROLL
      for (int i = 0; i < 4; ++i) {
        float* at = &score[j + i][t * kTileHeight];
        const __mmask16 sees = _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(static_cast<int32_t>(j + i)));
        const Vec value = _mm512_mask_mul_ps(none, sees, load(at), set1(scale));
        store(at, value);
        best[i] = max(best[i], value);
      }
    }
    const Vec old_top = load(sums.top + t * kTileHeight);
    const Vec new_top = max(old_top, max(max(best[0], best[1]), max(best[2], best[3])));
    // 0 where nothing has been seen yet: e^(-inf + inf) would be NaN.
    const Vec base = _mm512_mask_mov_ps(new_top, _mm512_cmp_ps_mask(new_top, none, _CMP_EQ_OQ), zero());
    const Vec fade = exp(sub(old_top, base));
    Vec sum[2] = {zero(), zero()};
    for (int64_t j = 0; j < num_rows; j += 2) {
      keys.ahead.prefetch_lines(lines_ahead());
      const Vec even = exp(sub(load(&score[j][t * kTileHeight]), base));
      const Vec odd = exp(sub(load(&score[j + 1][t * kTileHeight]), base));
      const __m512i words = pair_words(even, odd);
      _mm512_store_si512(weight_words[j / 2], words);
      sum[0] = add(sum[0], as_floats(_mm512_slli_epi32(words, 16)));
      sum[1] = add(sum[1], as_floats(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u)))));
    }
    for (int64_t i = num_rows / 2; i % kTileHeight; ++i) std::memset(weight_words[i], 0, sizeof weight_words[i]);
    store(sums.top + t * kTileHeight, new_top);
    float* total = sums.total + t * kTileHeight;
    store(total, add(mul(load(total), fade), add(sum[0], sum[1])));

    for (int64_t first = 0; first < num_rows / 2; first += kTileHeight) {
      const uint32_t* in[kTileHeight];
      for (int i = 0; i < kTileHeight; ++i) in[i] = weight_words[first + i];
      transpose16(in, reinterpret_cast<uint32_t*>(&weight[t * kTileHeight][2 * first]), kKeys / 2);
    }

    alignas(64) float decay[kTileHeight];  // e^(old maximum - new maximum)
    store(decay, fade);
    const __mmask16 has_sums = _mm512_cmp_ps_mask(old_top, none, _CMP_NEQ_UQ);
    uint32_t left = _mm512_mask_cmp_ps_mask(has_sums, fade, set1(1.f), _CMP_NEQ_UQ);
    for (; left; left &= left - 1) {
      const int i = __builtin_ctz(left);
      float* row = sums.mixed + (t * kTileHeight + i) * head_dim;
      for (int64_t d = 0; d < head_dim; d += kLanes) store(row + d, mul(load(row + d), set1(decay[i])));
    }
  }

  // Lane i: even[i] and odd[i], rounded to bf16.
  static ORTHRUS_INLINE __m512i pair_words(Vec even, Vec odd) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }

  // Fills v_words, zero-padded to whole steps of a product; returns whether all values are finite.
  ORTHRUS_INLINE bool pair_values(KeyRows<bf16_t>& keys) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fff7fff);
    __m512i largest = _mm512_setzero_si512();
    int64_t j = 0;
    for (; j < keys.num_keys; j += 2) {
      const bf16_t* second = j + 1 < keys.num_keys ? keys.v_row[j + 1] : nullptr;
      uint32_t* out = v_words + j / 2 * head_dim;
      keys.ahead.prefetch_lines(lines_ahead());
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const __m512i words = zip_pairs(keys.v_row[j] + d, second ? second + d : nullptr);
        largest = _mm512_max_epu16(largest, _mm512_and_si512(words, magnitude));
        _mm512_store_si512(out + d, words);
      }
    }
    for (; j % kTileDepth; j += 2) std::memset(v_words + j / 2 * head_dim, 0, head_dim * sizeof(uint32_t));
    return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(kInfinity)) == 0;
  }

  // mixed += weights x values, 32 keys per step.
  template <bool kTwo>
  ORTHRUS_INLINE void mix_values(int64_t num_keys) {
    const int64_t row_bytes = head_dim * sizeof(float);
    for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
      const bool two_columns = d + kLanes < head_dim;
      float* at = sums.mixed + d;
      float* below = at + kTileHeight * head_dim;
      tile_load<kSum00>(at, row_bytes);
      if (two_columns) tile_load<kSum01>(at + kLanes, row_bytes);
      if (kTwo) tile_load<kSum10>(below, row_bytes);
      if (kTwo && two_columns) tile_load<kSum11>(below + kLanes, row_bytes);
      for (int64_t j = 0; j < num_keys; j += kTileDepth) {
        const TileRows rows0{&weight[0][j], kKeys}, rows1{&weight[kTileHeight][j], kKeys};
        const uint32_t* columns = v_words + j / 2 * head_dim + d;
        if (two_columns) {
          tile_step<kTwo, true>(rows0, rows1, columns, columns + kLanes, head_dim * sizeof(uint32_t));
        } else {
          tile_step<kTwo, false>(rows0, rows1, columns, nullptr, head_dim * sizeof(uint32_t));
        }
      }
      tile_store<kSum00>(at, row_bytes);
      if (two_columns) tile_store<kSum01>(at + kLanes, row_bytes);
      if (kTwo) tile_store<kSum10>(below, row_bytes);
      if (kTwo && two_columns) tile_store<kSum11>(below + kLanes, row_bytes);
    }
  }

  static constexpr int16_t kInfinity = 0x7f80;
  static bool is_nonfinite(bf16_t value) { return (value & kInfinity) == kInfinity; }

  void zero_nonfinite_values(int64_t num_keys) {
    auto* values = reinterpret_cast<bf16_t*>(v_words);
    for (int64_t i = 0; i < (num_keys + num_keys % 2) * head_dim; ++i) {
      if (is_nonfinite(values[i])) values[i] = 0;
    }
  }

  void add_nonfinite_values(const KeyRows<bf16_t>& keys) {
    for (int64_t j = 0; j < keys.num_keys; ++j) {
      for (int64_t d = 0; d < head_dim; ++d) {
        const bf16_t value = keys.v_row[j][d];
        if (!is_nonfinite(value)) continue;
        for (int64_t q = 0; q < num_queries; ++q) {
          if (visible[q] > j) sums.mixed[q * head_dim + d] += to_float(weight[q][j]) * to_float(value);
        }
      }
    }
  }
};

}  // namespace orthrus::cpu::ORTHRUS_ISA
