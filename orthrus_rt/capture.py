"""Capture of launches in a CUDA graph, during whatever else the program does and after failed captures."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator

import torch

from orthrus_rt import dispatch
from orthrus_rt.device import device_scope, stream_of, stream_scope
from orthrus_rt.fork_lock import ForkLock
from orthrus_rt.model import Workspace
from orthrus_rt.out_of_memory import lacks_memory


def capture(run: Callable[[], None], device: torch.device, workspace: Workspace) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of what ``run`` launches on ``device``, and how many bytes of ``workspace.graph_pool`` it holds.

    Raises:
        Exception: whatever ``run`` or the capture raised; the next capture works nevertheless.
    """
    graph = torch.cuda.CUDAGraph()
    with _nothing_collected():
        torch.cuda.empty_cache()  # recording does so too; what it gives back does not count as the graph's
        before = torch.cuda.memory_reserved(device)
        # thread_local: what other threads do meanwhile with models of their own does not spoil the recording, unless
        # one waits for the whole device. If a recording is spoilt, torch's context leaves its own stream current, hence
        # the stream scope. Inference mode is off because a generator's state is created with the first graph and
        # written for every graph.
        try:
            with (
                stream_scope(stream_of(device)),
                torch.inference_mode(False),
                torch.cuda.graph(
                    _Captured(graph, device) if MARKS_GENERATORS else graph,
                    pool=workspace.graph_pool,
                    stream=_recording_stream(device),
                    capture_error_mode="thread_local",
                ),
                torch.inference_mode(),
            ):
                run()
        except BaseException as error:
            _end_spoilt(graph, device, workspace, error)
            raise
        return graph, torch.cuda.memory_reserved(device) - before


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of our own: torch hands out the same 32 streams again, and what another thread launches on a shared one
    during a capture would be captured instead of run.
    """
    with device_scope(device):
        return torch.cuda.ExternalStream(dispatch.extension().cuda.new_stream(), device)


@functools.cache
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)


MARKS_GENERATORS = torch.__version__ < "2.13"  # later versions keep a state per capture


class _Captured:
    """A graph of ``device`` for torch.cuda.graph, whose capture leaves the program's random numbers alone. When a
    capture begins, torch marks the state of the device's generator. Until the capture ends, any other thread that draws
    from the generator gets an error, and after a capture that could not end every thread does. So a state of our own is
    substituted while a capture begins. (A thread that draws or seeds at that moment still gets ours.)
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device):
        self._graph, self._device = graph, device
        self.capture_end = graph.capture_end

    def capture_begin(self, *args, **kwargs) -> None:
        generator = torch.cuda.default_generators[self._device.index]
        state = generator.graphsafe_get_state()
        try:
            generator.graphsafe_set_state(_generator(self._device))
            self._graph.capture_begin(*args, **kwargs)
        finally:
            generator.graphsafe_set_state(state)


_one_at_a_time = ForkLock(threading.RLock)
# Graphs whose capture did not end properly: torch's allocator of pinned memory keeps asking them whether a stream is
# theirs, and nothing in Python can stop it.
_spoilt: list[torch.cuda.CUDAGraph] = []


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """No thread collects garbage inside, as what a finalizer asks of a device would become part of a capture or spoil
    it. Only one thread at a time is inside, so that no other recording interferes with what torch's allocator does
    before and after.
    """
    with _one_at_a_time.held():
        was_enabled = gc.isenabled()
        try:
            gc.disable()
            yield
        finally:
            if was_enabled:
                gc.enable()


def _end_spoilt(graph: torch.cuda.CUDAGraph, device: torch.device, workspace: Workspace, error: BaseException) -> None:
    """End a spoilt capture. If an interrupt left it open, every later wait of this thread would fail. And torch's
    allocator takes a capture that did not end properly for one in progress: it would free nothing more and allow no
    further recording ("captures_underway.empty() INTERNAL ASSERT FAILED", often reported).
    """
    with stream_scope(_recording_stream(device)), contextlib.suppress(RuntimeError):
        if torch.cuda.is_current_stream_capturing():
            graph.capture_end()
    ended = True
    with contextlib.suppress(RuntimeError, AttributeError):  # the first call raises if the capture did end
        torch._C._cuda_endAllocateToPool(device.index, workspace.graph_pool)
        ended = False
        _spoilt.append(graph)
        torch._C._cuda_releasePool(device.index, workspace.graph_pool)
    if not ended or not lacks_memory(error):
        workspace.graph_pool = torch.cuda.graph_pool_handle()
