// y = x W^T for any number of rows, streaming W once.
//
// Packed weight: strips of 32 outputs, each [ceil(in/2)][32][2]: the input pair of 32 outputs side by
// side, so that one step over k loads two PairVecs and feeds every row of the tile. For kSiluMul a
// strip holds 16 gates, then their 16 ups. Outputs and inputs are padded with zeros.
//
// Row-invariant: every output is one accumulator that runs over k in ascending order, whatever the
// tile, the row count or the thread.
#pragma once
#include "pool.h"
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr int kStrip = 32;
// Vocabulary ids per partial maximum.
constexpr int kArgmaxTile = 512;
// What a tile asks memory for while it computes: `lines` cache lines (0, 1 or 2) per step over k.
struct Ahead {
  const bf16_t* from;
  int64_t lines;
};
// Distance at which a lone tile, which reads each weight once, runs ahead of itself.
constexpr int kAheadBytes = 16384;
constexpr int kLineElements = 32;

// acc[r][0 ... 31] of kRows rows against one strip.
template <int kRows>
inline __attribute__((noinline)) void multiply_tile(const bf16_t* x, int64_t x_stride, const bf16_t* w,
                                                    int64_t in_features, Ahead ahead, float* acc) {
  Vec lo[kRows], hi[kRows];
  ORTHRUS_UNROLL
  for (int r = 0; r < kRows; ++r) lo[r] = hi[r] = zero();
  const auto step = [&](const bf16_t* weights, auto pair_of_row) ORTHRUS_LAMBDA {
    const PairVec w_lo = load_pairs(weights);
    const PairVec w_hi = load_pairs(weights + kStrip);
    ORTHRUS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const PairVec pair = set1_pair(pair_of_row(r));
      lo[r] = dot2(lo[r], w_lo, pair);
      hi[r] = dot2(hi[r], w_hi, pair);
    }
  };
  const int64_t num_pairs = in_features / 2;
  const auto stream = [&](auto prefetch_at) ORTHRUS_LAMBDA {
    for (int64_t k = 0; k < num_pairs; ++k) {
      prefetch_at(k);
      step(w + 2 * kStrip * k, [&](int r) ORTHRUS_LAMBDA { return load_pair(x + r * x_stride + 2 * k); });
    }
  };
  if (ahead.lines == 2) {
    stream([&](int64_t k) ORTHRUS_LAMBDA {
      prefetch(ahead.from + 2 * k * kLineElements);
      prefetch(ahead.from + (2 * k + 1) * kLineElements);
    });
  } else if (ahead.lines == 1) {
    stream([&](int64_t k) ORTHRUS_LAMBDA { prefetch(ahead.from + k * kLineElements); });
  } else {
    stream([](int64_t) ORTHRUS_LAMBDA {});
  }
  if (in_features % 2) {
    step(w + 2 * kStrip * num_pairs,
         [&](int r) ORTHRUS_LAMBDA { return uint32_t{x[r * x_stride + in_features - 1]}; });
  }
  ORTHRUS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    store(acc + r * kStrip, lo[r]);
    store(acc + r * kStrip + kLanes, hi[r]);
  }
}

using MultiplyTile = void (*)(const bf16_t*, int64_t, const bf16_t*, int64_t, Ahead, float*);

template <int kRows = kTileRows>
ORTHRUS_INLINE MultiplyTile multiply_tile_of(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_tile_of<kRows - 1>(rows);
  }
  return multiply_tile<kRows>;
}

// Writes `count` lanes of v, rounded, at out; adds `residual` first if there is one (it may alias out).
ORTHRUS_INLINE void finish_bf16(Vec v, const bf16_t* residual, bf16_t* out, int64_t count) {
  if (count >= kLanes) {
    store_bf16(out, residual ? add(v, load_bf16(residual)) : v);
    return;
  }
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(residual ? lanes[i] + to_float(residual[i]) : lanes[i]);
}

ORTHRUS_INLINE void update_argmax(const float* acc, int64_t first_id, int64_t count, float* best, int32_t* best_id) {
  for (int half = 0; half < 2; ++half) {
    const Vec v = keep_first(replace_nan(load(acc + half * kLanes), -__builtin_inff()), count - half * kLanes,
                             -__builtin_inff());
    const float top = reduce_max(v);
    if (top > *best) {
      *best = top;
      *best_id = static_cast<int32_t>(first_id + half * kLanes + first_equal(v, top));
    }
  }
}

// One row of 32 accumulators of `strip` to where the epilogue wants it.
ORTHRUS_INLINE void finish_row(const RowLinearParams& p, const float* acc, int64_t row, int64_t strip) {
  const int64_t column = strip * kStrip;
  const int64_t count = min_of(kStrip, p.out_features - column);
  switch (static_cast<Epilogue>(p.epilogue)) {
    case Epilogue::kNone:
    case Epilogue::kResidual: {
      const int64_t at = row * p.out_features + column;
      const bool add_residual = p.epilogue == static_cast<int32_t>(Epilogue::kResidual);
      for (int64_t i = 0; i < count; i += kLanes) {
        finish_bf16(load(acc + i), add_residual ? p.residual + at + i : nullptr, static_cast<bf16_t*>(p.out) + at + i,
                    count - i);
      }
      break;
    }
    case Epilogue::kSiluMul: {
      const int64_t width = p.out_features / 2;
      const int64_t first = strip * kLanes;
      const Vec gate = load(acc);
      const Vec sigmoid_den = add(set1(1.f), exp(sub(zero(), gate)));
      finish_bf16(mul(div(gate, sigmoid_den), load(acc + kLanes)), nullptr,
                  static_cast<bf16_t*>(p.out) + row * width + first, width - first);
      break;
    }
    case Epilogue::kLogits:
      std::memcpy(static_cast<float*>(p.out) + row * p.out_features + column, acc, count * sizeof(float));
      break;
    case Epilogue::kArgmax: {
      const int64_t at = row * p.num_partials + column / kArgmaxTile;
      if (column % kArgmaxTile == 0) {
        p.partial_value[at] = -__builtin_inff();
        p.partial_id[at] = static_cast<int32_t>(column);
      }
      update_argmax(acc, column, count, p.partial_value + at, p.partial_id + at);
      break;
    }
  }
}

// Rows [begin, end) against one strip of `weight`, in row tiles of nearly equal height.
ORTHRUS_INLINE void multiply_strip(const RowLinearParams& p, const void* weight, int64_t strip, int64_t begin,
                                   int64_t end) {
  if (begin == end) return;
  const int64_t strip_size = div_up(p.in_features, 2) * 2 * kStrip;
  const bf16_t* w = static_cast<const bf16_t*>(weight) + strip * strip_size;
  const int64_t num_tiles = div_up(end - begin, kTileRows);
  alignas(64) float acc[kTileRows * kStrip];
  // Several tiles read the strip from cache: the first two fetch one half of the next strip each.
  const auto ahead = [&](int64_t tile) ORTHRUS_LAMBDA -> Ahead {
    if (num_tiles == 1) return {w + kAheadBytes / 2, 2};
    return {w + strip_size + tile * (strip_size / 2), tile < 2};
  };
  for (int64_t t = 0; t < num_tiles; ++t) {
    const int64_t first = begin + (end - begin) * t / num_tiles;
    const int64_t last = begin + (end - begin) * (t + 1) / num_tiles;
    multiply_tile_of(last - first)(p.x + first * p.x_stride, p.x_stride, w, p.in_features, ahead(t), acc);
    for (int64_t r = first; r < last; ++r) finish_row(p, acc + (r - first) * kStrip, r, strip);
  }
}

inline void row_linear(const RowLinearParams& p) {
  if (p.num_rows == 0) return;
  const int64_t rows_ar = p.weight_diff ? p.num_rows_ar : p.num_rows;
  const int64_t num_strips = div_up(p.out_features, kStrip);
  // One partial maximum belongs to one thread.
  const int64_t unit = p.epilogue == static_cast<int32_t>(Epilogue::kArgmax) ? kArgmaxTile / kStrip : 1;
  parallel_for(div_up(num_strips, unit), 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin * unit; strip < min_of(end * unit, num_strips); ++strip) {
      multiply_strip(p, p.weight, strip, 0, rows_ar);
      multiply_strip(p, p.weight_diff, strip, rows_ar, p.num_rows);
    }
  });
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
