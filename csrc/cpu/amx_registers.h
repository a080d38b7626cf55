// The tile registers of AMX as the kernels use them.
#pragma once

namespace orthrus::cpu::ORTHRUS_ISA {

constexpr int kTileHeight = 16;
// Elements of one step of a product.
constexpr int kTileDepth = 32;

// Registers: 2 x 2 sums, two tiles of rows, two of columns.
enum Tile { kSum00, kSum01, kSum10, kSum11, kRows0, kRows1, kColumns0, kColumns1, kNumTiles };

}  // namespace orthrus::cpu::ORTHRUS_ISA
