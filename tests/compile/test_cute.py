"""Compares what our kernels and their host twins assume about Hopper's instructions with what CuTe says about them.

Layouts: matrix descriptors bit by bit, where operands' elements lie, which lane holds which accumulator. Encodings: the
PTX of our wrappers and of CuTe's. Only tests use CuTe's headers, which come from the wheel ``nvidia-cutlass``.
"""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.compile import cubins

HERE = Path(__file__).parent
CUTE = find_spec("cutlass_library")

pytestmark = [
    pytest.mark.skipif(cubins.nvcc() is None, reason="nvcc is not installed"),
    pytest.mark.skipif(
        CUTE is None, reason="CuTe's headers are not installed: pip install --no-deps nvidia-cutlass==4.2.*"
    ),
]


# Rows of a tile for which we have two instructions; for 192 and 256 we have one. CuTe's headers take five times as long
# to compile with the last two.
TILES = (16, 32, 64, 96, 128, 112, 160)
PARTS = pytest.mark.parametrize(
    "tiles", [pytest.param(TILES[:-2], id="to-128"), pytest.param(TILES, id="to-160", marks=pytest.mark.full)]
)


def compile_with_cute(source: str, tiles: tuple, out: Path, *flags: str) -> None:
    flags += ("-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED",) if tiles == TILES else ()
    include = [f"-I{Path(CUTE.origin).parent / 'source/include'}", f"-I{cubins.ROOT / 'csrc/include'}"]
    done = subprocess.run(
        [cubins.nvcc(), "-std=c++17", "-w", *flags, *include, str(HERE / source), "-o", str(out)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr


@PARTS
def test_layouts(tmp_path, tiles):
    compile_with_cute("cute_layouts.cpp", tiles, tmp_path / "layouts", "-x", "c++")
    done = subprocess.run([tmp_path / "layouts"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


OPCODES = "wgmma|ldmatrix|mbarrier|mapa|cp|fence|prefetch|setmaxnreg|bar|barrier|griddepcontrol|elect"


def instructions(function: str) -> list:
    """The inline PTX of a function, with register names replaced by their order of appearance in each instruction, and
    for each float of the output the accumulator of the last wgmma that is stored there."""
    found, accumulators = [], []
    for statement in re.split(r";|\w+:\s", re.sub(r"//.*", "", function)):
        if stored := re.search(r"st\.global\.f32\s+\[%rd\d+(?:\+(\d+))?\], (%f\d+)", statement):
            if stored[2] in accumulators:
                found.append(("stored", int(stored[1] or 0) // 4, accumulators.index(stored[2])))
        elif asm := re.match(rf"[\s{{}}]*((?:{OPCODES})\b\S*)(.*)", statement, re.S):
            names = list(dict.fromkeys(re.findall(r"%?[a-zA-Z]\w*", asm[2])))
            operands = re.sub(r"%?[a-zA-Z]\w*", lambda name, names=names: f"#{names.index(name[0])}", asm[2])
            opcode = re.sub(r"(\.x4(?:\.trans)?)(\.m8n8)", r"\2\1", asm[1])  # ldmatrix takes either order
            found.append((opcode, re.sub(r"[\s{}]", "", operands)))
            accumulators = names if asm[1].startswith("wgmma.mma") else accumulators
    return found


@PARTS
def test_instructions(tmp_path, tiles):
    compile_with_cute(
        "cute_instructions.cu", tiles, tmp_path / "out.ptx", "-ptx", "-arch=sm_90a", "-DCUTLASS_ENABLE_GDC_FOR_SM90"
    )
    ours, cutes = map(instructions, (tmp_path / "out.ptx").read_text().split(".entry")[1:])
    assert ours == cutes
    assert len([entry for entry in ours if entry[0] == "stored"]) == sum(tiles) + (192 + 256 + 64 + 128) // 2
    assert all(entry[1] == entry[2] for entry in ours if entry[0] == "stored")
    assert len([entry for entry in ours if entry[0] != "stored"]) == 21 + 2 * 4 * len(tiles) + 4 * 4
