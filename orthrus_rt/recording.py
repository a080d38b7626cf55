"""Recordings of launches that do not change: CUDA graphs, or on the CPU tapes of native calls."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch

from orthrus_rt import dispatch
from orthrus_rt.device import stream_of, stream_scope
from orthrus_rt.memory import naming_the_knobs
from orthrus_rt.model import Model, Workspace


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Torch's own belongs to whichever device recorded first in this process."""
    return torch.cuda.Stream(device)


class Recorded:
    """Launches over static buffers in a fixed sequence: run op by op, or replayed.

    Attributes:
        what: for messages. model, workspace: what is launched runs on.
        graph_bytes: device memory that the recording holds, but for what the driver keeps of its launches.
    """

    what: str
    model: Model
    workspace: Workspace
    graph_bytes = 0
    _replay: Callable[[], None] | None = None
    _warm = False

    def run_eager(self) -> None:
        """Op by op."""
        raise NotImplementedError

    def used_ops(self) -> Sequence[str]:
        """Those that :meth:`run_eager` calls."""
        raise NotImplementedError

    @property
    def recorded(self) -> bool:
        """Whether it is replayed; until then it takes longer than it will."""
        return self._replay is not None

    @property
    def records(self) -> bool:
        """Whether the next :meth:`run_again` does."""
        return self._warm and not self.recorded

    def run_again(self) -> None:
        """A replay from the second time on, where not every shape comes again: the first time warms the kernels up."""
        if self.records:
            self.record()
        (self._replay or self.run_eager)()
        self._warm = True

    def record(self) -> None:
        """Replay from now on. Where there is no memory for a recording, a warning says so, and it runs op by op for
        good.
        """
        try:
            with naming_the_knobs(f"recording the {self.what}"):
                self._replay = self._record()
        except torch.OutOfMemoryError as error:
            warnings.warn(f"{error}; until it is built anew, this runs op by op, slower", stacklevel=3)
            self._replay = self.run_eager

    def _record(self) -> Callable[[], None]:
        # Recording runs nothing: the state stays as it is.
        chosen = {dispatch.select(op, self.model.device, self.model.dtype) for op in self.used_ops()}
        if "reference" in chosen:  # it reads values on the host, which no recording can
            return self.run_eager
        if self.model.device.type == "cpu":
            tape = dispatch.native().cpu.Tape()
            with tape.record():
                self.run_eager()
            return tape.replay
        device, graph = self.model.device, torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # as recording itself begins: what it gives back is not the graph's
        before = torch.cuda.memory_reserved(device)
        # thread_local: what other threads do meanwhile, with models of their own, does not spoil the recording. Where
        # one is spoilt, torch's context leaves its own stream current.
        with (
            stream_scope(stream_of(device)),
            torch.cuda.graph(
                graph,
                pool=self.workspace.graph_pool,
                stream=_recording_stream(device),
                capture_error_mode="thread_local",
            ),
        ):
            self.run_eager()
        self.graph_bytes = torch.cuda.memory_reserved(device) - before
        return graph.replay
