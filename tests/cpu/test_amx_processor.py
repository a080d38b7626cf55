"""The parts of AMX that tiles in software replace: instructions, their shapes, and whether a process may use them.

Nothing here needs a processor with tiles.
"""

import re
import subprocess

import pytest

from tests import variants

pytestmark = pytest.mark.skipif(
    variants.ON_AARCH64 or variants.compiler(for_aarch64=False) is None, reason="needs a C++ compiler for x86-64"
)

INSTRUCTIONS = """
#include "amx_tiles.h"
using namespace orthrus::cpu::portable;
static_assert(kTileHeight == 16 && kTileDepth == 32);
void zero() { tile_zero<kSum10>(); }
void load(const void* from, int64_t row_bytes) { tile_load<kRows1>(from, row_bytes); }
void stream(const void* from, int64_t row_bytes) { tile_stream<kColumns0>(from, row_bytes); }
void store(void* to, int64_t row_bytes) { tile_store<kSum11>(to, row_bytes); }
void dot() { tile_dot<kSum01, kRows0, kColumns1>(); }
void shapes() {
  const TileShapes shapes(16);
  tile_zero<kSum00>();
}
void between_writes(int* word, int64_t row_bytes) {
  *word = 101;
  tile_load<kRows0>(word, row_bytes);
  *word = 102;
  tile_stream<kColumns1>(word, row_bytes);
  *word = 103;
  tile_store<kSum00>(word, row_bytes);
  *word = 104;
}
"""
# Operands in AT&T's order: what is written comes last, before it a product's rows, before them its columns.
ASSEMBLED = [
    "tilezero %tmm2",
    "tileloadd (%rdi,%rsi,1), %tmm5",
    "tileloaddt1 (%rdi,%rsi,1), %tmm6",
    "tilestored %tmm3, (%rdi,%rsi,1)",
    "tdpbf16ps %tmm7, %tmm4, %tmm1",
    *("ldtilecfg", "tilezero %tmm0", "tilerelease"),
    *("$101", "tileloadd (%rdi,%rsi,1), %tmm4"),
    *("$102", "tileloaddt1 (%rdi,%rsi,1), %tmm7"),
    *("$103", "tilestored %tmm0, (%rdi,%rsi,1)", "$104"),
]

SHAPES = """
#include <cstdio>
const char shapes = 0;  // of the functions that have none
template <typename T>
void show(const T& shapes) {
  for (unsigned i = 0; i < sizeof shapes; ++i) std::printf("%d ", reinterpret_cast<const unsigned char*>(&shapes)[i]);
}
#define asm if (show(shapes), false) __asm__
#include "amx_tiles.h"
int main(int count, char**) { orthrus::cpu::portable::TileShapes of(count); }
"""

OFFERED = """
#include <cpuid.h>
#include <cstdio>
#include <sys/syscall.h>
#include <unistd.h>
unsigned features;
long answer;
bool leaf_exists;
int count(unsigned leaf, unsigned subleaf, unsigned*, unsigned*, unsigned*, unsigned* d) {
  *d = features;
  return leaf == 7 && subleaf == 0 && leaf_exists;
}
long ask(long number, int code, int component) {  // for the data of tiles
  return number == SYS_arch_prctl && code == 0x1023 && component == 18 ? answer : -2;
}
#define __get_cpuid_count count
#define syscall ask
#include "amx_offered.cpp"
int main() {
  const int sets[] = {0, bit_AMX_TILE, bit_AMX_BF16, ~bit_AMX_TILE, ~bit_AMX_BF16, bit_AMX_TILE | bit_AMX_BF16};
  for (int set : sets) {
    for (int i = 0; i < 4; ++i) {
      features = set, answer = -(i & 1), leaf_exists = i < 2;
      std::printf("%d", orthrus::cpu::amx_bf16::tiles_offered());
    }
  }
}
"""


def compiled(source: str, *flags: str) -> str:
    command = [variants.compiler(for_aarch64=False), *variants.flags("portable"), "-O2", *flags, "-x", "c++", "-"]
    return subprocess.run(command, input=source, check=True, capture_output=True, text=True).stdout


def printed(source: str, program, *args: str) -> str:
    compiled(source, "-o", str(program))
    return subprocess.run([program, *args], check=True, capture_output=True, text=True).stdout


def test_instructions():
    """Instructions that read or write memory do so between the writes around them."""
    assembly = compiled(INSTRUCTIONS, "-S", "-fno-toplevel-reorder", "-o", "-")
    found = re.findall(r"\bt(?:ile|dp).*|ldtilecfg|\$10[1-4]\b", assembly)
    assert found == ASSEMBLED


@pytest.mark.parametrize("height", (1, 5, 16))
def test_shapes(tmp_path, height):
    """As LDTILECFG reads them: palette 1, from row 0; for tile i, bytes per row at 16 + 2 i and rows at 48 + i. Sums
    and rows have that height, columns always 16.
    """
    shown = printed(SHAPES, tmp_path / "shapes", *["row"] * (height - 1)).split()
    loaded, ended = [int(byte) for byte in shown[:64]], shown[64:]
    bytes_and_rows = [64, 0] * 8 + [0] * 16, [height] * 6 + [16] * 2 + [0] * 8
    assert loaded == [1, *[0] * 15, *bytes_and_rows[0], *bytes_and_rows[1]]
    assert ended == ["0"], "tilerelease"


def test_tiles_are_offered_where_the_processor_has_them_and_the_system_permits(tmp_path):
    assert printed(OFFERED, tmp_path / "offered") == "0000" * 5 + "1000"
