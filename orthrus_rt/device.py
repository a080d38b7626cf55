"""Devices and dtypes by name, streams and scopes on them, and which engine is the one of a CUDA device."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import weakref

import torch

from orthrus_rt.fork_lock import ForkLock

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_name(dtype: torch.dtype | str) -> str:
    """The name without torch's prefix.

    >>> dtype_name(torch.bfloat16), dtype_name("float32")
    ('bfloat16', 'float32')
    """
    return str(dtype).removeprefix("torch.")


def pick_device(device: str | torch.device) -> torch.device:
    """The device of this name; ``"auto"`` is CUDA if a device is available, else the CPU. A CUDA device has its index
    set.

    Raises:
        ValueError: the device is unknown or not present.
    """
    device = str(device) if isinstance(device, torch.device) else device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cpu" and chosen.index):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was requested, but no CUDA device is available")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be below cuda:{torch.cuda.device_count()}, got {device!r}")
    return with_index(chosen)


def with_index(device: torch.device) -> torch.device:
    """``cuda`` with the index that it stands for here; in another thread, or later, it may be another. The CPU has
    none.
    """
    if device.type != "cuda":
        return torch.device(device.type)
    if device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def never_free(pinned: torch.Tensor) -> torch.Tensor:
    """Keep page-locked memory until the process ends, beyond the interpreter's exit. Of a device that has failed it
    must not be freed: torch then calls the device in a destructor, and the process would abort there.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pinned))
    return pinned


def device_scope(device: torch.device):
    """A context in which ``device`` is the current CUDA device; for the CPU nothing changes."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that is current on ``device``; None for the CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def stream_scope(stream: torch.cuda.Stream | None):
    """A context in which ``stream`` is current, and its device too; with None nothing changes."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def scope(device: torch.device, stream: torch.cuda.Stream | None):
    """The context that an engine runs in: on its stream, with the dtypes that it asks for whatever the program's
    ``autocast`` says, and on CUDA compatible with captures in other threads.
    """
    uncast = contextlib.nullcontext()
    if torch.is_autocast_enabled(device.type):
        uncast = torch.autocast(device.type, enabled=False)
    return _on_stream(stream, uncast) if device.type == "cuda" else uncast


@contextlib.contextmanager
def _on_stream(stream: torch.cuda.Stream | None, uncast):
    with stream_scope(stream), uncast, _beside_captures():
        yield


@contextlib.contextmanager
def _beside_captures():
    """While another thread captures in CUDA's default mode, as torch.cuda.graph does, a thread in that mode may neither
    allocate memory nor query an event: it gets an error, and the capture is spoilt.
    """
    before = None
    try:
        before = exchange_capture_mode(THREAD_LOCAL)
        yield
    finally:
        if before is not None:
            exchange_capture_mode(before)


THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_...


def exchange_capture_mode(mode: int) -> int | None:
    """Set which threads' captures restrict this thread, by the driver's number. Returns the previous mode, None if it
    failed.
    """
    exchanged = ctypes.c_int(mode)
    failed = _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(exchanged))
    return None if failed else exchanged.value


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.PyDLL("libcuda.so.1")  # keeps the GIL, as nothing waits there


@functools.cache
def prepare_for_forks() -> None:
    """Make children forked from here on compute on one thread, unless they ask for more. The threads of torch's pool do
    not exist in them, and a caller that gives the pool work would wait for ever.
    """
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


_engines: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()
_claims = ForkLock()


def claim(device: torch.device, engine) -> None:
    """Make ``engine`` the one engine of a CUDA device in this process, until it is closed or collected.

    Two would compete for memory that is planned up front and for a device that graphs assume to be undisturbed. On the
    CPU any number may coexist.

    Raises:
        RuntimeError: the device has a live engine.
    """
    if device.type != "cuda":
        return
    name = str(device)
    if name in _engines:
        gc.collect()  # an engine without references
    with _claims.held():
        other = _engines.get(name)
        if other is not None and not other.closed:
            raise RuntimeError(f"Engine: {name} has a live engine in this process; close() it first, or share it")
        _engines[name] = engine
