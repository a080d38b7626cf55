"""One call of an engine at a time: a lock that refuses instead of waiting, and that no interrupt can leave locked."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from orthrus_rt.device import scope

IN_ANOTHER_THREAD = "this engine is in use by another thread; share it through orthrus_rt.AsyncEngine"
IN_THIS_THREAD = "this engine is in the middle of a call; a signal handler cannot make another one"


class Taken(RuntimeError):
    """The turn is taken by another call or owner."""


class Turn:
    """A lock held by the frame that entered it, for as long as that frame runs.

    Ctrl-C can strike between any two steps of Python: also after the lock is taken but before its ``with`` is entered,
    or on the way out before it is released. Either way the exception unwinds the holding frame. The next call, of any
    thread, sees that the holder no longer runs, and takes its place.

    Attributes:
        holder: the thread and frame that have taken the turn, by process, as a forked child has none of its parent's
            threads; then the successor of each holder that has not let go. To store an empty dict, which no signal can
            interrupt, is to let go.
    """

    def __init__(self):
        self.holder: dict[int | tuple, tuple] = {}
        self._owner: tuple[weakref.ref, int] | None = None

    def claim(self, owner) -> None:
        """Reserve the turn for this thread until :meth:`release`, or until ``owner`` is garbage-collected."""
        with self:
            self._owner = weakref.ref(owner), threading.get_ident()

    def release(self) -> None:
        self._owner = None

    def __enter__(self) -> None:
        self.hold(sys._getframe(1))

    def hold(self, frame) -> None:
        """Take the turn for as long as ``frame``, of this thread, runs, or until it lets go."""
        mine, taken = (threading.get_ident(), frame), None
        self._check_owner()
        while taken is not self.holder:  # else it was let go, and perhaps taken, in between
            taken, place = self.holder, os.getpid()
            while (other := taken.setdefault(place, mine)) is not mine:  # tests and sets in one step
                if _runs(other[1]):
                    raise Taken(IN_THIS_THREAD if other[0] == mine[0] else IN_ANOTHER_THREAD)
                place = other
        try:
            self._check_owner()  # again: it may have been claimed before this thread had it
        except Taken:
            self.holder = {}
            raise

    def _check_owner(self) -> None:
        claim = self._owner
        if claim is not None and claim[1] != threading.get_ident() and (owner := claim[0]()) is not None:
            raise Taken(f"this engine belongs to an {type(owner).__name__} until that is closed; go through it")

    def __exit__(self, *_) -> None:
        self.holder = {}


def _runs(frame) -> bool:
    """Whether a thread is inside ``frame``."""
    try:
        frame.clear()  # refuses if so; otherwise nobody needs its variables
    except RuntimeError:
        return True
    return False


P = ParamSpec("P")
R = TypeVar("R")


def exclusive(method: Callable[P, R]) -> Callable[P, R]:
    """Decorator of an engine's method: it runs alone, on the engine's device and stream, and never after ``close()``.
    What an earlier call left torn is recovered first, and what was dropped is aborted.

    Work runs in the order of the calls, whichever thread makes them and whichever stream is current there.
    """

    @functools.wraps(method)
    def call(engine, *args, **kwargs):
        with engine.turn:
            return in_turn(engine, method, *args, **kwargs)

    return call


def in_turn(engine, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run an engine's method as :func:`exclusive` does, for a caller that has the turn."""
    if engine.closed:
        raise RuntimeError("this engine is closed")
    with torch.inference_mode(), scope(engine.device, engine.cuda_stream):
        if engine.torn:
            engine._recover()
        if engine.dropped:
            engine._abort_dropped()
        return method(engine, *args, **kwargs)


@contextlib.contextmanager
def torn_if_cut(engine) -> Iterator[None]:
    """If the block is cut short, the engine is left ``torn``, and its next call recovers first."""
    engine.torn = True
    yield
    engine.torn = False
