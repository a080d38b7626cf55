// row_linear over bf16 where no instruction multiplies pairs of them: rows are widened to floats once for all strips,
// weights whenever they are multiplied. A strip is taken in blocks over k: a block, and of a tile's rows what it meets,
// stay in the L1 cache while all tiles pass over it. Between blocks the accumulators wait in memory.
#pragma once
#include "row_linear.h"

namespace orthrus::cpu::ORTHRUS_ISA {

// Steps of a block at most: 16 KiB.
constexpr int64_t kBlockSteps = 128;
// Bytes of widened rows in a block of rows, which should stay in the L2 cache; and its rows: few would read all strips
// too often, of many the accumulators would not lie on the stack.
constexpr int64_t kWidenedBytes = 1 << 18;
constexpr int64_t kFewestRows = 48, kMostRows = 128;
// Fewer rows stream weights, best in long runs: fewer chunks a thread. More are long over a strip, and the threads are
// to end together. Measured with AVX2.
constexpr int64_t kStreamingRows = 32;
// Elements that are worth another thread's help when they are widened.
constexpr int64_t kWidenedAlone = 1 << 15;
// Tiles that share what a block prefetches.
constexpr int64_t kFetchingTiles = 2;

// What a call prefetches: `bytes` for each step, 128 at most, from `from` on.
struct AheadBytes {
  const char* from;
  int64_t bytes;
};

// acc[r][0 ... 16 kVecs) += kRows rows times those outputs of a block; or times its last 16, if w points to them.
template <int kRows, int kVecs>
inline __attribute__((noinline)) void multiply_block(const float* x, int64_t x_stride, const char* w, int64_t num_steps,
                                                     AheadBytes ahead, float* acc) {
  Vec sum[kRows][kVecs];
  ORTHRUS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    ORTHRUS_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[r][v] = load(acc + r * kStrip + v * kLanes);
  }
  const auto add_products = [&](auto element_of, const float* input) ORTHRUS_LAMBDA {
    Vec element[kVecs];
    ORTHRUS_UNROLL
    for (int v = 0; v < kVecs; ++v) element[v] = element_of(load_words(w + v * (kStepBytes / 2)));
    ORTHRUS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec from_row = set1(input[r * x_stride]);
      ORTHRUS_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(from_row, element[v], sum[r][v]);
    }
  };
  const auto stream = [&](auto lines) ORTHRUS_LAMBDA {
    constexpr int kLines = decltype(lines)::value;
    const char* line = ahead.from;
    const int64_t stride = kLines ? ahead.bytes / kLines : 0;
    for (int64_t k = 0; k < num_steps; ++k, w += kStepBytes, x += 2) {
      for (int i = 0; i < kLines; ++i, line += stride) prefetch(line);
      // First those of all first elements: half as many registers hold weights.
      add_products([](WordVec pairs) ORTHRUS_LAMBDA { return first_of(pairs); }, x);
      add_products([](WordVec pairs) ORTHRUS_LAMBDA { return second_of(pairs); }, x + 1);
    }
  };
  if (ahead.bytes > kLineBytes) {
    stream(std::integral_constant<int, 2>());
  } else if (ahead.bytes > 0) {
    stream(std::integral_constant<int, 1>());
  } else {
    stream(std::integral_constant<int, 0>());
  }
  ORTHRUS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    ORTHRUS_UNROLL
    for (int v = 0; v < kVecs; ++v) store(acc + r * kStrip + v * kLanes, sum[r][v]);
  }
}

// The same of `rows` rows and all outputs; of more than kTileRows rows in two halves, as registers are few.
template <int kRows = kWidenedTileRows>
ORTHRUS_INLINE void multiply_rows(int64_t rows, const float* x, int64_t x_stride, const char* w, int64_t num_steps,
                                  AheadBytes ahead, float* acc) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<kRows - 1>(rows, x, x_stride, w, num_steps, ahead, acc);
  }
  if constexpr (kRows <= kTileRows) {
    multiply_block<kRows, 2>(x, x_stride, w, num_steps, ahead, acc);
  } else {
    for (int v = 0; v < 2; ++v) {
      const AheadBytes half{ahead.from + v * num_steps * ahead.bytes / 2, ahead.bytes / 2};
      multiply_block<kRows, 1>(x, x_stride, w + v * (kStepBytes / 2), num_steps, half, acc + v * kLanes);
    }
  }
}

// acc[r][0 ... 31] = num_rows rows times a strip, in row tiles of nearly equal height.
ORTHRUS_INLINE void multiply_widened(const float* x, int64_t x_stride, int64_t num_rows, const char* strip,
                                     int64_t num_steps, float* acc) {
  std::memset(acc, 0, num_rows * kStrip * sizeof(float));
  const int64_t num_tiles = div_up(num_rows, kWidenedTileRows);
  const int64_t fetching = min_of(num_tiles, kFetchingTiles), bytes = kStepBytes / fetching;
  const int64_t steps = div_up(num_steps, div_up(num_steps, kBlockSteps));
  for (int64_t k = 0; k < num_steps; k += steps) {
    const int64_t count = min_of(steps, num_steps - k);
    const char* block = strip + k * kStepBytes;
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t first = num_rows * t / num_tiles, last = num_rows * (t + 1) / num_tiles;
      const AheadBytes ahead{block + kAheadBytes + t * count * bytes, t < fetching ? bytes : 0};
      multiply_rows(last - first, x + first * x_stride + 2 * k, x_stride, block, count, ahead, acc + first * kStrip);
    }
  }
}

// Rows [begin, end) as floats, `stride` apart, a zero behind an odd number of elements.
ORTHRUS_INLINE void widen_rows(const RowLinearParamsOf<bf16_t>& p, int64_t begin, int64_t end, int64_t stride,
                               float* out) {
  parallel_for(end - begin, div_up(kWidenedAlone, stride), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const bf16_t* x = p.x + (begin + r) * p.in_features;
      float* to = out + r * stride;
      int64_t k = 0;
      for (; k + kLanes <= p.in_features; k += kLanes) store(to + k, load(x + k));
      for (; k < p.in_features; ++k) to[k] = to_float(x[k]);
      if (k % 2) to[k] = 0.f;
    }
  });
}

template <>
inline void row_linear(const RowLinearParamsOf<bf16_t>& p) {
  const int64_t num_steps = div_up(p.in_features, 2);
  const int64_t stride = 2 * num_steps + kLanes;  // a power of two would crowd few sets of a cache
  const int64_t fit = kWidenedBytes / (stride * int64_t{sizeof(float)});
  const int64_t num_blocks = div_up(p.num_rows, min_of(max_of(kFewestRows, fit), kMostRows));
  for_row_blocks(p, div_up(p.num_rows, max_of(1, num_blocks)), [&](Weight weight, int64_t begin, int64_t end) {
    const int64_t num_rows = end - begin;
    float* x = thread_scratch(num_rows * stride);
    widen_rows(p, begin, end, stride, x);
    parallel_strips(p, num_rows < kStreamingRows ? 4 : 8, [&](int64_t first_strip, int64_t last_strip) {
      alignas(64) float acc[kMostRows * kStrip];
      for (int64_t strip = first_strip; strip < last_strip; ++strip) {
        multiply_widened(x, stride, num_rows, weight.data + strip * num_steps * kStepBytes, num_steps, acc);
        finish_rows(p, acc, begin, num_rows, strip);
      }
    });
  });
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
