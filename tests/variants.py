"""The variants of the CPU kernels: those of this processor's architecture, and how to compile for one."""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
CMAKE = (ROOT / "CMakeLists.txt").read_text()
ON_AARCH64 = platform.machine() in ("aarch64", "arm64")
NEON = ("neon", "neon_bf16")
OF_THIS_KIND = ("portable", *(NEON if ON_AARCH64 else ("avx2", "avx512", "avx512_bf16", "amx_bf16")))
EMULATED = "for AArch64 elsewhere, apt-get install g++-aarch64-linux-gnu qemu-user"


def compiler(for_aarch64: bool) -> str | None:
    return shutil.which("aarch64-linux-gnu-g++" if for_aarch64 and not ON_AARCH64 else "g++")


def flags(isa: str) -> list[str]:
    """The flags that CMake uses for a source of this variant, without optimisation."""
    defined = [f"-DORTHRUS_ISA={isa}", f"-DORTHRUS_ISA_{isa}", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cpu"]
    return ["-std=c++17", "-ffp-contract=off", *defined, *listed(f"CPU_FLAGS_{isa}")]


def sources() -> list[str]:
    """The sources that all variants share."""
    return listed("CPU_SOURCES")


def listed(name: str) -> list[str]:
    """The words that CMakeLists.txt sets ``name`` to."""
    found = re.search(rf"set\({name}\s+([^)]*)\)", CMAKE)
    words = re.sub(r"#.*", "", found[1]).split() if found else []
    return [w for word in words for w in (listed(word[2:-1]) if word.startswith("${") else [word])]
