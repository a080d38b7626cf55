"""Compiles every CUDA source for every architecture, two at a time; reports are kept under a hash of the inputs.

``python -m tests.compile.cubins`` does so ahead of the tests, and needs no package.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tests import variants
from tools.find_nvcc import find_nvcc

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_120")
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-cubin", "-Xptxas=-v", f"-I{ROOT / 'csrc/include'}")


nvcc = functools.cache(find_nvcc)


@dataclass(frozen=True)
class Kernel:
    """One entry function as ptxas reports it."""

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int


@functools.cache
def _common_hash() -> bytes:
    digest = hashlib.sha256()
    digest.update(subprocess.check_output([nvcc(), "--version"]))
    digest.update(repr([f.replace(str(ROOT), "") for f in FLAGS]).encode() + Path(__file__).read_bytes())
    for folder in ("include", "cuda"):
        for path in sorted((ROOT / "csrc" / folder).rglob("*.*h")):
            digest.update(path.read_bytes())
    return digest.digest()


def started(command: list[str]) -> subprocess.CompletedProcess:
    """Run the compiler. On a virtual machine one start in thousands failed with EFAULT, which says nothing about the
    source, so the start is tried once more. A compiler that ran and failed is not run again."""
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return subprocess.run(command, capture_output=True, text=True)


@functools.cache
def kept(source: str, arch: str) -> Path:
    """Where the report on ``source`` for ``arch`` is, once there is one; for sm_90a a cubin lies beside it."""
    key = hashlib.sha256(_common_hash() + (ROOT / source).read_bytes() + arch.encode()).hexdigest()[:24]
    return ROOT / "build" / "cubins" / f"{Path(source).stem}-{arch}-{key}.txt"


def report(source: str, arch: str) -> str:
    """What ptxas says about ``source`` for ``arch``, and what sm_90a's PTX shows of wgmma: from the build folder if
    nothing has changed since.

    Raises:
        RuntimeError: it does not compile.
    """
    path = kept(source, arch)
    if path.exists():
        return path.read_text()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two runs of this tier may share the build folder, so each writes to another folder and renames files at the end.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        out, keep = Path(folder, "out.cubin"), ["--keep", f"--keep-dir={folder}"]
        done = started([nvcc(), *FLAGS, f"-arch={arch}", *keep, "-o", str(out), str(ROOT / source)])
        if done.returncode:
            raise RuntimeError(f"{source} does not compile for {arch}:\n{done.stderr}")
        for old in path.parent.glob(f"{Path(source).stem}-{arch}-*"):
            old.unlink(missing_ok=True)
        said = done.stderr
        if arch == "sm_90a":
            groups, spoilt = wgmma_groups(Path(folder, f"{Path(source).stem}.ptx").read_text())
            said += f"\nwgmma groups: {groups}, spoilt: {spoilt}\n"
            out.rename(path.with_suffix(".cubin"))
        finished = Path(folder, "report.txt")
        finished.write_text(said)
        finished.rename(path)
    return said


@functools.cache
def cuobjdump() -> str | None:
    """The toolkit's cuobjdump, or Triton's own."""
    triton = find_spec("triton")
    beside = os.path.join(os.path.dirname(triton.origin), "backends/nvidia/bin") if triton else ""
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=beside)


def wgmma_groups(ptx: str) -> tuple[int, str]:
    """The number of groups of products, from their fence to their commit, and which registers something else writes in
    one of them: sums, or operands in registers.
    """
    groups, spoilt = re.findall(r"wgmma\.fence[^;]*;(.*?)wgmma\.commit_group", ptx, re.S), set()
    for group in groups:
        owned, written = set(), set()
        for statement in re.sub(r"//[^\n]*", "", group).split(";"):
            found = re.search(r"(?:@!?%p\d+\s+)?\b([a-z]\w*\.\S+)\s+(\{[^}]*\}|%\w+)(?:,\s*(\{[^}]*\}))?", statement)
            if not found:
                continue
            registers = [set(re.findall(r"%[rf]\d+", text or "")) for text in found.group(2, 3)]
            if found[1].startswith("wgmma"):
                owned |= registers[0] | registers[1]  # the sums, and A if it is in registers
            else:
                written |= registers[0]
        spoilt |= owned & written if owned else {"(a group without products)"}
    return len(groups), " ".join(sorted(spoilt)) or "none"


def lane_loops(source: str) -> int:
    """Loops in the SASS for sm_90a over the lanes for which the one copy unit of a warp has work to do, at 40 clocks
    each.
    """
    cubin = kept(source, "sm_90a").with_suffix(".cubin")
    sass = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    if "UBLKCP" not in sass:
        raise RuntimeError(f"{cuobjdump()} shows no bulk copy in {cubin}")
    return sass.count("BRA.U.ANY")


@functools.cache
def reports() -> dict:
    """Futures of all reports by (source, arch)."""
    pool = ThreadPoolExecutor(2)
    # Those with products of matrices take longest: they come first, so that none is left running alone at the end.
    sources = sorted(variants.listed("CUDA_SOURCES"), key=lambda s: not re.search("mma|sm90", s))
    return {(source, arch): pool.submit(report, source, arch) for source in sources for arch in ARCHS}


def quarter_of_registers(warps: int, registers: int) -> int:
    """Registers that a CTA takes of the fullest quarter of a multiprocessor; a quarter has QUARTER registers."""
    return -(-warps // 4) * 32 * -(-registers // 8) * 8


SHARED = 228 << 10  # bytes of a multiprocessor; a CTA takes 1 KB more than it asks for
ROW_LINEAR_SHARED = (SHARED - 2048) // 2  # the limit for a CTA that shares it with a second one and a small kernel's
QUARTER = 16384
# Two of row_linear's CTAs, of 9 warps each, put 5 warps into a quarter if the second begins where the first ended.
LEFT_BESIDE_ROW_LINEAR = QUARTER - quarter_of_registers(2 * 9, 80)


def parse(text: str) -> list[Kernel]:
    """The entry functions of a ptxas report."""
    kernels = []
    for part in re.split(r"Compiling entry function ", text)[1:]:
        properties = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers([^\n]*)", part)
        shared = re.search(r"(\d+) bytes smem", used.group(2))
        stack, stores, loads = map(int, properties.groups())
        kernels.append(
            Kernel(
                name=re.match(r"'([^']+)'", part).group(1),
                registers=int(used.group(1)),
                stack_bytes=stack,
                spill_bytes=stores + loads,
                static_shared_bytes=int(shared.group(1)) if shared else 0,
            )
        )
    return kernels


if __name__ == "__main__":
    for future in reports().values():
        future.exception()  # which the tests raise
