"""The native module, and the CUDA kernels on the host, under AddressSanitizer and UndefinedBehaviorSanitizer.

``pytest --sanitized`` runs any of the CPU tests with them: an access out of bounds, a vector that is not aligned as its
type says, a signed number that overflows or a float that its integer cannot hold ends the process with a report. The
process needs :func:`environment`. The module has all variants, AMX's over tiles in software (see tests/amx_software).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import amx_software

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / f"sanitized-{sys.implementation.cache_tag}"
FLAGS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-g1"]
# Not looked for: leaks, as Python keeps what it holds to its end; and the use of a frame whose function has returned,
# for which compilers put frames where vectors of 64 bytes are not aligned (GCC bug 110027), and which fibers never give
# back.
OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1:redzone=1024"


def _library(name: str) -> str | None:
    """The path of a library of g++; None where there is none."""
    if not (compiler := shutil.which("g++")):
        return None
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return path.strip() if os.path.isabs(path) else None


def why_not() -> str | None:
    """Why it cannot be built and run here; None if it can."""
    if not (_library("libasan.so") and shutil.which("cmake") and shutil.which("ninja")):
        return "needs g++ with its sanitizers, cmake and ninja"
    return None


def environment() -> dict[str, str]:
    """What a process needs from its start: the sanitizers before all other libraries, and that of exceptions, which
    they take over, behind them.
    """
    libraries = " ".join(path for name in ("libasan.so", "libstdc++.so.6") if (path := _library(name)))
    return {"LD_PRELOAD": libraries, "ASAN_OPTIONS": OPTIONS}


def build() -> None:
    """In a minute or two of one core, if anything has changed."""
    import pybind11

    configure = [
        "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), "-DORTHRUS_CUDA=OFF",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DCMAKE_BUILD_TYPE=Sanitized", f"-DCMAKE_CXX_FLAGS={' '.join(FLAGS)} -O1",
    ]  # fmt: skip
    plain = {name: value for name, value in os.environ.items() if name not in environment()}
    for command in (configure, ["cmake", "--build", str(BUILD), "--target", "amx_software"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=plain)


def use() -> None:
    """Be ``orthrus_rt._native``, on the best variant beside AMX's, and compile kernels for the host likewise."""
    from tests.cpu import cuda_host

    cpu = amx_software.load(BUILD).cpu
    for isa in ("portable", "avx2", "avx512", "avx512_bf16"):
        try:
            cpu.set_isa(isa)
        except RuntimeError:
            break
    cuda_host.FLAGS += FLAGS
