"""Recordings of launches that never change: CUDA graphs, or on the CPU tapes of native calls."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from orthrus_rt import dispatch
from orthrus_rt.capture import capture
from orthrus_rt.model import Model, Workspace
from orthrus_rt.out_of_memory import lacks_memory, naming_the_knobs

MOST_WARM_UPS = 4  # runs of which the last is steady, even if recording fails at first


def taped(run: Callable[[], None]):
    """A tape of the native CPU ops that ``run`` calls, for replay."""
    tape = dispatch.extension().cpu.Tape()
    try:
        with tape:
            run()
    finally:
        tape.stop()  # Ctrl-C may come after `with` has started the recording and before it would stop it
    return tape


def replay(tape) -> None:
    """Replay a tape on as many threads as torch has at present."""
    dispatch.extension().cpu.set_num_threads(torch.get_num_threads())
    tape.replay()


class _NotRecordedError(RuntimeError):
    pass


class Recorded:
    """A fixed sequence of launches over static buffers, run op by op or replayed.

    Attributes:
        what: a description of what is recorded, for messages.
        model, workspace: what the launches use.
        graph_bytes: device memory that the recording holds, except what the driver keeps for its launches.
        op_by_op: it could not be recorded, and that will not be tried again.
    """

    what: str
    model: Model
    workspace: Workspace
    graph_bytes = 0
    op_by_op = False
    _failed = False  # to record
    _replay: Callable[[], None] | None = None  # has no reference to this object, which is freed with its last user
    _loaded = False
    _warm = False

    def run_eager(self) -> None:
        """Run op by op."""
        raise NotImplementedError

    def run(self) -> None:
        """Run in the form that is due; see :meth:`run_again`."""
        raise NotImplementedError

    def used_ops(self) -> Sequence[str]:
        """The ops that :meth:`run_eager` calls."""
        raise NotImplementedError

    @property
    def can_record(self) -> bool:
        """Whether it can be recorded: the reference cannot, as it reads values on the host."""
        return all(dispatch.select(op, self.model.device, self.model.dtype) != "reference" for op in self.used_ops())

    @property
    def settled(self) -> bool:
        """Whether all further runs have the same form."""
        return self.op_by_op or self._replay is not None

    @property
    def steady(self) -> bool:
        """Whether the next run takes no longer than any later one. A graph's first replay does, as it loads the graph
        onto the device.
        """
        return self.op_by_op or self._loaded or (self.settled and self.model.device.type == "cpu")

    def warm_up(self) -> None:
        """Run, with nothing to do, until steady: op by op, and on CUDA the first replay."""
        for _ in range(MOST_WARM_UPS):
            if not self.steady:
                self.run()

    @property
    def due_to_record(self) -> bool:
        """Whether the next :meth:`run_again` records."""
        return self._warm and not self.settled

    def run_again(self) -> None:
        """Replay from the second run on, as not every shape occurs again; the first run warms the kernels up."""
        if self.due_to_record:
            self.record()
        if self.settled:
            self.run_settled()
        else:
            self.run_eager()
        self._warm = True

    def record(self) -> None:
        """Replay from here on. If that fails, warn and run op by op: for good if there is no memory for a recording or
        this is the second failure, else until the next run tries again, as the first may be chance.
        """
        with self._or_op_by_op("recording"):
            try:
                self._replay, self.graph_bytes = self.make_recording() or (None, 0)
            except Exception as error:
                if lacks_memory(error):
                    raise
                said = f"{type(error).__name__}: {error}".strip().split("\n")[0]
                raise _NotRecordedError(f"recording the {self.what} failed ({said})") from error
            self.op_by_op = self._replay is None

    def run_settled(self) -> None:
        """Replay what was recorded, if anything. The first replay loads it onto the device, which takes memory too; if
        that fails, nothing has run.
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
        except (torch.OutOfMemoryError, _NotRecordedError) as error:
            # Before the warning, which a program may turn into an error.
            self._replay, self.graph_bytes = None, 0
            self.op_by_op = self._failed or isinstance(error, torch.OutOfMemoryError)
            self._failed = True
            form = "until it is built anew, this runs" if self.op_by_op else "the next run tries again, this one runs"
            warnings.warn(f"{error}; {form} op by op, slower", stacklevel=5)

    def make_recording(self) -> tuple[Callable[[], None], int] | None:
        """A replay of what :meth:`run_eager` calls, and the device memory that it holds, in bytes; None if it cannot be
        recorded. Nothing runs, so the state stays as it is.
        """
        if not self.can_record:
            return None
        if self.model.device.type == "cpu":
            return functools.partial(replay, taped(self.run_eager)), 0
        graph, held = capture(self.run_eager, self.model.device, self.workspace)
        return graph.replay, held
