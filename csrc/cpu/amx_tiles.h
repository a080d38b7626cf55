// The tile instructions of AMX, no policy. The tests have a software version of them.
#pragma once
#include <cstdint>

#include "amx_registers.h"
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

// While alive, the calling thread's tiles are shaped for rows and sums of `height` rows.
class TileShapes {
 public:
  explicit TileShapes(int64_t height) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < kNumTiles; ++i) {
      shapes.row_bytes[i] = 64;
      shapes.rows[i] = static_cast<uint8_t>(i < kColumns0 ? height : kTileHeight);
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TileShapes() { asm volatile("tilerelease"); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// Assembly, because compilers accept register numbers only as literals.
template <Tile kTile>
ORTHRUS_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Rows are row_bytes apart.
template <Tile kTile>
ORTHRUS_INLINE void tile_load(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(kTile) : "memory");
}
// The same for data that is not read again soon: a hint to keep it out of L1.
template <Tile kTile>
ORTHRUS_INLINE void tile_stream(const void* from, int64_t row_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(kTile) : "memory");
}
template <Tile kTile>
ORTHRUS_INLINE void tile_store(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(kTile) : "memory");
}
template <Tile kSum, Tile kRows, Tile kColumns>
ORTHRUS_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kRows), "i"(kColumns));
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
