// y = x W^T for any number of rows, streaming W once, or once per block of rows if there are very many.
//
// Packed weight: strips of 32 outputs, each [ceil(in/n)][32][n] with n elements per word (see simd.h): the same inputs
// of 32 outputs side by side, so that one step over k loads two WordVecs and feeds every row of the tile. For kSiluMul
// a strip holds 16 gates, then their 16 ups. Outputs and inputs are padded with zeros. A bf16 strip may be coded (see
// coded_weight.h): a few tiles unpack it as they go, more tiles read it unpacked once. A weight in 8 bits, and with
// leading_only one in 12, stands for what csrc/cpu/coded_weight.h says of drafts.
//
// Contract (shapes in params.h). No alignment is required. MUTATED: out or the partial maxima, all rows. No rows:
// nothing is done. fp32 accumulation; one rounding, in the epilogue (none for kLogits and kArgmax). kArgmax: partial p
// covers the p-th 512 outputs; ties go to the lowest id, NaN never wins. std::bad_alloc if there is no memory for a
// thread's scratch.
// Row-invariant and deterministic: every output is one accumulator that runs over k in ascending order, whatever the
// tile, the row count or the thread.
// Bytes: each view's packed weight (with leading_only, of one in 12 bits the leading parts) once, or once per block of
// very many rows, and x once per strip from the caches.
// FLOP: 2 * num_rows * in * out_features.
#pragma once
#include <type_traits>

#include "coded_strip.h"
#include "pool.h"
#include "simd.h"
#include "variant.h"

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr int kStrip = 32;
// Vocabulary ids per partial maximum.
constexpr int kArgmaxTile = 512;
// What a tile prefetches while it computes, from `from` on: `lines` cache lines per step over k, 0, 1 or 2 in
// multiply_tile; for a coded strip see CodedWords. A strip's only tile prefetches 2, with prefetch_once: a pass that
// leaves the other caches to activations, keys and the host's code takes 1 to 3% less time on Zen 5, and the host's
// work after it up to a quarter less.
struct Ahead {
  const char* from;
  int64_t lines;
};
// How far ahead of the products to prefetch, where each weight is read once.
constexpr int kAheadBytes = 8192;
// The same for coded strips. On Zen 5, 64 units make an exact pass of 4 rows take 2% longer, and where memory is
// fast, 20 make 1 to 12 rows take 3 to 12% longer.
constexpr int64_t kAheadUnits = 42;
// With more tiles than this a coded strip is unpacked once: writing it out costs more than unpacking it a few times.
constexpr int64_t kMostDecodingTiles = 6;

// acc[r][0 ... 31] of kRows rows against one strip.
template <typename T, typename Strip, int kRows>
inline __attribute__((noinline)) void multiply_tile(const T* x, int64_t x_stride, const char* w, int64_t in_features,
                                                    Ahead ahead, float* acc) {
  Vec lo[kRows], hi[kRows];
  ORTHRUS_UNROLL
  for (int r = 0; r < kRows; ++r) lo[r] = hi[r] = zero();
  const auto step = [&](StepWords weights, auto word_of_row) ORTHRUS_LAMBDA {
    ORTHRUS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const WordVec word = set1_word(word_of_row(r));
      lo[r] = dot<T>(lo[r], weights.lo, word);
      hi[r] = dot<T>(hi[r], weights.hi, word);
    }
  };
  Strip strip(w, ahead.from);
  const auto step_at = [&](const T* from, StepWords weights) ORTHRUS_LAMBDA {
    step(weights, [&](int r) ORTHRUS_LAMBDA { return load_word(from + r * x_stride); });
  };
  const int64_t num_words = in_features / kPerWord<T>;
  const auto stream = [&](auto lines) ORTHRUS_LAMBDA {
    for (int64_t k = 0; k < num_words; k += Strip::kSteps) {
      strip.template prefetch_lines<decltype(lines)::value>();
      const T* from = x + k * kPerWord<T>;
      step_at(from, strip.template words<0>(k));
      if constexpr (Strip::kSteps == 2) step_at(from + 2, strip.template words<1>(k + 1));
    }
  };
  if (ahead.lines == 0) {
    stream(std::integral_constant<int, 0>());
  } else if (ahead.lines == 1) {
    stream(std::integral_constant<int, 1>());
  } else {
    stream(std::integral_constant<int, 2>());
  }
  if constexpr (kPerWord<T> == 2 && Strip::kSteps == 1) {
    if (in_features % 2) {
      step(strip.template words<0>(num_words),
           [&](int r) ORTHRUS_LAMBDA { return uint32_t{x[r * x_stride + in_features - 1]}; });
    }
  }
  ORTHRUS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    store(acc + r * kStrip, lo[r]);
    store(acc + r * kStrip + kLanes, hi[r]);
  }
}

template <typename T>
using MultiplyTile = void (*)(const T*, int64_t, const char*, int64_t, Ahead, float*);

template <typename T, typename Strip, int kRows = kTileRows>
struct MultiplyTileOf {
  ORTHRUS_INLINE MultiplyTile<T> operator()(int64_t rows) const {
    if constexpr (kRows > 1) {
      if (rows < kRows) return MultiplyTileOf<T, Strip, kRows - 1>()(rows);
    }
    return multiply_tile<T, Strip, kRows>;
  }
};

// Writes `count` lanes of v, rounded, at out; adds `residual` first if there is one (it may alias out).
template <typename T>
ORTHRUS_INLINE void finish_lanes(Vec v, const T* residual, T* out, int64_t count) {
  if (count >= kLanes) {
    store(out, residual ? add(v, load(residual)) : v);
    return;
  }
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(residual ? lanes[i] + to_float(residual[i]) : lanes[i]);
}

// Folds the values of ids first_id ... first_id + count - 1 into a maximum: ties to the lowest id, NaN never wins.
ORTHRUS_INLINE void update_argmax(const float* acc, int64_t first_id, int64_t count, float* best, int32_t* best_id) {
  const float none = -__builtin_inff();
  const Vec lo = keep_first(replace_nan(load(acc), none), count, none);
  const Vec hi = keep_first(replace_nan(load(acc + kLanes), none), count - kLanes, none);
  const Vec both = max(lo, hi);
  if (count_at_least(both, *best) == 0) return;
  const float top = reduce_max(both);
  if (!(top > *best)) return;
  const int32_t in_lo = first_equal(lo, top);
  *best = top;
  *best_id = static_cast<int32_t>(first_id + (in_lo < kLanes ? in_lo : kLanes + first_equal(hi, top)));
}

// The epilogue of num_rows rows against `strip`, 32 accumulators each.
template <typename T>
ORTHRUS_INLINE void finish_rows(const RowLinearParamsOf<T>& p, const float* acc, int64_t first_row, int64_t num_rows,
                                int64_t strip) {
  const int64_t column = strip * kStrip;
  const int64_t count = min_of(kStrip, p.out_features - column);
  switch (p.epilogue) {
    case Epilogue::kNone:
    case Epilogue::kResidual: {
      const T* residual = p.epilogue == Epilogue::kResidual ? p.residual : nullptr;
      for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t at = (first_row + r) * p.out_features + column;
        for (int64_t i = 0; i < count; i += kLanes) {
          finish_lanes<T>(load(acc + r * kStrip + i), residual ? residual + at + i : nullptr,
                          static_cast<T*>(p.out) + at + i, count - i);
        }
      }
      break;
    }
    case Epilogue::kSiluMul: {
      const int64_t width = p.out_features / 2;
      const int64_t first = strip * kLanes;
      for (int64_t r = 0; r < num_rows; ++r) {
        const Vec gate = load(acc + r * kStrip);
        const Vec sigmoid_den = add(set1(1.f), exp(sub(zero(), gate)));
        // Below -88.3 exp grows no further: there the result is -0, for -inf NaN.
        const Vec silu = where_less(gate, -88.3f, mul(gate, zero()), div(gate, sigmoid_den));
        finish_lanes<T>(mul(silu, load(acc + r * kStrip + kLanes)), nullptr,
                        static_cast<T*>(p.out) + (first_row + r) * width + first, width - first);
      }
      break;
    }
    case Epilogue::kLogits:
      for (int64_t r = 0; r < num_rows; ++r) {
        std::memcpy(static_cast<float*>(p.out) + (first_row + r) * p.out_features + column, acc + r * kStrip,
                    count * sizeof(float));
      }
      break;
    case Epilogue::kArgmax:
      for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t at = (first_row + r) * p.num_partials + column / kArgmaxTile;
        if (column % kArgmaxTile == 0) {
          p.partial_value[at] = -__builtin_inff();
          p.partial_id[at] = static_cast<int32_t>(column);
        }
        update_argmax(acc + r * kStrip, column, count, p.partial_value + at, p.partial_id + at);
      }
      break;
  }
}

// One view's weight. leading_only: the leading parts suffice, or there are no others.
struct Weight {
  const char* data;
  bool coded, leading_only;
};

// Bytes from a strip of num_steps steps to the next one; of coded strips, from leading part to leading part.
ORTHRUS_INLINE int64_t strip_bytes_of(Weight weight, int64_t num_steps) {
  return weight.coded ? leading_strip_bytes(num_steps) : num_steps * kStepBytes;
}

// Rows [begin, end) against one strip of `weight`, in row tiles of nearly equal height.
template <typename T>
ORTHRUS_INLINE void multiply_strip(const RowLinearParamsOf<T>& p, Weight weight, int64_t strip, int64_t begin,
                                   int64_t end) {
  const int64_t num_steps = div_up(p.in_features, kPerWord<T>);
  const int64_t strip_bytes = strip_bytes_of(weight, num_steps);
  const char* stored = weight.data + strip * strip_bytes;
  const char* plain = stored;
  // What the first two of many tiles fetch, a line per step: the halves of the next strip, or of coded ones nearly all
  // of its leading part and, in every second strip, the trailing parts of the next two.
  Ahead next[] = {{stored + strip_bytes, 1}, {stored + strip_bytes + num_steps * kLineBytes, 1}};
  const int64_t num_tiles = div_up(end - begin, kTileRows);
  const bool few = end - begin <= most_rows_without_ahead;
  alignas(64) float acc[kTileRows * kStrip];
  const auto multiply = [&](auto of_rows, const char* w, auto ahead) ORTHRUS_LAMBDA {
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t first = (end - begin) * t / num_tiles;
      const int64_t last = (end - begin) * (t + 1) / num_tiles;
      const T* x = p.x + (begin + first) * p.in_features;
      of_rows(last - first)(x, p.in_features, w, p.in_features, ahead(t), acc);
      finish_rows(p, acc, begin + first, last - first, strip);
    }
  };
#if defined(ORTHRUS_DECODES_WORDS)
  if constexpr (kPerWord<T> == 2) {
    const auto multiply_coded = [&](auto exact) ORTHRUS_LAMBDA {
      // Several tiles alternate between fetching the next strip and the one after it. All lines have then been
      // requested before, but requesting them once is slower.
      multiply(MultiplyTileOf<T, CodedWords<decltype(exact)::value>>(), stored, [&](int64_t tile) ORTHRUS_LAMBDA {
        if (num_tiles == 1) return Ahead{stored + kAheadUnits * kLeadingBytes, few ? 0 : 2};
        return Ahead{stored + (1 + tile % 2) * strip_bytes, few ? 0 : 1};
      });
    };
    if (weight.coded && num_tiles <= kMostDecodingTiles) {
      return weight.leading_only ? multiply_coded(std::false_type()) : multiply_coded(std::true_type());
    }
    if (weight.coded) {
      char* decoded = reinterpret_cast<char*>(thread_scratch(num_steps * kStrip));
      weight.leading_only ? CodedRuns<false>(stored).decode(num_steps, decoded)
                          : CodedRuns<true>(stored).decode(num_steps, decoded);
      plain = decoded;
      const char* trailing = reinterpret_cast<const CodedStrip*>(stored)->trailing();
      next[1] = {trailing + num_steps / kUnitSteps * kTrailingBytes, !weight.leading_only && strip % 2 == 0};
    }
  }
#endif
  // Several tiles read the strip from cache.
  multiply(MultiplyTileOf<T, PlainWords>(), plain, [&](int64_t tile) ORTHRUS_LAMBDA {
    if (num_tiles == 1) return Ahead{stored + kAheadBytes, few ? 0 : 2};
    return tile < 2 ? next[tile] : Ahead{stored, 0};
  });
}

// body(first_strip, last_strip) over all strips, in parallel; one partial maximum belongs to one thread.
template <typename T, typename Body>
ORTHRUS_INLINE void parallel_strips(const RowLinearParamsOf<T>& p, int64_t chunks_per_thread, Body body) {
  const int64_t num_strips = div_up(p.out_features, kStrip);
  const int64_t unit = p.epilogue == Epilogue::kArgmax ? kArgmaxTile / kStrip : 1;
  parallel_for(
      div_up(num_strips, unit), 1,
      [&](int64_t begin, int64_t end) { body(begin * unit, min_of(end * unit, num_strips)); }, chunks_per_thread);
}

// body(weight, begin, end) over all rows, in blocks of one view and at most `most` rows.
template <typename T, typename Body>
ORTHRUS_INLINE void for_row_blocks(const RowLinearParamsOf<T>& p, int64_t most, Body body) {
  const int64_t rows_ar = p.weight_diff ? p.num_rows_ar : p.num_rows;
  for (int64_t begin = 0, end; begin < p.num_rows; begin = end) {
    end = min_of(begin + most, begin < rows_ar ? rows_ar : p.num_rows);
    const bool is_ar = begin < rows_ar;
    const int bits = is_ar ? p.weight_bits : p.weight_diff_bits;
    body(Weight{static_cast<const char*>(is_ar ? p.weight : p.weight_diff), is_coded(bits),
                bits == kDraftBits || p.leading_only},
         begin, end);
  }
}

template <typename T>
inline void row_linear(const RowLinearParamsOf<T>& p) {
  parallel_strips(p, kChunksPerThread, [&](int64_t first_strip, int64_t last_strip) {
    for (int64_t strip = first_strip; strip < last_strip; ++strip) {
      for_row_blocks(p, p.num_rows, [&](Weight weight, int64_t begin, int64_t end) {
        multiply_strip(p, weight, strip, begin, end);
      });
    }
  });
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
