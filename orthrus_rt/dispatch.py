"""Chooses the implementation of each op by device, capability and dtype, and never silently.

``ORTHRUS_BACKEND`` overrides the choice: ``reference`` or ``cpu`` for all ops, or per op, e.g.
``ORTHRUS_BACKEND=dual_attn=triton,rms_norm=reference``. Of two entries for an op the later counts. A requested
implementation that is not available raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from pathlib import Path

import torch

from orthrus_rt.device import device_scope, dtype_name

log = logging.getLogger("orthrus_rt")

NATIVE = "orthrus_rt._native"
OPS = ("embed", "rms_norm", "row_linear", "qkv_commit", "dual_attn", "consensus", "process_logits", "count_tokens")
OPS_BEFORE_LOGITS = OPS[:5]  # ops over weights, activations or cache; the others take logits, maxima and ids
OLDEST_TRITON = (3, 6)
IMPLEMENTATIONS = ("cpu", "cuda", "triton", "reference")
FOR_ALL_OPS = ("cpu", "reference")
# Dtypes of weights, activations and cache that kernels take. ``reference`` takes any, Triton's dual_attn only bfloat16.
ELEMENTS = (torch.bfloat16, torch.float32)

# Preference per device type; the first available one wins.
_PREFERENCE = {
    "cpu": {op: ("cpu", "reference") for op in OPS},
    "cuda": {op: ("cuda", "reference") for op in OPS}
    | {op: ("triton", "reference") for op in ("embed", "rms_norm", "process_logits", "count_tokens")}
    | {"dual_attn": ("cuda", "triton", "reference")},
}


@functools.cache
def extension():
    """The native module, or None if there is none; :func:`why_no_native` says why."""
    return None if why_no_native() else sys.modules[NATIVE]


@functools.cache
def why_no_native() -> str | None:
    """Why the native module cannot be imported; None if it can."""
    try:
        importlib.import_module(NATIVE)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == NATIVE:
            folder = Path(__file__).parent
            return f"the native module is not built in {folder}, which orthrus_rt is imported from (pip install -e .)"
        return f"the native module cannot be loaded: {error}"
    return None


def triton_module(op: str):
    """The module of triton_kernels that holds ``op``."""
    return importlib.import_module(f"orthrus_rt.triton_kernels.{op}")


@functools.cache
def why_no_triton() -> str | None:
    """Why Triton cannot run the kernels; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):  # not a package, no such version
        version = importlib.metadata.version("triton")
        if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
            return f"triton must be {'.'.join(map(str, OLDEST_TRITON))} or later, got {version}"
    return None


def unavailable(impl: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``impl`` cannot run ``op`` for tensors of this device and dtype; None if it can."""
    if impl == "reference":
        return None
    device_type = "cpu" if impl == "cpu" else "cuda"
    if impl not in _PREFERENCE[device_type][op]:
        return f"{op} has no {impl} implementation"
    if op in OPS_BEFORE_LOGITS:
        takes = ELEMENTS[:1] if (impl, op) == ("triton", "dual_attn") else ELEMENTS
        if dtype not in takes:
            return f"the {impl} {op} takes {' or '.join(map(dtype_name, takes))}, not {dtype_name(dtype)}"
    if device.type != device_type:
        return f"the {impl} implementation needs {device_type} tensors, not {device.type}"
    if impl == "triton":
        return why_no_triton()
    if extension() is None:
        return why_no_native()
    if impl == "cuda" and not hasattr(extension(), "cuda"):
        return "the native module was built without CUDA (ORTHRUS_CUDA=ON builds it)"
    if impl == "cuda":
        archs, (major, minor) = extension().build_info()["cuda_archs"], torch.cuda.get_device_capability(device)
        if not runs_on(archs, (major, minor)):
            built = f"the native module was built for {archs}, not for compute capability {major}.{minor}"
            arch = f"{major}{minor}" + "a" * ((major, minor) in ((9, 0), (10, 0)))
            return built + (f" (ORTHRUS_CUDA_ARCHS={arch}-real builds for it)" if major >= 8 else "")
        with device_scope(device):
            if extension().cuda.isa() == "none":
                version = extension().build_info()["cuda_version"]
                return f"the native module, built with CUDA {version}, cannot use the device: is its driver older?"
    return None


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for one of ``archs`` ("80-real 90a-real") runs on a GPU of this compute capability.

    >>> [runs_on("80-real 90a-real 100a-real", c) for c in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (12, 0))]
    [False, True, True, True, False, False]
    """
    for arch in archs.split():
        name = arch.removesuffix("-real")
        major, minor = divmod(int(name.rstrip("af")), 10)
        if capability == (major, minor) or (name.isdigit() and capability[0] == major and capability[1] > minor):
            return True
    return False


def requested(overrides: str) -> dict[str, str]:
    """``ORTHRUS_BACKEND``'s value as {op: implementation}."""
    chosen: dict[str, str] = {}
    for item in filter(None, overrides.split(",")):
        op, _, impl = item.strip().rpartition("=")
        if (op and op not in OPS) or impl not in IMPLEMENTATIONS:
            raise ValueError(
                f"ORTHRUS_BACKEND: cannot read {item!r}; expected an implementation "
                f"({', '.join(IMPLEMENTATIONS)}) or op=implementation with op one of {', '.join(OPS)}"
            )
        if not op and impl not in FOR_ALL_OPS:
            raise ValueError(
                f"ORTHRUS_BACKEND: {impl} does not implement all ops; name those that it is to run, as in "
                f"dual_attn={impl} ({' and '.join(FOR_ALL_OPS)} are for all)"
            )
        for name in [op] if op else OPS:
            chosen[name] = impl
    return chosen


def select(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation of ``op`` for tensors of this device and dtype.

    Raises:
        ValueError: ``ORTHRUS_BACKEND`` cannot be read.
        RuntimeError: the requested implementation is not available here.
    """
    return _select(op, device, dtype, os.environ.get("ORTHRUS_BACKEND", ""))


def row_invariant(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether keys and values have the same bits whichever pass computed them: no op before them is ``reference``."""
    return all(select(op, device, dtype) != "reference" for op in OPS_BEFORE_LOGITS)


@functools.cache
def _select(op, device, dtype, overrides):
    override = requested(overrides).get(op)
    if override:
        if why := unavailable(override, op, device, dtype):
            raise RuntimeError(f"{op}: the {override} implementation was requested but is unavailable: {why}")
        log.info("%s on %s %s: %s, as requested", op, device, dtype, override)
        return override
    first, *others = _PREFERENCE.get(device.type, {}).get(op, ("reference",))
    why = unavailable(first, op, device, dtype)
    if why is None:
        log.info("%s on %s %s: %s", op, device, dtype, first)
        return first
    chosen = next(i for i in others if unavailable(i, op, device, dtype) is None)
    if why == why_no_native():
        _warn_once("ops on %s run Triton or the reference: %s", device, why)
    else:
        log.warning("%s on %s %s: %s, since %s", op, device, dtype, chosen, why)
    return chosen


@functools.cache
def _warn_once(*what) -> None:
    log.warning(*what)
