"""A simulated CUDA device: engines on CPU tensors whose ops are the CUDA kernels, compiled for the host.

Packed weights, workspaces, parameter structs and what a recording freezes are those of a GPU. Timing, and ops that
overlap, are not simulated.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools

import pytest
import torch

from orthrus_rt import dispatch, huge_pages, ops
from tests.cpu import cuda_host

NATIVE = ("row_linear", "qkv_commit", "dual_attn", "consensus")  # the other ops are Triton's


class Tape:
    """Stands in for a CUDA graph: launches with fixed parameters, which run only when they are replayed."""

    recording: Tape | None = None

    def __init__(self):
        self.launches = []

    def __enter__(self) -> None:
        Tape.recording = self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        if Tape.recording is self:
            Tape.recording = None

    def replay(self) -> None:
        if Tape.recording is not None:
            Tape.recording.launches += self.launches
            return
        for launch in self.launches:
            launch()


def launch(function, *args) -> None:
    """Run ``function`` at once, or, while a tape records, whenever the tape is replayed."""
    if Tape.recording is None:
        function(*args)
    else:
        Tape.recording.launches.append(functools.partial(function, *args))


def as_ctypes(params) -> ctypes.Structure:
    """A copy of the native module's ``params``."""
    kind = cuda_host.structs()[type(params).__name__.removesuffix("F32")]
    copy = kind()
    for name, of in kind._fields_:
        value = getattr(params, name)
        setattr(copy, name, as_ctypes(value) if issubclass(of, ctypes.Structure) else value)
    return copy


class Device:
    """Replaces the native module's ``cpu`` and ``cuda``, for a GPU of ``num_sms`` SMs.

    Threads of a block run in descending order or not; the order alternates where ``descending`` is None.
    """

    Tape = Tape

    def __init__(self, num_sms: int):
        self.num_sms, self.num_launches = num_sms, 0
        self.native = dispatch.extension()  # not at import: with --software-tiles it is another module
        self.descending: bool | None = None

    def set_num_threads(self, count: int) -> None:
        pass

    def __getattr__(self, op: str):
        if op in NATIVE:
            return lambda params: launch(self._run, op, as_ctypes(params), type(params).__name__.endswith("F32"))
        function = getattr(self.native.cpu, op)
        return (lambda params: launch(function, params)) if op in dispatch.OPS else function

    def _run(self, op: str, params: ctypes.Structure, is_f32: bool) -> None:
        self.num_launches += 1
        descending = self.num_launches % 2 if self.descending is None else int(self.descending)
        if op == "row_linear" and not is_f32:
            error = cuda_host.row_linear_library().row_linear(ctypes.byref(params), descending, self.num_sms)
        else:
            cuda_host.library().configure(descending, self.num_sms)
            error = getattr(cuda_host.library(), op + "_f32" * is_f32)(ctypes.byref(params))
        assert error == 0, f"{op} returned {error}"

    def row_linear_workspace(self, rows: int, in_features: int, out_features: int) -> int:
        return cuda_host.row_linear_library().row_linear_workspace(rows, in_features, out_features, self.num_sms)

    def row_linear_num_partials(self, in_features: int, out_features: int) -> int:
        return cuda_host.row_linear_library().row_linear_num_partials(in_features, out_features, self.num_sms)

    def dual_attn_workspace(self, *args: int) -> int:
        cuda_host.library().configure(0, self.num_sms)
        return cuda_host.library().dual_attn_workspace(*args)


class Module:
    """The native module, with ops that run on ``device``."""

    def __init__(self, device: Device):
        self.cpu = self.cuda = device

    def __getattr__(self, name: str):
        return getattr(self.cpu.native, name)


@contextlib.contextmanager
def installed(*, others: str, num_sms: int = 5):
    """CPU tensors run the CUDA kernels, on the :class:`Device` that this yields. The ops that a GPU runs in Triton run
    as ``others`` says: "triton" or "cpu".
    """
    device, run_triton = Device(num_sms), ops._launch_on
    module = Module(device)
    with pytest.MonkeyPatch.context() as patch, cuda_host.host_unseen():
        patch.setattr(dispatch, "extension", lambda: module)
        patch.setattr(huge_pages.arena, "block", torch.empty(0, dtype=torch.uint8))  # it starts with memory of its own
        patch.setattr(dispatch, "select", lambda op, *_: "cuda" if op in NATIVE else others)
        patch.setattr(ops, "_launch_on", lambda *args, **kwargs: launch(functools.partial(run_triton, **kwargs), *args))
        yield device
