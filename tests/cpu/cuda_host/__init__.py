"""Builds CUDA kernels as host C++ over a small shim, for ctypes to call; device.py runs ops on them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import re
import shutil
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
PARAMS = ("RowLinearParams", "QkvCommitParams", "ConsensusParams", "DualAttnParams")
DUAL_ATTN = ("dual_attn", "dual_attn_mma", "dual_attn_sm90", "dual_attn_f32")
KERNELS = ("qkv_commit", "consensus", *DUAL_ATTN, "row_linear_f32", "isa")
ROW_LINEAR = ("row_linear", "isa", *(f"row_linear_{isa}{coded}" for isa in ("mma", "sm90") for coded in ("", "_coded")))
FLAGS = ["-std=c++17", "-O2", "-march=native", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas"]
# For values that are loaded under a condition and used under the same one.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
FLAGS.append("-U_FORTIFY_SOURCE")  # which takes a switch of fiber stacks for a longjmp gone wrong
LIBRARIES: list[ctypes.CDLL] = []  # those built so far
A_WEEK = 7 * 24 * 3600
SCALARS = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


@functools.cache
def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


@functools.cache
def structs() -> dict[str, type[ctypes.Structure]]:
    """The structs of params.h as ctypes classes, by name; templates, whatever their element, without the Of."""
    text = (CSRC / "include" / "orthrus" / "params.h").read_text()
    scalars = SCALARS | dict.fromkeys(re.findall(r"^enum class (\w+) : int32_t", text, re.M), ctypes.c_int32)
    found: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(r"^struct (\w+?)(?:Of)? \{\n(.*?)^\};", text, re.M | re.S):
        fields = []
        for kind, pointer, field in re.findall(r"^  (?:const )?(\w+?)(?:Of<T>)?(\*?) (\w+);", body, re.M):
            fields.append((field, ctypes.c_void_p if pointer else (scalars | found)[kind]))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


def build(interface: str, kernels: tuple[str, ...]) -> ctypes.CDLL:
    """The kernels behind the C functions of ``interface``, a file of this folder: taken from the build folder if
    nothing has changed since.
    """
    sources = [HERE / interface, *(CSRC / "cuda" / f"{name}.cu" for name in kernels)]
    include = [f"-I{HERE}", f"-I{CSRC / 'include'}"]
    path = ROOT / "build" / "cuda_host" / f"{Path(interface).stem}-{_hash_for([interface, *kernels, *FLAGS])}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of a test run want it too
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            command = [compiler(), *FLAGS, *include, "-shared", "-x", "c++", *map(str, sources), "-o", str(unfinished)]
            subprocess.run(command, check=True)
            unfinished.rename(path)
            for old in path.parent.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another process was first
                    if old.stat().st_mtime < time.time() - A_WEEK:  # a sanitizer's report may read a younger one
                        old.unlink()
        LIBRARIES.append(ctypes.CDLL(str(path)))
    if "-fsanitize=thread" in FLAGS:
        let_kernels_follow()
    return LIBRARIES[-1]


def _hash_for(command: list[str]) -> str:
    """A hash of the command, of all that it may compile, and of what the compiler says of itself and the processor."""
    digest = hashlib.sha256(subprocess.check_output([compiler(), *FLAGS, "-dM", "-E", "-x", "c++", "/dev/null"]))
    digest.update(repr(command).encode())
    for folder in (HERE, CSRC / "cuda", CSRC / "include"):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")):
            digest.update(repr((str(path.relative_to(ROOT)), path.read_bytes())).encode())
    return digest.hexdigest()[:24]


@contextlib.contextmanager
def host_unseen():
    """Keep ThreadSanitizer, where it runs, from taking the host's work for a race. Whether the host waits for a device
    before it gives memory back is the caller's concern, and memory that it newly allocates belongs to no thread.
    """
    if "-fsanitize=thread" not in FLAGS:
        yield
        return
    process = ctypes.CDLL(None)
    process.__tsan_ignore_thread_begin()
    if LIBRARIES:
        let_kernels_follow()
    try:
        yield
    finally:
        if LIBRARIES:
            _, *ends = _meetings()
            for end in ends:
                process.__tsan_acquire(end)
        process.__tsan_ignore_thread_end()


def let_kernels_follow() -> None:
    """Everything the host has done so far happens before what kernels will do."""
    begin, *_ = _meetings()
    ctypes.CDLL(None).__tsan_release(begin)


def _meetings() -> list[ctypes.c_void_p]:
    """Those of launch.cuh; the libraries share them."""
    words = (ctypes.c_uint64 * 3).in_dll(LIBRARIES[0], "cuda_host_meetings")
    return [ctypes.c_void_p(ctypes.addressof(words) + 8 * i) for i in range(3)]


@functools.cache
def library() -> ctypes.CDLL:
    loaded = build("kernels.cpp", KERNELS)
    loaded.dual_attn_workspace.restype = ctypes.c_int64
    for name in PARAMS:
        size = getattr(loaded, f"sizeof_{name}")
        size.restype = ctypes.c_int64
        assert size() == ctypes.sizeof(structs()[name]), f"{name}: params.h was misread"
    return loaded


@functools.cache
def row_linear_library() -> ctypes.CDLL:
    """``row_linear`` in bfloat16, in the variant that ``ORTHRUS_CUDA_ISA`` selects."""
    loaded = build("row_linear.cpp", ROW_LINEAR)
    for name in ("workspace", "prefetched", "prefetches", "early", "next_prefetch"):
        getattr(loaded, f"row_linear_{name}").restype = ctypes.c_int64
    loaded.row_linear_plan_error.restype = ctypes.c_char_p
    loaded.wrongly_divided.restype = ctypes.c_int64
    return loaded
