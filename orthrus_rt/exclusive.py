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


class Taken(RuntimeError):
    """The turn is taken by another call or owner."""


class Turn:
    """A lock held by the frame that entered it, for as long as that frame runs.

    Ctrl-C can strike between any two steps of Python: also after the lock is taken but before its ``with`` is entered,
    or on the way out before it is released. Either way the exception unwinds the holding frame. The next call of the
    same thread sees that the holder no longer runs, and takes its place. Signals reach no other thread.

    Attributes:
        holder: thread and frame by process, as a forked child has none of its parent's threads. To store an empty one,
            which no signal can interrupt, is to let go.
    """

    def __init__(self):
        self.holder: dict[int, tuple] = {}
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
        process, mine = os.getpid(), (threading.get_ident(), frame)
        self._check_owner()
        holder = self.holder.setdefault(process, mine)  # tests and sets in one step
        if holder is not mine:
            if holder[0] != mine[0]:
                raise Taken("this engine is in use by another thread; share it through orthrus_rt.AsyncEngine")
            if _runs(holder[1]):
                raise Taken("this engine is in the middle of a call; a signal handler cannot make another one")
            self.holder[process] = mine
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
    """Whether this thread is inside ``frame``."""
    caller = sys._getframe()
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


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
