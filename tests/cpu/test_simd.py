"""What simd.h computes on every instruction set, lane by lane: all kernels are written once, on top of it.

On other processors, the AArch64 instruction sets are cross-compiled and emulated.
"""

import functools
import shutil
import struct
import subprocess

import pytest

from orthrus_rt import dispatch
from tests import variants

FUSED = ("fma", "exp", "log")  # portable code rounds both product and sum
pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def lines_of(tmp_path_factory):
    """By variant: the lines that simd_lanes.cpp prints; None if it cannot be compiled or run."""
    folder = tmp_path_factory.mktemp("simd")

    @functools.cache
    def lines(isa: str) -> list[str] | None:
        for_aarch64, run = isa in variants.NEON, [folder / isa]
        compiler, linked = variants.compiler(for_aarch64), []
        if for_aarch64 and not variants.ON_AARCH64:
            run, linked = [shutil.which("qemu-aarch64"), *run], ["-static"]
        elif not offered(isa):
            return None
        if not compiler or not run[0]:
            return None
        source = str(variants.ROOT / "tests/cpu/simd_lanes.cpp")
        subprocess.run([compiler, *variants.flags(isa), "-O2", *linked, source, "-o", folder / isa], check=True)
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()

    return lines


def offered(isa: str) -> bool:
    cpu = dispatch.extension().cpu
    before = cpu.isa()
    try:
        cpu.set_isa(isa)
    except RuntimeError:
        return False
    cpu.set_isa(before)
    return True


def floats(line: str) -> list[float]:
    return [struct.unpack(">f", bytes.fromhex(word))[0] for word in line.split()[1:]]


@pytest.mark.parametrize("isa", ("avx2", "avx512", "avx512_bf16", *variants.NEON))
def test_every_set_computes_the_same_lanes(lines_of, isa):
    """Equal to the bit to portable code, or to C and AVX2 where products are fused. Only sums of products of bf16 pairs
    round differently, and AVX-512 BF16 stores no denormals.
    """
    if (got := lines_of(isa)) is None or (portable := lines_of("portable")) is None:
        pytest.skip(f"{isa} does not run here" + (f": {variants.EMULATED}" if isa in variants.NEON else ""))
    avx2 = lines_of("avx2") or got
    assert len(got) == len(portable) == len(avx2) > 10_000
    for mine, plain, fused, before in zip(got, portable, avx2, ["", *got], strict=False):
        name, _, lanes = mine.partition(" ")
        if name == "fused":
            assert before == f"fma {lanes}"
        elif name in FUSED:
            assert mine == fused
            assert name == "fma" or floats(mine) == pytest.approx(floats(plain), rel=1e-6, abs=1e-7, nan_ok=True)
        elif name == "dot" and isa.endswith("bf16"):
            assert floats(mine) == pytest.approx(floats(plain), rel=0, abs=36 * 2**-22)
        elif (name, isa) != ("store_any", "avx512_bf16"):
            assert mine == plain
