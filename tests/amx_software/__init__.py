"""The native module with AMX's tile instructions in software, so that code built on them runs where they are missing.

A process loads either this module or the ordinary one. ``pytest --software-tiles`` runs any of the CPU tests with this
one, on AMX unless a test asks for another instruction set.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


def why_not() -> str | None:
    """Why the module cannot be built or run here, or has no use; None if it can."""
    if not (BUILD / "build.ninja").exists() or "amx_software" not in (BUILD / "build.ninja").read_text():
        return "the native module was not built here, or its assembler does not know AMX"
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if "amx_bf16" in flags:
        return "the processor has tiles: the cpu tier runs on them"
    return None if "avx512_bf16" in flags else "the processor has no AVX-512 BF16"


def build() -> None:
    cmake = re.search(r"^CMAKE_COMMAND:INTERNAL=(.*)", (BUILD / "CMakeCache.txt").read_text(), re.M)[1]
    subprocess.run([cmake, "--build", BUILD, "--target", "amx_software"], check=True, stdout=subprocess.DEVNULL)


def load(build: Path):
    """Load the module of a CMake folder as ``orthrus_rt._native``, before anything imports that."""
    name = "orthrus_rt._native"
    assert name not in sys.modules
    path = build / "amx_software" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use() -> None:
    load(BUILD).cpu.set_isa("amx_bf16")
