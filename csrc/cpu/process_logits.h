// Scores of every row's tokens: edits, temperature, top-k, top-p, min-p, Gumbel noise. A thread takes whole rows.
//
// Every filter keeps "all tokens at or above a cut", so a row's filters amount to one number, which is found without a
// sort: values are gathered rung by rung below the maximum until they hold enough, and bisection over the last rung
// does the rest. Probability is summed as integers, trunc(exp(y - top) * 2^40), which is exact in any order.
//
// Contract (shapes in params.h): MUTATED: partial maxima, all rows; logits and log_probs, valid rows. No rows: nothing
// is done. All fp32. Row-invariant, deterministic. Scratch of up to one row per thread; std::bad_alloc if there is no
// memory for it. Bytes: the logits are read and written once, then read again from the caches, once and for every rung
// that is searched.
#pragma once
#include "noise.h"
#include "orthrus/rows.h"
#include "pool.h"
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr float kNever = -__builtin_inff();
constexpr float kFloatMax = 3.40282347e+38f;
// Rung i lies kRung * (i + 1)^2 below the row's maximum; exact in fp32. One more rung takes in all the rest.
constexpr float kRung = 0.4375f;
constexpr int kRungs = 8;
// The last finite rung. exp(-kReach) * 2^40 < 1: tokens further below have no mass.
constexpr float kReach = 28.f;
static_assert(kReach > 40 * 0.69314718f);
// Noise lies in (-2.9, 22.9): a token this far below the likeliest one's score cannot win.
constexpr float kNoiseReach = 23.f;

// Up to 16 values, padded.
ORTHRUS_INLINE Vec load_first(const float* p, int64_t count, float pad) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? p[i] : pad;
  return load(lanes);
}
ORTHRUS_INLINE void store_first(float* p, int64_t count, Vec v) {
  if (count >= kLanes) return store(p, v);
  float lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(float));
}

// fp32 bits as integers of the same order, and back.
ORTHRUS_INLINE int64_t order_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
ORTHRUS_INLINE float ordered(int64_t order) {
  const int32_t bits = static_cast<int32_t>(order) ^ ((static_cast<int32_t>(order) >> 31) & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A sum of trunc(weight * 2^40) over at most kScoreTile weights in [0, 1]: upper and lower 20 bits in fp32 lanes,
// where they stay below 2^24 and hence exact.
struct Mass {
  Vec high = zero(), low = zero();

  ORTHRUS_INLINE void add_weight(Vec weight) {
    const Vec scaled = mul(weight, set1(0x1p20f)), whole = truncate(scaled);
    high = add(high, whole);
    low = add(low, truncate(mul(sub(scaled, whole), set1(0x1p20f))));
  }
  ORTHRUS_INLINE int64_t sum() const {
    float lanes[2][kLanes];
    store(lanes[0], high);
    store(lanes[1], low);
    int32_t total[2] = {0, 0};
    for (int i = 0; i < kLanes; ++i) {
      total[0] += static_cast<int32_t>(lanes[0][i]);
      total[1] += static_cast<int32_t>(lanes[1][i]);
    }
    return (int64_t{total[0]} << 20) + total[1];
  }
};

// Mass of the values that reach `cut`, relative to `top`; y is padded with -inf to whole vectors.
inline int64_t mass_at_least(const float* y, int64_t size, float top, float cut) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < size; begin += kScoreTile) {
    Mass mass;
    for (int64_t i = begin; i < min_of(begin + kScoreTile, size); i += kLanes) {
      const Vec v = load(y + i);
      mass.add_weight(where_less(v, cut, zero(), exp(sub(v, set1(top)))));
    }
    total += mass.sum();
  }
  return total;
}

// A cut for which {y >= cut} is the smallest such set that, together with `base` more, has `target` values or as much
// mass. `low` reaches the target, `high` does not, and all values lie between. Halving the ordered bits of fp32 ends
// within 32 steps, each over the values still in question; y is overwritten.
template <bool kByMass>
inline float bisect(float* y, int64_t size, float top, float low, float high, int64_t base, int64_t target) {
  int64_t below = order_of(low), above = order_of(high);
  while (size > 1 && above - below > 1) {
    const int64_t middle = (below + above) >> 1;
    const float cut = ordered(middle);
    int64_t count = 0;
    for (int64_t i = 0; i < size; i += kLanes) count += count_at_least(load(y + i), cut);
    const bool splits = count > 0 && count < size;
    const int64_t reached = kByMass && splits ? base + mass_at_least(y, size, top, cut) : base + count;
    const bool enough = splits ? reached >= target : count > 0;
    (enough ? below : above) = middle;
    if (!splits) continue;
    if (!enough) base = reached;
    int64_t kept = 0;
    for (int64_t i = 0; i < size; i += kLanes) {
      kept += compress_between(y + kept, load(y + i), enough ? cut : low, enough ? high : cut);
    }
    store(y + kept, set1(kNever));
    size = kept;
  }
  return ordered(below);
}

// First place of x in p[0 ... count), which contains it.
ORTHRUS_INLINE int64_t find(const float* p, int64_t count, float x) {
  int64_t i = 0;
  while (i + kLanes <= count && first_equal(load(p + i), x) == kLanes) i += kLanes;
  while (p[i] != x) ++i;
  return i;
}

// One row as it is turned from logits into scores.
struct LogitRow {
  float* y;              // [vocab] logits, then scaled logits
  float* value;          // [tiles] the tiles' maxima, then their best scores
  int32_t* id;           // [tiles]
  int64_t vocab, tiles;
  float top;

  ORTHRUS_INLINE int64_t tile_end(int64_t tile) const { return min_of((tile + 1) * kScoreTile, vocab); }

  // Lowest id of a tile whose value is x.
  ORTHRUS_INLINE int32_t id_in(int64_t tile, float x) const {
    const int64_t begin = tile * kScoreTile;
    return static_cast<int32_t>(begin + find(y + begin, tile_end(tile) - begin, x));
  }

  // y / temperature, with NaN as -inf and +inf as the largest number; and the maxima.
  inline void scale(float temperature) {
    top = kNever;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Vec best = set1(kNever);
      for (int64_t t = tile * kScoreTile, end = tile_end(tile); t < end; t += kLanes) {
        Vec v = replace_nan(load_first(y + t, end - t, kNever), kNever);
        if (temperature > 0) v = div(v, set1(temperature));
        v = min(v, set1(kFloatMax));
        store_first(y + t, end - t, v);
        best = max(best, v);
      }
      value[tile] = reduce_max(best);
      top = top > value[tile] ? top : value[tile];
    }
  }

  // Mass of {y >= cut}.
  inline int64_t mass(float cut) const {
    const float reach = cut > top - kReach ? cut : top - kReach;
    int64_t total = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (value[tile] < reach) continue;
      Mass sum;
      for (int64_t t = tile * kScoreTile, end = tile_end(tile); t < end; t += kLanes) {
        const Vec v = load_first(y + t, end - t, kNever);
        sum.add_weight(where_less(v, reach, zero(), exp(sub(v, set1(top)))));
      }
      total += sum.sum();
    }
    return total;
  }

  // Writes the values in [low, high) side by side to out, followed by -inf; returns how many.
  inline int64_t gather(float low, float high, float* out) const {
    int64_t count = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (value[tile] < low) continue;
      for (int64_t t = tile * kScoreTile, end = tile_end(tile); t < end; t += kLanes) {
        count += compress_between(out + count, load_first(y + t, end - t, kNever), low, high);
      }
    }
    store(out + count, set1(kNever));
    return count;
  }

  // A cut that keeps no more values than `target` values or as much mass need; `found` has room for vocab + 16.
  template <bool kByMass>
  inline float cut_at(int64_t target, float* found) const {
    int64_t reached = 0;
    float high = ordered(order_of(top + 0.f) + 1);  // + 0, because right above -0 lies 0, which equals it
    for (int rung = 0; rung <= kRungs; ++rung) {
      const float low = rung < kRungs ? top - kRung * static_cast<float>((rung + 1) * (rung + 1)) : -kFloatMax;
      const int64_t base = reached, size = gather(low, high, found);
      reached += kByMass ? mass_at_least(found, size, top, low) : size;
      if (reached >= target) return bisect<kByMass>(found, size, top, low, high, base, target);
      high = low;
    }
    return kNever;
  }

  inline float search(int32_t top_k, float top_p, float* found) const {
    float cut = top_k > 0 && top_k < vocab ? cut_at<false>(top_k, found) : kNever;
    if (top_p < 1) {
      const int64_t share = static_cast<int64_t>(static_cast<double>(top_p) * static_cast<double>(mass(cut)));
      const float within = cut_at<true>(max_of(share, 1), found);
      cut = cut > within ? cut : within;
    }
    return cut;
  }

  // Per tile the best of y + noise over {y >= cut}; tokens that cannot win are skipped.
  inline void draw(float cut, int64_t seed, int32_t position, int32_t purpose) {
    float u[kScoreTile], score[kScoreTile];
    int64_t tile = 0;
    while (value[tile] != top) ++tile;
    const int64_t likeliest = id_in(tile, top);
    uniforms(seed, position, purpose, likeliest / kNoiseTokens * kNoiseTokens, u);
    const Vec lead = sub(set1(top), log(exponential(set1(u[likeliest % kNoiseTokens]))));
    const float close = reduce_max(lead) - kNoiseReach;
    const float reach = cut > close ? cut : close;
    for (tile = 0; tile < tiles; ++tile) {
      const int64_t begin = tile * kScoreTile, end = tile_end(tile);
      const float best_y = value[tile];
      value[tile] = kNever;
      id[tile] = static_cast<int32_t>(begin);
      if (best_y < reach) continue;
      for (int64_t t = begin; t < end; t += kNoiseTokens) uniforms(seed, position, purpose, t, u + t - begin);
      Vec best = set1(kNever);
      for (int64_t i = 0; i < end - begin; i += kLanes) {
        const Vec v = load_first(y + begin + i, end - begin - i, kNever);
        const Vec noisy = where_less(v, reach, set1(kNever), sub(v, log(exponential(load(u + i)))));
        store(score + i, noisy);
        best = max(best, noisy);
      }
      value[tile] = reduce_max(best);
      id[tile] = static_cast<int32_t>(begin + find(score, end - begin, value[tile]));
    }
  }

  // The log of the filtered distribution.
  inline void log_probs(float cut, float* out) const {
    float total[kLanes];
    store(total, log(set1(static_cast<float>(static_cast<double>(mass(cut)) * 0x1p-40))));
    for (int64_t t = 0; t < vocab; ++t) out[t] = y[t] >= cut ? y[t] - top - total[0] : kNever;
  }
};

// A token's logit after the penalties; `count` as in SlotEdits.
ORTHRUS_INLINE float penalised(float y, int32_t count, const float* penalties) {
  const float divided = y / penalties[0], multiplied = y * penalties[0];
  const float seen = count != 0 ? (y > 0 ? divided : multiplied) : y;
  const float less = seen - (penalties[1] + penalties[2] * static_cast<float>(count));
  return count > 0 ? less : seen;
}

// Penalties, bias and stop mask of pass row r. `kept` has room for as many values as there are drafts up to row r.
inline void edit(const ProcessLogitsParams& p, int64_t r, float* y, float* kept) {
  const SlotEdits& e = p.edits;
  const int64_t slot = p.rows.seq[r], vocab = p.vocab_size;
  const float* penalties = e.penalties + 3 * slot;
  const auto inside = [vocab](int32_t id) { return 0 <= id && id < vocab; };
  if (penalties[0] != 1 || penalties[1] != 0 || penalties[2] != 0) {
    const int32_t* counts = e.token_counts + slot * vocab;
    const int64_t drafts = r < p.rows.num_rows_ar ? min_of(p.rows.position[r] - p.cache_seqlens[slot], r + 1) : 0;
    const int32_t* draft = p.rows.token + r + 1 - drafts;
    for (int64_t i = 0; i < drafts; ++i) {  // tokens of the rows up to this one count too, each time they occur
      if (!inside(draft[i])) continue;
      int32_t count = static_cast<int32_t>(max_of(counts[draft[i]], 0));
      for (int64_t j = 0; j < drafts; ++j) count += draft[j] == draft[i];
      kept[i] = penalised(y[draft[i]], count, penalties);
    }
    for (int64_t t = 0; t < vocab; ++t) y[t] = penalised(y[t], counts[t], penalties);
    for (int64_t i = 0; i < drafts; ++i) {
      if (inside(draft[i])) y[draft[i]] = kept[i];
    }
  }
  for (int64_t i = slot * e.max_bias; i < (slot + 1) * e.max_bias; ++i) {
    if (inside(e.bias_ids[i])) y[e.bias_ids[i]] += e.bias_values[i];
  }
  if (p.rows.position[r] + 1 < e.min_position[slot]) {
    for (int64_t i = slot * e.max_stop_ids; i < (slot + 1) * e.max_stop_ids; ++i) {
      if (inside(e.stop_ids[i])) y[e.stop_ids[i]] = kNever;
    }
  }
}

inline void process_row(const ProcessLogitsParams& p, int64_t i) {
  const int64_t r = p.logit_rows[i], slot = p.rows.seq[r], vocab = p.vocab_size, tiles = div_up(vocab, kScoreTile);
  LogitRow row{p.logits + i * vocab, p.partial_value + i * tiles, p.partial_id + i * tiles, vocab, tiles, kNever};
  if (!row_is_valid(p.rows.position[r])) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      row.value[tile] = 0;
      row.id[tile] = static_cast<int32_t>(tile * kScoreTile);
    }
    return;
  }
  float* found = thread_scratch(max_of(vocab, p.rows.max_group_rows) + kLanes);
  if (p.edits.penalties) edit(p, r, row.y, found);
  const float temperature = p.temperature[slot];
  row.scale(temperature);
  float* log_probs = p.log_probs ? p.log_probs + i * vocab : nullptr;
  if (!(temperature > 0) || row.top == kNever) {
    int64_t choice = -1;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      row.id[tile] = row.id_in(tile, row.value[tile]);
      if (choice < 0 && row.value[tile] == row.top) choice = row.id[tile];
    }
    for (int64_t t = 0; log_probs && t < vocab; ++t) log_probs[t] = t == choice ? 0 : kNever;
    return;
  }
  float cut = kNever;
  const int32_t top_k = p.top_k[slot];
  const float top_p = p.top_p[slot], min_p = p.min_p[slot];
  if ((top_k > 0 && top_k < vocab) || top_p < 1) cut = row.search(top_k, top_p, found);
  if (min_p > 0) {
    const float least = row.top + reduce_max(log(set1(min_p)));
    cut = cut > least ? cut : least;
  }
  if (log_probs) row.log_probs(cut, log_probs);
  row.draw(cut, p.seed[slot], p.rows.position[r] + 1, p.purpose);
}

inline void process_logits(const ProcessLogitsParams& p) {
  parallel_each(p.num_rows, [&](int64_t i) { process_row(p, i); });
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
