"""Capture of launches in a CUDA graph, beside whatever else the program does, and after captures that went wrong."""

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


def capture(run: Callable[[], None], device: torch.device, workspace: Workspace) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of what ``run`` launches on ``device``, and the bytes of ``workspace.graph_pool`` that it holds.

    Raises:
        Exception: whatever ``run`` or the capture raised; the next capture works all the same.
    """
    graph = torch.cuda.CUDAGraph()
    with _nothing_collected():
        torch.cuda.empty_cache()  # as recording itself begins: what it gives back is not the graph's
        before = torch.cuda.memory_reserved(device)
        # thread_local: what other threads do meanwhile, with models of their own, does not spoil the recording, unless
        # one waits for the whole device. Where one is spoilt, torch's context leaves its own stream current. A
        # generator's state, made with the first graph and written for each, is so outside inference mode.
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
    """A stream of our own: torch reuses its 32, and what another thread launches on a shared one during a capture would
    be captured instead of run.
    """
    with device_scope(device):
        return torch.cuda.ExternalStream(dispatch.extension().cuda.new_stream(), device)


@functools.cache
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)


MARKS_GENERATORS = torch.__version__ < "2.13"  # later it keeps a state per capture


class _Captured:
    """A graph of ``device`` for torch.cuda.graph, whose capture leaves the program's random numbers alone. As one
    begins, torch marks the state of the device's generator: until it ends, every other thread that draws from it gets
    an error, and after one that could not end everybody does. So a state of our own stands in while it begins. (Another
    thread that draws or seeds in that moment still meets ours.)
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
# Graphs whose capture did not end as it should: torch's allocator of pinned memory goes on asking them whether a stream
# is theirs, and nothing in Python tells it to stop.
_spoilt: list[torch.cuda.CUDAGraph] = []


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage is collected inside, by any thread: what a finalizer asks of a device would become part of a capture,
    or spoil it. One thread at a time is inside: no other one's recording is in the way of what torch's allocator does
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
    """A capture that an interrupt left open would fail every later wait of this thread. And one that did not end as it
    should leaves torch's allocator taking it for under way: it would give nothing back any more, nor let anything be
    recorded ("captures_underway.empty() INTERNAL ASSERT FAILED", of many reports).
    """
    with stream_scope(_recording_stream(device)), contextlib.suppress(RuntimeError):
        if torch.cuda.is_current_stream_capturing():
            graph.capture_end()
    ended = True
    with contextlib.suppress(RuntimeError, AttributeError):  # the first call says where the capture did end
        torch._C._cuda_endAllocateToPool(device.index, workspace.graph_pool)
        ended = False
        _spoilt.append(graph)
        torch._C._cuda_releasePool(device.index, workspace.graph_pool)
    if not ended or not isinstance(error, torch.OutOfMemoryError):
        workspace.graph_pool = torch.cuda.graph_pool_handle()
