// The running sums of attention over some of the keys, and how the sums of two splits are folded.
#pragma once
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

// Arrays over queries; top and total may be read up to the next multiple of 16.
struct Sums {
  float* top;    // maximum of the scores
  float* total;  // sum of the weights e^(score - top)
  float* mixed;  // [query][head_dim], sum of the weighted values
};

// Folds the next split into the sums of those queries for which sees(query).
template <typename Sees>
ORTHRUS_INLINE void fold(const Sums& into, const Sums& next, int64_t num_queries, int64_t head_dim, const Sees& sees) {
  for (int64_t first = 0; first < num_queries; first += kLanes) {
    alignas(64) float top[kLanes], kept[kLanes], added[kLanes];
    const Vec old_top = load(into.top + first), next_top = load(next.top + first);
    const Vec new_top = max(old_top, next_top);
    const Vec base = max(set1(-__FLT_MAX__), new_top);  // e^(-inf + inf) would be NaN
    store(top, new_top);
    store(kept, exp(sub(old_top, base)));
    store(added, exp(sub(next_top, base)));
    for (int64_t q = first; q < min_of(num_queries, first + kLanes); ++q) {
      if (!sees(q)) continue;
      const float keep = kept[q - first], add = added[q - first];
      into.top[q] = top[q - first];
      into.total[q] = into.total[q] * keep + next.total[q] * add;
      float* sum = into.mixed + q * head_dim;
      const float* more = next.mixed + q * head_dim;
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        store(sum + d, fma(load(more + d), set1(add), mul(load(sum + d), set1(keep))));
      }
    }
  }
}

template <typename T>
ORTHRUS_INLINE void finish(T* out, const Sums& sums, int64_t query, int64_t head_dim) {
  const float total = sums.total[query];
  const float inverse = total == 0.f ? 0.f : 1.f / total;  // a row that sees nothing yields zeros
  const float* mixed = sums.mixed + query * head_dim;
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    store(out + d, mul(add(load(mixed + d), zero()), set1(inverse)));  // + 0: no -0, which AMX tiles do not keep
  }
}

// The sums of every split of every query.
struct SplitSums {
  int64_t num_queries, head_dim;
  float* data = nullptr;

  SplitSums(int64_t num_queries, int64_t head_dim)
      : num_queries(div_up(num_queries, kLanes) * kLanes), head_dim(head_dim) {}
  int64_t floats_per_split() const { return num_queries * (head_dim + 2); }
  Sums at(int64_t split, int64_t query) const {
    float* top = data + split * floats_per_split();
    float* total = top + num_queries;
    return {top + query, total + query, total + num_queries + query * head_dim};
  }
};

}  // namespace orthrus::cpu::ORTHRUS_ISA
