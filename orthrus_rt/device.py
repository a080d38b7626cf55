"""Devices and dtypes by name, streams and scopes on them, and who has the one engine of a CUDA device."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import weakref

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_name(dtype: torch.dtype | str) -> str:
    """Without torch's own prefix.

    >>> dtype_name(torch.bfloat16), dtype_name("float32")
    ('bfloat16', 'float32')
    """
    return str(dtype).removeprefix("torch.")


def pick_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is CUDA where a device answers, else the CPU. A CUDA device comes with its index.

    Raises:
        ValueError: the device is unknown or not there.
    """
    device = str(device) if isinstance(device, torch.device) else device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but no CUDA device is available")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be below cuda:{torch.cuda.device_count()}, got {device!r}")
    return with_index(chosen)


def with_index(device: torch.device) -> torch.device:
    """``cuda`` as the device that it means now: to another thread, or later, it may mean another. The CPU has none."""
    if device.type != "cuda":
        return torch.device(device.type)
    if device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def device_scope(device: torch.device):
    """A context in which ``device`` is the current CUDA device; for the CPU nothing changes."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that is current on ``device``; None for the CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def stream_scope(stream: torch.cuda.Stream | None):
    """A context in which ``stream`` is current, and its device too; with None nothing changes."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


@contextlib.contextmanager
def scope(device: torch.device, stream: torch.cuda.Stream | None):
    """What an engine runs in: its stream, and the types that it asks for, whatever the program's ``autocast`` says; on
    CUDA also beside captures of other threads.
    """
    cast = torch.is_autocast_enabled(device.type)
    with (
        stream_scope(stream),
        torch.autocast(device.type, enabled=False) if cast else contextlib.nullcontext(),
        _beside_captures() if device.type == "cuda" else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def _beside_captures():
    """While another thread captures in CUDA's default mode, as torch.cuda.graph does, a thread that has that mode may
    not ask for memory, nor whether an event has come: it gets an error, and the capture is spoilt.
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
    """Whose captures this thread takes care of, by the driver's number; what it was before, None if it cannot be."""
    exchanged = ctypes.c_int(mode)
    failed = _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(exchanged))
    return None if failed else exchanged.value


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.PyDLL("libcuda.so.1")  # which keeps the GIL: nothing waits there


@functools.cache
def prepare_for_forks() -> None:
    """Children forked from now on compute on one thread, unless they ask for more: the threads of torch's pool are not
    there, and whoever hands them work waits for ever.
    """
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


_engines: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()


def claim(device: torch.device, engine) -> None:
    """Make ``engine`` the one engine of a CUDA device in this process, until it is closed or collected.

    Two would fight over memory planned up front and over graphs that assume an undisturbed device. On the CPU any
    number may live side by side.

    Raises:
        RuntimeError: the device has a live engine.
    """
    if device.type != "cuda":
        return
    name = str(device)
    if name in _engines:
        gc.collect()  # an engine that nobody holds any more
    other = _engines.get(name)
    if other is not None and not other.closed:
        raise RuntimeError(f"Engine: {name} has a live engine in this process; close() it first, or share it")
    _engines[name] = engine
