// row_linear over bf16 where no instruction multiplies pairs of bf16: rows are widened to floats once for all strips,
// weights each time they are multiplied. A strip is taken in blocks over k: a block, and the part of a tile's rows that
// it multiplies, stay in the L1 cache while all tiles pass over it. Between blocks the accumulators wait in memory.
#pragma once
#include "row_linear.h"

namespace orthrus::cpu::ORTHRUS_ISA {

// Steps of a block at most: 16 KiB. A coded block (kCodedBlockSteps) is in the cache twice, and because it is unpacked
// in one go, all of it should have arrived by then: it has to be well below kAheadBytes.
constexpr int64_t kBlockSteps = 128;
// Bytes of widened rows in a block of rows, which should stay in the L2 cache; and its number of rows: too few would
// read all strips too often, and the accumulators of too many would not fit on the stack.
constexpr int64_t kWidenedBytes = 1 << 18;
constexpr int64_t kFewestRows = 48, kMostRows = 128;
// From this many elements on, another thread helps to widen rows.
constexpr int64_t kWidenedAlone = 1 << 15;
// Tiles that share what a block prefetches.
constexpr int64_t kFetchingTiles = 2;

// What a call prefetches: `bytes` per step, starting at `from`.
struct AheadBytes {
  const char* from;
  int64_t bytes;
};

// The steps of a block in the layout of a plain strip.
struct PlainSteps {
  static constexpr int kTogether = 1;
  static constexpr int kMostTileRows = kWidenedTileRows;
  const char* at;

  // Outputs 16 kVec ... 16 kVec + 15 of the kStep-th of the steps taken together.
  template <int kStep, int kVec>
  ORTHRUS_INLINE WordVec words() const { return load_words(at + kVec * (kStepBytes / 2)); }
  ORTHRUS_INLINE void advance() { at += kStepBytes; }
};

#if defined(ORTHRUS_DECODES_WORDS)
// Unpacked in registers, as far as the sums of the rows leave some for that.
template <bool kExact>
struct CodedSteps {
  static constexpr int kTogether = kUnitSteps;
  static constexpr int kMostTileRows = kDecodingTileRows;
  CodedUnits<kExact> units;

  template <int kStep, int kVec>
  ORTHRUS_INLINE WordVec words() const {
    const StepWords both = units.template step<kStep>();
    return kVec ? both.hi : both.lo;
  }
  ORTHRUS_INLINE void advance() { units.advance(1); }
};
#endif

// acc[r][16 kFirst ... 16 (kFirst + kVecs)) += kRows rows times those outputs of a block.
template <int kRows, int kFirst, int kVecs, typename Steps>
inline __attribute__((noinline)) void multiply_block(const float* x, int64_t x_stride, Steps steps, int64_t num_steps,
                                                     AheadBytes ahead, float* acc) {
  acc += kFirst * kLanes;
  Vec sum[kRows][kVecs];
  ORTHRUS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    ORTHRUS_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[r][v] = load(acc + r * kStrip + v * kLanes);
  }
  const auto add_products = [&](auto first, auto last, const float* input) ORTHRUS_LAMBDA {
    const Vec element[] = {first, last};
    ORTHRUS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec from_row = set1(input[r * x_stride]);
      ORTHRUS_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(from_row, element[v], sum[r][v]);
    }
  };
  const auto add_step = [&](auto step) ORTHRUS_LAMBDA {
    constexpr int kStep = decltype(step)::value, kLast = kFirst + kVecs - 1;
    // First the products of all first elements: then half as many registers hold weights.
    add_products(first_of(steps.template words<kStep, kFirst>()), first_of(steps.template words<kStep, kLast>()),
                 x + 2 * kStep);
    add_products(second_of(steps.template words<kStep, kFirst>()), second_of(steps.template words<kStep, kLast>()),
                 x + 2 * kStep + 1);
  };
  const int64_t ahead_bytes = ahead.bytes * Steps::kTogether;
  const auto stream = [&](auto lines) ORTHRUS_LAMBDA {
    constexpr int kLines = decltype(lines)::value;
    const char* line = ahead.from;
    const int64_t stride = kLines ? ahead_bytes / kLines : 0;
    for (int64_t k = 0; k < num_steps; k += Steps::kTogether, steps.advance(), x += 2 * Steps::kTogether) {
      for (int i = 0; i < kLines; ++i, line += stride) prefetch_once(line);
      add_step(std::integral_constant<int, 0>());
      if constexpr (Steps::kTogether == 2) add_step(std::integral_constant<int, 1>());
    }
  };
  if (ahead_bytes > 2 * kLineBytes) {
    stream(std::integral_constant<int, 3>());
  } else if (ahead_bytes > kLineBytes) {
    stream(std::integral_constant<int, 2>());
  } else if (ahead_bytes > 0) {
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

// The same for `rows` rows and all outputs; for more than kWholeTileRows rows in two halves, as registers are few.
template <typename Steps, int kRows = Steps::kMostTileRows>
ORTHRUS_INLINE void multiply_rows(int64_t rows, const float* x, int64_t x_stride, Steps steps, int64_t num_steps,
                                  AheadBytes ahead, float* acc) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<Steps, kRows - 1>(rows, x, x_stride, steps, num_steps, ahead, acc);
  }
  if constexpr (kRows <= kWholeTileRows) {
    multiply_block<kRows, 0, 2>(x, x_stride, steps, num_steps, ahead, acc);
  } else {
    ahead.bytes /= 2;
    multiply_block<kRows, 0, 1>(x, x_stride, steps, num_steps, ahead, acc);
    ahead.from += num_steps * ahead.bytes;
    multiply_block<kRows, 1, 1>(x, x_stride, steps, num_steps, ahead, acc);
  }
}

// The blocks of a strip, in order: next(...) calls use(steps) with the steps of the block at next_block().
struct PlainBlocks {
  static constexpr int64_t kBytes = kStepBytes;  // stored bytes per step
  static constexpr int64_t kMostSteps = kBlockSteps;
  const char* at;

  explicit PlainBlocks(const char* strip) : at(strip) {}

  ORTHRUS_INLINE const char* next_block() const { return at; }
  template <typename Use>
  ORTHRUS_INLINE void next(int64_t num_steps, int64_t, Use use) {
    use(PlainSteps{at});
    at += num_steps * kBytes;
  }
};

#if defined(ORTHRUS_DECODES_WORDS)
// Few rows unpack them as they go; more rows read them unpacked, from the L1 cache.
template <bool kExact>
struct CodedBlocks {
  static constexpr int64_t kBytes = kLeadingBytes / kUnitSteps;
  static constexpr int64_t kMostSteps = kCodedBlockSteps;
  CodedRuns<kExact> runs;
  alignas(64) char decoded[kCodedBlockSteps * kStepBytes];

  explicit CodedBlocks(const char* strip) : runs(strip) {}

  ORTHRUS_INLINE const char* next_block() const { return runs.units.leading; }
  template <typename Use>
  ORTHRUS_INLINE void next(int64_t num_steps, int64_t num_rows, Use use) {
    if constexpr (kExact) prefetch_trailing(num_steps);
    if (num_rows <= CodedSteps<kExact>::kMostTileRows && !runs.has_exception(num_steps)) {
      use(CodedSteps<kExact>{runs.units});
      runs.skip(num_steps);
    } else {
      runs.decode(num_steps, decoded);
      use(PlainSteps{decoded});
    }
  }

 private:
  // As many bytes as a block has, the same number of steps ahead as the leading part.
  ORTHRUS_INLINE void prefetch_trailing(int64_t num_steps) const {
    const char* from = runs.units.trailing + kAheadBytes / kLeadingBytes * kTrailingBytes;
    for (int64_t k = 0; k < num_steps; k += kUnitSteps, from += kTrailingBytes) prefetch_once(from);
  }
};
#endif

// acc[r][0 ... 31] = num_rows rows times a strip, in row tiles of nearly equal height.
template <typename Blocks>
inline void multiply_widened(const float* x, int64_t x_stride, int64_t num_rows, const char* strip, int64_t num_steps,
                             float* acc) {
  std::memset(acc, 0, num_rows * kStrip * sizeof(float));
  const int64_t num_tiles = div_up(num_rows, kWidenedTileRows);
  const int64_t fetching = min_of(num_tiles, kFetchingTiles), bytes = Blocks::kBytes / fetching;
  const int64_t num_units = div_up(num_steps, kUnitSteps);
  const int64_t num_blocks = div_up(num_units, Blocks::kMostSteps / kUnitSteps);
  const int64_t steps_of_block = kUnitSteps * div_up(num_units, num_blocks);
  Blocks blocks(strip);
  for (int64_t k = 0; k < num_steps; k += steps_of_block) {
    const int64_t count = min_of(steps_of_block, num_steps - k);
    const char* ahead = blocks.next_block() + kAheadBytes;
    blocks.next(count, num_rows, [&](auto steps) ORTHRUS_LAMBDA {
      for (int64_t t = 0; t < num_tiles; ++t) {
        const int64_t first = num_rows * t / num_tiles, last = num_rows * (t + 1) / num_tiles;
        multiply_rows(last - first, x + first * x_stride + 2 * k, x_stride, steps, count,
                      {ahead + t * count * bytes, t < fetching ? bytes : 0}, acc + first * kStrip);
      }
    });
  }
}

// Rows [begin, end) as floats, `stride` apart, with a zero behind an odd number of elements.
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
  const int64_t stride = 2 * num_steps + kLanes;  // a power of two would map to few sets of a cache
  const int64_t fit = kWidenedBytes / (stride * int64_t{sizeof(float)});
  const int64_t num_blocks = div_up(p.num_rows, min_of(max_of(kFewestRows, fit), kMostRows));
  for_row_blocks(p, div_up(p.num_rows, max_of(1, num_blocks)), [&](Weight weight, int64_t begin, int64_t end) {
    const int64_t num_rows = end - begin;
    float* x = thread_scratch(num_rows * stride);
    widen_rows(p, begin, end, stride, x);
    auto multiply = multiply_widened<PlainBlocks>;
#if defined(ORTHRUS_DECODES_WORDS)
    if (weight.coded) multiply = multiply_widened<CodedBlocks<true>>;
    if (weight.coded && weight.leading_only) multiply = multiply_widened<CodedBlocks<false>>;
#endif
    parallel_strips(p, kChunksPerThread, [&](int64_t first_strip, int64_t last_strip) {
      alignas(64) float acc[kMostRows * kStrip];
      for (int64_t strip = first_strip; strip < last_strip; ++strip) {
        const char* at = weight.data + strip * strip_bytes_of(weight, num_steps);
        multiply(x, stride, num_rows, at, num_steps, acc);
        finish_rows(p, acc, begin, num_rows, strip);
      }
    });
  });
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
