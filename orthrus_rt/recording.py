"""Recordings of launches that do not change: CUDA graphs, or on the CPU tapes of native calls."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from orthrus_rt import dispatch
from orthrus_rt.device import device_scope, stream_of, stream_scope
from orthrus_rt.memory import naming_the_knobs
from orthrus_rt.model import Model, Workspace


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of our own: torch reuses its 32, and what another thread launches on a shared one during a capture would
    be captured instead of run.
    """
    with device_scope(device):
        return torch.cuda.ExternalStream(dispatch.native().cuda.new_stream(), device)


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


_one_at_a_time = threading.RLock()
# Graphs whose capture did not end as it should: torch's allocator of pinned memory goes on asking them whether a stream
# is theirs, and nothing in Python tells it to stop.
_spoilt: list[torch.cuda.CUDAGraph] = []


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage is collected inside, by any thread: what a finalizer asks of a device would become part of a capture,
    or spoil it. One thread at a time is inside: no other one's recording is in the way of what torch's allocator does
    before and after.
    """
    with _one_at_a_time:
        was_enabled = gc.isenabled()
        try:
            gc.disable()
            yield
        finally:
            if was_enabled:
                gc.enable()


def taped(run: Callable[[], None]):
    """The native CPU ops that ``run`` calls, for a replay."""
    tape = dispatch.native().cpu.Tape()
    with tape.record():
        run()
    return tape


def replay(tape) -> None:
    """On as many threads as torch has now."""
    dispatch.native().cpu.set_num_threads(torch.get_num_threads())
    tape.replay()


class Recorded:
    """Launches over static buffers in a fixed sequence: run op by op, or replayed.

    Attributes:
        what: for messages. model, workspace: what is launched runs on.
        graph_bytes: device memory that the recording holds, but for what the driver keeps of its launches.
        op_by_op: nothing could be recorded, and will not be.
    """

    what: str
    model: Model
    workspace: Workspace
    graph_bytes = 0
    op_by_op = False
    _replay: Callable[[], None] | None = None  # no reference to this object, which goes with its last user
    _loaded = False
    _warm = False

    def run_eager(self) -> None:
        """Op by op."""
        raise NotImplementedError

    def run(self) -> None:
        """As is due: see :meth:`run_again`."""
        raise NotImplementedError

    def used_ops(self) -> Sequence[str]:
        """Those that :meth:`run_eager` calls."""
        raise NotImplementedError

    @property
    def can_record(self) -> bool:
        """The reference reads values on the host, which no recording can."""
        return all(dispatch.select(op, self.model.device, self.model.dtype) != "reference" for op in self.used_ops())

    @property
    def recorded(self) -> bool:
        """Whether it runs as it will from now on."""
        return self.op_by_op or self._replay is not None

    @property
    def steady(self) -> bool:
        """Whether the next run takes no longer than any later one. A graph's first replay does: it puts it on the
        device.
        """
        return self.op_by_op or self._loaded or (self.recorded and self.model.device.type == "cpu")

    def warm_up(self) -> None:
        """Run as often as it takes to be steady, with nothing to do: op by op, then the first replay."""
        for _ in range(2):
            if not self.steady:
                self.run()

    @property
    def records(self) -> bool:
        """Whether the next :meth:`run_again` does."""
        return self._warm and not self.recorded

    def run_again(self) -> None:
        """Replay from the second time on, as not every shape comes again; the first time warms the kernels up."""
        if self.records:
            self.record()
        if self.recorded:
            self.replay()
        else:
            self.run_eager()
        self._warm = True

    def record(self) -> None:
        """Replay from now on. Where there is no memory for a recording, a warning says so, and it runs op by op for
        good.
        """
        with self._or_op_by_op("recording"):
            self._replay = self._record()
            self.op_by_op = self._replay is None

    def replay(self) -> None:
        """What was recorded, if that could be. The first time puts it on the device, which takes memory too: where that
        fails, nothing has run.
        """
        if self._loaded:
            return self._replay()
        if not self.op_by_op:
            with self._or_op_by_op("replaying for the first time"):
                self._replay()
                self._loaded = True
        if self.op_by_op:
            self.run_eager()

    @contextlib.contextmanager
    def _or_op_by_op(self, doing: str) -> Iterator[None]:
        try:
            with naming_the_knobs(f"{doing} the {self.what}"):
                yield
        except torch.OutOfMemoryError as error:
            warnings.warn(f"{error}; until it is built anew, this runs op by op, slower", stacklevel=5)
            self._replay, self.op_by_op = None, True

    def _record(self) -> Callable[[], None] | None:
        # Recording runs nothing: the state stays as it is.
        if not self.can_record:
            return None
        if self.model.device.type == "cpu":
            return functools.partial(replay, taped(self.run_eager))
        with _nothing_collected():
            return self._capture().replay

    def _capture(self) -> torch.cuda.CUDAGraph:
        device, graph = self.model.device, torch.cuda.CUDAGraph()
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
                    pool=self.workspace.graph_pool,
                    stream=_recording_stream(device),
                    capture_error_mode="thread_local",
                ),
                torch.inference_mode(),
            ):
                self.run_eager()
        except BaseException as error:
            self._end_spoilt(graph, error)
            raise
        self.graph_bytes = torch.cuda.memory_reserved(device) - before
        return graph

    def _end_spoilt(self, graph: torch.cuda.CUDAGraph, error: BaseException) -> None:
        """A capture that an interrupt left open would fail every later wait of this thread. And one that did not end as
        it should leaves torch's allocator taking it for under way: it would give nothing back any more, nor let
        anything be recorded ("captures_underway.empty() INTERNAL ASSERT FAILED", of many reports).
        """
        device, pool = self.model.device, self.workspace.graph_pool
        with stream_scope(_recording_stream(device)), contextlib.suppress(RuntimeError):
            if torch.cuda.is_current_stream_capturing():
                graph.capture_end()
        ended = True
        with contextlib.suppress(RuntimeError, AttributeError):  # the first call says where the capture did end
            torch._C._cuda_endAllocateToPool(device.index, pool)
            ended = False
            _spoilt.append(graph)
            torch._C._cuda_releasePool(device.index, pool)
        if not ended or not isinstance(error, torch.OutOfMemoryError):
            self.workspace.graph_pool = torch.cuda.graph_pool_handle()
