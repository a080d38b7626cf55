"""Both halves compile without a warning for AArch64, the host processor of GH200 and GB200."""

import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

from tests import variants
from tests.compile import cubins

TO_NOWHERE = ["-O0", "-Wall", "-Wextra", "-Werror", "-c", "-o", "/dev/null"]


def compiler() -> str:
    return variants.compiler(for_aarch64=True) or pytest.skip(f"no compiler: {variants.EMULATED}")


def run_all(commands: list[list[str]]) -> None:
    def run(command):
        return subprocess.run(command, cwd=variants.ROOT, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, commands):
            assert not done.returncode, done.stderr


def toolkit(nvcc: str) -> str:
    """``-I`` and the toolkit's own headers, which nvcc does not offer when it compiles for a foreign host."""
    plan = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True)
    return re.search(r'INCLUDES="(-I[^"]+)"', plan.stderr)[1]


def test_the_cpu_half():
    has = [f"-DORTHRUS_HAS_{isa}" for isa in ("portable", *variants.NEON)]
    commands = [[compiler(), *variants.flags("portable"), *TO_NOWHERE, *has, s] for s in variants.sources()]
    for isa in ("portable", *variants.NEON):
        commands.append([compiler(), *variants.flags(isa), *TO_NOWHERE, "csrc/cpu/variant.cpp"])
    run_all(commands)


def test_the_cuda_half(tmp_path):
    """Launchers and bindings. Kernels are compiled with as little optimisation as possible, and only to PTX, which does
    not depend on the host.
    """
    if (nvcc := cubins.nvcc()) is None:
        pytest.skip("no nvcc")
    flags = ["-std=c++17", f"-I{variants.ROOT}/csrc/include", toolkit(nvcc), "-arch=compute_90a", "-Ofc=max"]
    to_nowhere = ["-Xcompiler=-O0,-Wall,-Wextra,-Werror", "-c", "-o", "/dev/null"]
    commands = [[nvcc, "-ccbin", compiler(), *flags, *to_nowhere, s] for s in variants.listed("CUDA_SOURCES")]
    headers = Path(sysconfig.get_path("include"))
    python = [f"-I{pybind11.get_include()}", f"-I{headers}", f"-I{tmp_path}"]
    own = headers.parent / str(sysconfig.get_config_var("MULTIARCH")) / headers.name / "pyconfig.h"
    if own.is_file():  # Debian's Python has one per architecture, and AArch64's is elsewhere: both have 64 bits
        stands_in = tmp_path / "aarch64-linux-gnu" / headers.name / "pyconfig.h"
        stands_in.parent.mkdir(parents=True)
        stands_in.write_text(f'#include "{own}"\n')
    defined = [
        "-DORTHRUS_WITH_CUDA",
        *(f'-DORTHRUS_{name}=""' for name in ("CUDA_ARCHS", "CUDA_VERSION", "CXX_COMPILER")),
    ]
    for source in ("csrc/bindings.cpp", "csrc/struct_class.cpp"):
        commands.append([compiler(), *variants.flags("portable"), *python, *defined, *TO_NOWHERE, source])
    run_all(commands)
