// row_linear of bf16 on AMX tiles, over the same packed weights: each of their WordVecs is one row of a column tile.
//
// A strip of 32 outputs is multiplied by 32 rows at a time, a pair of tiles, in 2 x 2 products. Rows are cut into tiles
// of equal height, so that one set of shapes serves them all. If they do not divide evenly, the last tile overlaps its
// neighbour and computes the shared rows' bits again.
//
// A pair goes through a group of strips before the next pair does: its rows then stay in the L1 cache, the group in the
// L2 cache. Products, memory and epilogues must overlap, but loads that miss hold up the tile loads behind them, and
// the processor looks only a few steps ahead. So every pair prefetches its share of the next group, a few lines at a
// time between tile loads, and the sums of one strip are finished in the middle of the next.
#pragma once
#include "amx.h"
#include "row_linear.h"

namespace orthrus::cpu::ORTHRUS_ISA {

// Blocks of rows are larger than with vectors: products are so fast here that rereading the strips would show.
constexpr int64_t kMinTileRowBlock = 256;
// Bytes of inputs per block, which should stay in the L2 cache.
constexpr int64_t kRowBlockBytes = 1 << 20;
// Bytes of a strip that one step over k reads.
constexpr int64_t kTileStepBytes = kTileDepth / 2 * kStepBytes;

// Bytes of strips in a group.
constexpr int64_t kGroupBytes = 144 << 10;
// How far ahead a pair prefetches a strip that no pair before it has prefetched.
constexpr int64_t kTileAheadBytes = 8192;
// How many of a step's 32 lines of the next group all pairs together prefetch. The hardware prefetcher, which sees them
// in order, fetches the rest; prefetching all of them takes longer.
constexpr int64_t kPrefetchedLines = 24;
// Places within a step of two tiles where lines are prefetched.
constexpr int64_t kPrefetchPlaces = 4;

// The last in_features % 32 inputs, zero-padded: neither a row nor a strip may be read past its end.
struct TileTail {
  alignas(64) bf16_t rows[2][kTileHeight][kTileDepth];
  alignas(64) char columns[kTileStepBytes];
};

// One or two tiles of `height` rows each: tile t begins at row[t], which is stored at x[t]. Its first again[t] rows
// also belong to another tile and are finished there.
struct TilePair {
  int num_tiles;
  int64_t height;
  int64_t row[2], again[2];
  const bf16_t* x[2];
};

// Pair `pair` of the tiles of rows [begin, end).
ORTHRUS_INLINE TilePair tile_pair(const RowLinearParamsOf<bf16_t>& p, int64_t begin, int64_t end, int64_t height,
                                  int64_t pair) {
  TilePair rows{};
  rows.num_tiles = begin + (2 * pair + 1) * height < end ? 2 : 1;
  rows.height = height;
  for (int t = 0; t < 2; ++t) {
    const int64_t first = begin + (2 * pair + t) * height;
    rows.row[t] = min_of(first, end - height);
    rows.again[t] = first - rows.row[t];
    rows.x[t] = p.x + rows.row[t] * p.in_features;
  }
  return rows;
}

// Adds steps [begin, end) over k of a pair against one strip, prefetching ahead.lines lines per step, with two tiles a
// multiple of kPrefetchPlaces.
template <bool kTwo>
inline __attribute__((noinline)) void multiply_steps(const TilePair& rows, int64_t in_features, const char* w,
                                                     int64_t begin, int64_t end, Ahead ahead) {
  // With two tiles they are spread evenly between the loads; a lone tile only loses time by that.
  const int64_t lines = kTwo ? ahead.lines / kPrefetchPlaces : ahead.lines;
  const char* from = ahead.from + begin * ahead.lines * kLineBytes;
  const auto prefetch_lines = [&]() ORTHRUS_LAMBDA {
    for (int64_t i = 0; i < lines; ++i, from += kLineBytes) prefetch(from);
  };
  for (int64_t k = begin; k < end; ++k) {
    const char* columns = w + k * kTileStepBytes;
    prefetch_lines();
    tile_stream<kColumns0>(columns, kStepBytes);
    if (kTwo) prefetch_lines();
    tile_load<kRows0>(rows.x[0] + k * kTileDepth, in_features * sizeof(bf16_t));
    tile_dot<kSum00, kRows0, kColumns0>();
    if (kTwo) prefetch_lines();
    tile_stream<kColumns1>(columns + kStepBytes / 2, kStepBytes);
    tile_dot<kSum01, kRows0, kColumns1>();
    if (kTwo) {
      prefetch_lines();
      tile_load<kRows1>(rows.x[1] + k * kTileDepth, in_features * sizeof(bf16_t));
      tile_dot<kSum10, kRows1, kColumns0>();
      tile_dot<kSum11, kRows1, kColumns1>();
    }
  }
}

// Adds the last in_features % 32 inputs.
template <bool kTwo>
inline __attribute__((noinline)) void multiply_tail(const TilePair& rows, const char* w, int64_t in_features) {
  const int64_t num_steps = in_features / kTileDepth, rest = in_features % kTileDepth;
  TileTail tail;
  std::memset(&tail, 0, sizeof tail);
  for (int t = 0; t < rows.num_tiles; ++t) {
    for (int64_t r = 0; r < rows.height; ++r) {
      std::memcpy(tail.rows[t][r], rows.x[t] + r * in_features + num_steps * kTileDepth, rest * sizeof(bf16_t));
    }
  }
  std::memcpy(tail.columns, w + num_steps * kTileStepBytes, div_up(rest, 2) * kStepBytes);
  tile_step<kTwo, true>({tail.rows[0][0], kTileDepth}, {tail.rows[1][0], kTileDepth}, tail.columns,
                        tail.columns + kStepBytes / 2, kStepBytes);
}

// Sums of a pair against one strip, [2 * height][32].
struct StripSums {
  alignas(64) float acc[2 * kTileHeight * kStrip];
  TilePair rows;
  int64_t strip;
};

ORTHRUS_INLINE void finish_sums(const RowLinearParamsOf<bf16_t>& p, const StripSums& sums) {
  const TilePair& rows = sums.rows;
  for (int t = 0; t < rows.num_tiles; ++t) {
    const int64_t again = rows.again[t];
    finish_rows(p, sums.acc + (t * rows.height + again) * kStrip, rows.row[t] + again, rows.height - again, sums.strip);
  }
}

// Computes the sums of sums.rows against sums.strip, at w; halfway through, finishes `last`, if there is one.
template <bool kTwo>
ORTHRUS_INLINE void multiply_strip_amx(const RowLinearParamsOf<bf16_t>& p, const char* w, Ahead ahead,
                                       const StripSums* last, StripSums& sums) {
  const int64_t num_steps = p.in_features / kTileDepth, height = sums.rows.height;
  tile_zero<kSum00>();
  tile_zero<kSum01>();
  if (kTwo) {
    tile_zero<kSum10>();
    tile_zero<kSum11>();
  }
  multiply_steps<kTwo>(sums.rows, p.in_features, w, 0, num_steps / 2, ahead);
  if (last) finish_sums(p, *last);
  multiply_steps<kTwo>(sums.rows, p.in_features, w, num_steps / 2, num_steps, ahead);
  if (p.in_features % kTileDepth) multiply_tail<kTwo>(sums.rows, w, p.in_features);
  constexpr int64_t kAccStride = kStrip * sizeof(float);
  tile_store<kSum00>(sums.acc, kAccStride);
  tile_store<kSum01>(sums.acc + kStrip / 2, kAccStride);
  if (kTwo) {
    tile_store<kSum10>(sums.acc + height * kStrip, kAccStride);
    tile_store<kSum11>(sums.acc + height * kStrip + kStrip / 2, kAccStride);
  }
}

// Rows [begin, end) against strips [first_strip, last_strip) of `weight`.
ORTHRUS_INLINE void multiply_strips_amx(const RowLinearParamsOf<bf16_t>& p, const char* weight, int64_t first_strip,
                                        int64_t last_strip, int64_t begin, int64_t end) {
  const int64_t num_tiles = div_up(end - begin, kTileHeight), height = div_up(end - begin, num_tiles);
  const int64_t num_pairs = div_up(num_tiles, 2);
  const int64_t strip_bytes = div_up(p.in_features, 2) * kStepBytes, num_steps = p.in_features / kTileDepth;
  const int64_t group = num_pairs == 1 ? last_strip - first_strip : max_of(1, kGroupBytes / strip_bytes);
  const auto at = [&](int64_t strip) ORTHRUS_LAMBDA { return weight + strip * strip_bytes; };
  StripSums sums[2];  // of this strip and of the one before
  int now = 0;
  bool first = true;
  const TileShapes shapes(height);
  for (int64_t group_begin = first_strip; group_begin < last_strip; group_begin += group) {
    const int64_t group_end = min_of(group_begin + group, last_strip);
    const char* next = at(group_end);
    const char* next_end = at(min_of(group_end + group, last_strip));
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
      // The first group has not been prefetched: its first pair prefetches for itself.
      const bool by_itself = pair == 0 && group_begin == first_strip;
      const int64_t helpers = num_pairs - (group_begin == first_strip);
      for (int64_t strip = group_begin; strip < group_end; ++strip) {
        Ahead ahead{at(strip) + kTileAheadBytes, kTileStepBytes / kLineBytes};
        if (!by_itself) {
          const int64_t per_place = max_of(1, kPrefetchedLines / kPrefetchPlaces / helpers);
          ahead = {next, next < next_end ? per_place * kPrefetchPlaces : 0};
          next += num_steps * ahead.lines * kLineBytes;
        }
        sums[now].rows = tile_pair(p, begin, end, height, pair);
        sums[now].strip = strip;
        const auto multiply = sums[now].rows.num_tiles == 2 ? multiply_strip_amx<true> : multiply_strip_amx<false>;
        multiply(p, at(strip), ahead, first ? nullptr : &sums[1 - now], sums[now]);
        now = 1 - now;
        first = false;
      }
    }
  }
  if (!first) finish_sums(p, sums[1 - now]);
}

template <>
inline void row_linear(const RowLinearParamsOf<bf16_t>& p) {
  const int64_t most = max_of(kMinTileRowBlock, kRowBlockBytes / (p.in_features * int64_t{sizeof(bf16_t)}));
  // One run of strips per thread, as each run begins with a cold cache.
  parallel_strips(p, 1, [&](int64_t first_strip, int64_t last_strip) {
    for_row_blocks(p, most, [&](Weight weight, int64_t begin, int64_t end) {
      multiply_strips_amx(p, weight.data, first_strip, last_strip, begin, end);
    });
  });
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
