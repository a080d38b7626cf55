"""Recordings of launches that do not change: CUDA graphs, or on the CPU tapes of native calls."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from orthrus_rt import dispatch
from orthrus_rt.capture import capture
from orthrus_rt.model import Model, Workspace
from orthrus_rt.out_of_memory import naming_the_knobs


def taped(run: Callable[[], None]):
    """The native CPU ops that ``run`` calls, for a replay."""
    tape = dispatch.extension().cpu.Tape()
    with tape.record():
        run()
    return tape


def replay(tape) -> None:
    """On as many threads as torch has now."""
    dispatch.extension().cpu.set_num_threads(torch.get_num_threads())
    tape.replay()


class Recorded:
    """Launches over static buffers in a fixed sequence: run op by op, or replayed.

    Attributes:
        what: is recorded, for messages.
        model, workspace: that the launches run on.
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
    def settled(self) -> bool:
        """Whether it runs as it will from now on."""
        return self.op_by_op or self._replay is not None

    @property
    def steady(self) -> bool:
        """Whether the next run takes no longer than any later one. A graph's first replay does: it puts it on the
        device.
        """
        return self.op_by_op or self._loaded or (self.settled and self.model.device.type == "cpu")

    def warm_up(self) -> None:
        """Run as often as it takes to be steady, with nothing to do: op by op, then the first replay."""
        for _ in range(2):
            if not self.steady:
                self.run()

    @property
    def due_to_record(self) -> bool:
        """Whether the next :meth:`run_again` does."""
        return self._warm and not self.settled

    def run_again(self) -> None:
        """Replay from the second time on, as not every shape comes again; the first time warms the kernels up."""
        if self.due_to_record:
            self.record()
        if self.settled:
            self.run_settled()
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

    def run_settled(self) -> None:
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
            self._replay, self.op_by_op = None, True  # first: a program may have made warnings errors
            warnings.warn(f"{error}; until it is built anew, this runs op by op, slower", stacklevel=5)

    def _record(self) -> Callable[[], None] | None:
        # Recording runs nothing: the state stays as it is.
        if not self.can_record:
            return None
        if self.model.device.type == "cpu":
            return functools.partial(replay, taped(self.run_eager))
        graph, self.graph_bytes = capture(self.run_eager, self.model.device, self.workspace)
        return graph.replay
