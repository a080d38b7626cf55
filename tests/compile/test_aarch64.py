"""The CPU half compiles for AArch64, without a warning."""

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import variants


def test_the_cpu_half():
    if (compiler := variants.compiler(for_aarch64=True)) is None:
        pytest.skip(f"no compiler: {variants.EMULATED}")
    to_nowhere = ["-O0", "-Wall", "-Wextra", "-Werror", "-c", "-o", "/dev/null"]
    to_nowhere += [f"-DORTHRUS_HAS_{isa}" for isa in ("portable", *variants.NEON)]
    commands = [[compiler, *variants.flags("portable"), *to_nowhere, source] for source in variants.sources()]
    for isa in ("portable", *variants.NEON):
        commands.append([compiler, *variants.flags(isa), *to_nowhere, "csrc/cpu/variant.cpp"])

    def run(command):
        return subprocess.run(command, cwd=variants.ROOT, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, commands):
            assert not done.returncode, done.stderr
