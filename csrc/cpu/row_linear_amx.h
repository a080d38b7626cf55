// row_linear of bf16 on AMX tiles, over the same packed weights: two of its words make a row of a column tile.
//
// A strip of 32 outputs meets 32 rows at a time in 2 x 2 tiles. Rows are cut into tiles of one height, so that one
// set of shapes serves them all; the last tile overlaps its neighbour where they do not come out even, and computes
// the shared rows' bits again.
#pragma once
#include "amx.h"
#include "row_linear.h"

namespace orthrus::cpu::ORTHRUS_ISA {

// Rows whose inputs stay in the L2 cache while the strips pass by, if there are very many.
constexpr int64_t kRowBlockBytes = 1 << 20;
constexpr int64_t kMinRowBlock = 256;
// Bytes of a strip that one step over k reads.
constexpr int64_t kTileStepBytes = kTileDepth / 2 * kStepBytes;

// Distance at which the first pair of tiles that meets a strip runs ahead of itself. The others find it in cache, and
// would only be held up: requests to memory and tile loads wait in the same buffers. (Unrolled, the loop below costs a
// lone row a tenth of its time.)
constexpr int64_t kTileAheadBytes = 8192;

// The last in_features % 32 inputs, zeros behind them: neither a row nor a strip may be read past its end.
struct TileTail {
  alignas(64) bf16_t rows[2][kTileHeight][kTileDepth];
  alignas(64) char columns[kTileStepBytes];
};

// acc[r][0 ... 31] of the tile of rows at x[0] and, with kTwo, of the one at x[1], against one strip; asks memory for
// lines_ahead lines per step meanwhile.
template <bool kTwo>
inline __attribute__((noinline)) void multiply_tiles(const bf16_t* const* x, int64_t x_stride, int64_t height,
                                                     const char* w, int64_t in_features, int64_t lines_ahead,
                                                     float* acc) {
  tile_zero<kSum00>();
  tile_zero<kSum01>();
  if (kTwo) {
    tile_zero<kSum10>();
    tile_zero<kSum11>();
  }
  const auto step = [](TileRows rows0, TileRows rows1, const char* columns) ORTHRUS_LAMBDA {
    tile_step<kTwo, true>(rows0, rows1, columns, columns + kStepBytes / 2, kStepBytes);
  };
  const int64_t num_steps = in_features / kTileDepth, rest = in_features % kTileDepth;
  for (int64_t k = 0; k < num_steps; ++k) {
    const char* ahead = w + k * kTileStepBytes + kTileAheadBytes;
    for (int64_t i = 0; i < lines_ahead; ++i) prefetch(ahead + i * kLineBytes);
    step({x[0] + k * kTileDepth, x_stride}, {x[1] + k * kTileDepth, x_stride}, w + k * kTileStepBytes);
  }
  if (rest) {
    TileTail tail;
    std::memset(&tail, 0, sizeof tail);
    for (int t = 0; t < (kTwo ? 2 : 1); ++t) {
      for (int64_t r = 0; r < height; ++r) {
        std::memcpy(tail.rows[t][r], x[t] + r * x_stride + num_steps * kTileDepth, rest * sizeof(bf16_t));
      }
    }
    std::memcpy(tail.columns, w + num_steps * kTileStepBytes, div_up(rest, 2) * kStepBytes);
    step({tail.rows[0][0], kTileDepth}, {tail.rows[1][0], kTileDepth}, tail.columns);
  }
  constexpr int64_t kAccStride = kStrip * sizeof(float);
  tile_store<kSum00>(acc, kAccStride);
  tile_store<kSum01>(acc + kStrip / 2, kAccStride);
  if (kTwo) {
    tile_store<kSum10>(acc + height * kStrip, kAccStride);
    tile_store<kSum11>(acc + height * kStrip + kStrip / 2, kAccStride);
  }
}

// Rows [begin, end) against strips [first_strip, last_strip) of `weight`.
ORTHRUS_INLINE void multiply_strips_amx(const RowLinearParamsOf<bf16_t>& p, const void* weight, int64_t first_strip,
                                        int64_t last_strip, int64_t begin, int64_t end) {
  const int64_t num_tiles = div_up(end - begin, kTileHeight), height = div_up(end - begin, num_tiles);
  const int64_t num_pairs = div_up(num_tiles, 2);
  const int64_t strip_bytes = div_up(p.in_features, 2) * kStepBytes;
  alignas(64) float acc[2 * kTileHeight * kStrip];
  const TileShapes shapes(height);
  for (int64_t strip = first_strip; strip < last_strip; ++strip) {
    const char* w = static_cast<const char*>(weight) + strip * strip_bytes;
    int64_t done = begin;
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
      const int64_t row[2] = {min_of(begin + 2 * pair * height, end - height),
                              min_of(begin + (2 * pair + 1) * height, end - height)};
      const bf16_t* x[2] = {p.x + row[0] * p.x_stride, p.x + row[1] * p.x_stride};
      const bool two = 2 * pair + 1 < num_tiles;
      const int64_t lines_ahead = pair == 0 ? kTileStepBytes / kLineBytes : 0;
      (two ? multiply_tiles<true> : multiply_tiles<false>)(x, p.x_stride, height, w, p.in_features, lines_ahead, acc);
      for (int t = 0; t < (two ? 2 : 1); ++t) {
        const int64_t again = max_of(0, done - row[t]);
        finish_rows(p, acc + (t * height + again) * kStrip, row[t] + again, height - again, strip);
        done = row[t] + height;
      }
    }
  }
}

template <>
inline void row_linear(const RowLinearParamsOf<bf16_t>& p) {
  const int64_t rows_ar = p.weight_diff ? p.num_rows_ar : p.num_rows;
  const int64_t row_block = max_of(kMinRowBlock, kRowBlockBytes / (p.in_features * int64_t{sizeof(bf16_t)}));
  parallel_strips(p, [&](int64_t first_strip, int64_t last_strip) {
    for (int64_t begin = 0, end; begin < p.num_rows; begin = end) {
      end = min_of(begin + row_block, begin < rows_ar ? rows_ar : p.num_rows);
      multiply_strips_amx(p, begin < rows_ar ? p.weight : p.weight_diff, first_strip, last_strip, begin, end);
    }
  });
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
