// AMX tile registers: 16 rows of 64 bytes each. A product adds to a tile of fp32 sums [m][16] the dot products of bf16
// rows [m][32] and 16 columns, which are stored as pairs of elements, [16][16][2] (the words of simd.h).
//
// A step of a product adds, to every sum, two chains over 32 elements (the even and the odd ones), with denormals taken
// as zero. An output is a chain of steps over its own row and column alone, so a row's bits depend neither on m nor on
// its place in the tile.
#pragma once
#include "simd.h"

#include <amx_tiles.h>  // in <>, so that tests can put their own on the include path

namespace orthrus::cpu::ORTHRUS_ISA {

struct TileRows {
  const bf16_t* from;
  int64_t stride;  // elements
};

// One step of a product of 2 x 2 tiles, or fewer: sums += rows x columns.
template <bool kTwoRows, bool kTwoColumns>
ORTHRUS_INLINE void tile_step(TileRows rows0, TileRows rows1, const void* columns0, const void* columns1,
                              int64_t column_bytes) {
  tile_load<kColumns0>(columns0, column_bytes);
  tile_load<kRows0>(rows0.from, rows0.stride * sizeof(bf16_t));
  tile_dot<kSum00, kRows0, kColumns0>();
  if (kTwoColumns) {
    tile_load<kColumns1>(columns1, column_bytes);
    tile_dot<kSum01, kRows0, kColumns1>();
  }
  if (kTwoRows) {
    tile_load<kRows1>(rows1.from, rows1.stride * sizeof(bf16_t));
    tile_dot<kSum10, kRows1, kColumns0>();
    if (kTwoColumns) tile_dot<kSum11, kRows1, kColumns1>();
  }
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
