"""Builds the emulator and the PTX of csrc/cuda, or takes them from the build folder if nothing has changed."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import variants
from tests.compile.cubins import nvcc
from tests.cpu.cuda_host import A_WEEK

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EMULATOR, CUDA_HOST = HERE / "emulator", ROOT / "tests" / "cpu" / "cuda_host"
BUILT = ROOT / "build" / "ptx"
BOUNDS = "allocations.cpp"  # a library of its own: see pytest_process
INTERFACES = ("kernels.cpp", "row_linear.cpp")
INCLUDE = f"-I{ROOT / 'csrc/include'}"
HOST = "-Xcompiler=-O2,-march=native,-fno-strict-aliasing,-fwrapv,-ffp-contract=off,-Wall,-Wextra,-fPIC"
CXX_FLAGS = ("-std=c++20", HOST, INCLUDE)
CUDA_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-cudart=none", "-Xcompiler=-fPIC", INCLUDE)
JOBS = 2


def why_not() -> str | None:
    """Why kernels cannot run here; None if they can."""
    if not shutil.which("g++"):
        return "g++ is not installed"
    return None if nvcc() else "nvcc is not installed"


def emulator() -> Path:
    """The folder with the emulator's object files and bounds.so."""
    sources = sorted(EMULATOR.iterdir())

    def make(folder: Path) -> None:
        def compile_one(source: Path) -> None:
            _run(nvcc(), *CXX_FLAGS, "-c", str(source), "-o", str(folder / f"{source.stem}.o"))

        # The longest first.
        by_size = sorted((s for s in sources if s.suffix == ".cpp"), key=lambda s: -s.stat().st_size)
        _all(compile_one, by_size)
        bounds = folder / Path(BOUNDS).with_suffix(".o").name
        _run("g++", "-shared", str(bounds), "-o", str(folder / "bounds.so"), "-ldl")
        bounds.unlink()

    native = subprocess.check_output(["g++", "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"])
    return _kept(
        "emulator", [*sources, ROOT / "csrc/include/orthrus/params.h"], [repr(CXX_FLAGS).encode(), native], make
    )


def kernels(arch: str) -> Path:
    """The folder with the PTX for ``arch`` and kernels.so, in which the launchers of csrc/cuda call the emulator."""
    built = emulator()
    sources = [ROOT / s for s in variants.listed("CUDA_SOURCES") if not s.endswith("device.cu")]
    interfaces = [CUDA_HOST / name for name in INTERFACES]
    flags = [*CUDA_FLAGS, f"-gencode=arch=compute_{arch},code=compute_{arch}"]

    def make(folder: Path) -> None:
        objects = folder / "objects"
        objects.mkdir()

        def compile_one(source: Path) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as kept:
                more = ["-keep", f"--keep-dir={kept}"]
                if source in interfaces:  # copied, as the folder has the shim, which it must not include
                    text = source.read_text().replace('"../../../csrc/', f'"{ROOT}/csrc/')
                    source = Path(kept) / f"interface_{source.stem}.cu"
                    source.write_text(text)
                    more = ["-include", str(EMULATOR / "cuda_host_names.h")]
                _run(nvcc(), *flags, *more, "-c", str(source), "-o", str(objects / f"{source.stem}.o"))
                for ptx in Path(kept).glob("*.ptx"):
                    ptx.rename(folder / f"{source.stem}.ptx")

        _all(compile_one, [*sorted(sources, key=lambda s: -s.stat().st_size), *interfaces])
        link = [*map(str, objects.glob("*.o")), *map(str, built.glob("*.o")), str(built / "bounds.so")]
        # Its calls of the CUDA runtime must reach the emulator, not a runtime that torch has loaded.
        _run("g++", "-shared", "-Wl,-Bsymbolic,-z,defs", *link, "-o", str(folder / "kernels.so"))
        shutil.rmtree(objects)

    headers = [path for name in ("include", "cuda") for path in (ROOT / "csrc" / name).rglob("*.*h")]
    return _kept(f"sm_{arch}", [*sources, *interfaces, *headers], [repr(flags).encode(), built.name.encode()], make)


def pytest_process(
    arch: str, *args: str, triton: bool = False, seed: int | None = None, mapped: bool = False, traffic: bool = False,
    counts: Path | None = None, **how,
) -> subprocess.CompletedProcess:  # fmt: skip
    """pytest with the CUDA kernels for ``arch``, and Triton's, in the emulator.

    ``seed``: for a random order of everything. ``mapped``: kernels also use memory that no tensor has allocated.
    ``traffic``: print the kernels' memory traffic at the end. ``counts``: where test_shapes.py writes such counts.
    """
    kernels(arch)
    env = os.environ | {"PTX_ARCH": arch, "PTX_MAPPED": str(int(mapped)), "LD_PRELOAD": str(emulator() / "bounds.so")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(BUILT / "triton")}
    if seed is not None:
        env["PTX_SEED"] = str(seed)
    if traffic:
        env["PTX_TRAFFIC"] = "1"
    if counts is not None:
        env["PTX_COUNTS"] = str(counts)
    plugins = ["-p", "tests.ptx.plugin", *(["-p", "tests.ptx.triton_plugin"] if triton else [])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugins, *args]
    return subprocess.run(command, cwd=ROOT, env=env, **how)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _all(function, items) -> None:
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(function, items))


def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", subprocess.check_output([nvcc(), "--version"], text=True))[1]


@functools.cache
def _compilers() -> bytes:
    return subprocess.check_output([nvcc(), "--version"]) + subprocess.check_output(["g++", "--version"])


def _kept(name: str, files: list[Path], facts: list[bytes], make) -> Path:
    """The folder that ``make`` fills, named by a hash of what it depends on."""
    digest = hashlib.sha256(_compilers())
    for path in sorted(files):
        digest.update(repr((str(path.relative_to(ROOT)), path.read_bytes())).encode())
    for fact in facts:
        digest.update(hashlib.sha256(fact.replace(str(ROOT).encode(), b"")).digest())
    BUILT.mkdir(parents=True, exist_ok=True)
    folder = BUILT / f"{name}-{digest.hexdigest()[:24]}"
    with open(BUILT / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=BUILT) as unfinished:
                make(Path(unfinished))
                shutil.copytree(unfinished, f"{folder}.unfinished", dirs_exist_ok=True)
            os.rename(f"{folder}.unfinished", folder)
            for old in BUILT.glob(f"{name}-*"):
                with contextlib.suppress(FileNotFoundError):
                    if old != folder and old.stat().st_mtime < time.time() - A_WEEK:
                        shutil.rmtree(old)
    return folder
