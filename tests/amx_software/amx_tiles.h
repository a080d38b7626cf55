// The tile instructions of AMX in software, for processors that have AVX-512 but no tiles: the sums that Intel's manual
// gives for TDPBF16PS, to the bit. What the processor would refuse (no shapes, or shapes that do not fit the
// instruction) ends the process.
#pragma once
#include <cstdint>
#include <cstring>

#include "amx_registers.h"
#include "simd.h"

namespace orthrus::cpu::ORTHRUS_ISA {

struct TileFile {
  alignas(64) uint32_t words[kNumTiles][kTileHeight][16];
  int rows[kNumTiles];  // 0: no shapes
};
static thread_local TileFile tiles;

inline void need(bool true_of_hardware) {
  if (!true_of_hardware) __builtin_trap();
}

class TileShapes {
 public:
  explicit TileShapes(int64_t height) {
    need(1 <= height && height <= kTileHeight);
    std::memset(&tiles, 0, sizeof tiles);
    for (int i = 0; i < kNumTiles; ++i) tiles.rows[i] = i < kColumns0 ? static_cast<int>(height) : kTileHeight;
  }
  ~TileShapes() { std::memset(&tiles, 0, sizeof tiles); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

template <Tile kTile>
inline void tile_zero() {
  need(tiles.rows[kTile]);
  std::memset(tiles.words[kTile], 0, sizeof tiles.words[kTile]);
}

template <Tile kTile>
inline void tile_load(const void* from, int64_t row_bytes) {
  tile_zero<kTile>();
  for (int r = 0; r < tiles.rows[kTile]; ++r) {
    std::memcpy(tiles.words[kTile][r], static_cast<const char*>(from) + r * row_bytes, 64);
  }
}

template <Tile kTile>
inline void tile_stream(const void* from, int64_t row_bytes) {
  tile_load<kTile>(from, row_bytes);
}

template <Tile kTile>
inline void tile_store(void* to, int64_t row_bytes) {
  need(tiles.rows[kTile]);
  for (int r = 0; r < tiles.rows[kTile]; ++r) {
    std::memcpy(static_cast<char*>(to) + r * row_bytes, tiles.words[kTile][r], 64);
  }
}

template <Tile kSum, Tile kRows, Tile kColumns>
inline __attribute__((noinline)) void tile_dot() {
  const int height = tiles.rows[kSum];
  need(height && tiles.rows[kRows] == height && tiles.rows[kColumns] == kTileHeight);
  const unsigned control = _mm_getcsr();
  _mm_setcsr(0x1f80 | _MM_FLUSH_ZERO_ON | 0x0040);  // round to nearest; denormals are zero as inputs and as results
  for (int m = 0; m < height; ++m) {
    Vec even = zero(), odd = zero();
    for (int k = 0; k < kTileDepth / 2; ++k) {
      const WordVec row = set1_word(tiles.words[kRows][m][k]), columns = load_words(tiles.words[kColumns][k]);
      even = fma(first_of(row), first_of(columns), even);
      odd = fma(second_of(row), second_of(columns), odd);
    }
    float* sum = reinterpret_cast<float*>(tiles.words[kSum][m]);
    store(sum, add(load(sum), add(even, odd)));
  }
  _mm_setcsr(control);
}

}  // namespace orthrus::cpu::ORTHRUS_ISA
