"""The native module, and CUDA kernels compiled for the host, under the sanitizers of g++.

``pytest --sanitized address`` runs any of the CPU tests with AddressSanitizer and UndefinedBehaviorSanitizer. An access
out of bounds, a vector with less alignment than its type requires, a signed overflow, or a float that does not fit its
integer ends the process with a report. With ``--sanitized thread``, ThreadSanitizer does the same for two unordered
accesses to one place, at least one of them a write. In native code these are accesses of threads; in CUDA kernels, of
device threads and the copies that they issue, across blocks and launches (see tests/cpu/cuda_host/races.h). The process
needs :meth:`Sanitizer.environment`. The module has all variants; AMX runs on software tiles (see tests/amx_software).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests import amx_software, variants

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sanitizer:
    """``flags`` for g++, the ``library`` that the process must load first, and ``options`` for it."""

    name: str
    flags: tuple[str, ...]
    library: str
    options: str

    @property
    def folder(self) -> Path:
        return ROOT / "build" / f"sanitized-{self.name}-{sys.implementation.cache_tag}"

    def why_not(self) -> str | None:
        """Why it cannot be built and run here; None if it can."""
        if variants.ON_AARCH64:
            return "its module is one for x86-64"
        if not (_library(self.library) and shutil.which("cmake") and shutil.which("ninja")):
            return "needs g++ with its sanitizers, cmake and ninja"
        if subprocess.run(
            [sys.executable, "-c", ""], env=os.environ | self.environment(), capture_output=True
        ).returncode:
            return f"{self.library} does not start here: does the kernel randomise addresses too widely for it?"
        return None

    def environment(self) -> dict[str, str]:
        """What a process needs from its start: the sanitizer ahead of all other libraries, then libstdc++, whose
        exceptions it intercepts.
        """
        libraries = " ".join(path for name in (self.library, "libstdc++.so.6") if (path := _library(name)))
        return {"LD_PRELOAD": libraries, f"{self.library[3:7].upper()}_OPTIONS": self.options}

    def build(self) -> None:
        """Takes a minute or two of one core if anything has changed."""
        import pybind11

        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(self.folder), "-DORTHRUS_CUDA=OFF",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Sanitized", f"-DCMAKE_CXX_FLAGS={' '.join(self.flags)} -O1",
        ]  # fmt: skip
        plain = {name: value for name, value in os.environ.items() if name not in self.environment()}
        for command in (configure, ["cmake", "--build", str(self.folder), "--target", "amx_software"]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=plain)

    def use(self) -> None:
        """Load it as ``orthrus_rt._native``, on the best variant except AMX, and compile kernels for the host alike."""
        from tests.cpu import cuda_host

        cpu = amx_software.load(self.folder).cpu
        for isa in variants.OF_THIS_KIND:
            if isa == "amx_bf16":
                break
            try:
                cpu.set_isa(isa)
            except RuntimeError:
                break
        cuda_host.FLAGS += self.flags
        import torch

        from orthrus_rt.huge_pages import Arena

        # Allocate each weight and cache by itself: accesses to neighbours in a block would go unnoticed.
        Arena.empty = lambda _, shape, dtype: torch.empty(shape, dtype=dtype, device="cpu")


def _library(name: str) -> str | None:
    """The path of a library of g++; None if there is none."""
    if not (compiler := shutil.which("g++")):
        return None
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return path.strip() if os.path.isabs(path) else None


# Not checked: leaks, as Python keeps objects until it exits; and use after return, for which compilers put stack frames
# where vectors of 64 bytes are not aligned (GCC bug 110027), and where fibers never release them.
ADDRESS = Sanitizer(
    "address",
    ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-g1"),
    "libasan.so",
    "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1:redzone=1024",
)
# A memset of few bytes would become a store that is not instrumented.
THREAD = Sanitizer("thread", ("-fsanitize=thread", "-fno-builtin-memset", "-g1"), "libtsan.so", "halt_on_error=1")
KINDS = {kind.name: kind for kind in (ADDRESS, THREAD)}
