"""Breaks of a busy event loop, in which another thread gets the interpreter.

A loop that always has something to run releases the interpreter's lock (the GIL) whenever it polls for input, and takes
it back within a microsecond, before a waiting thread can wake up. Nor is it forced to hand it over, as a thread is that
keeps the lock for ``sys.getswitchinterval()``: that interval begins anew with each release. So a loop that is busy with
short tasks can keep another thread from running at all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

BUSY = 0.8  # share of time that the loop's thread computes, above which it takes breaks
BREAK = 50e-6  # seconds, in which a waiting thread wakes up
# Seconds, for a loop that was busy at the last look, and for one that was not. Some loops only know whole milliseconds.
BETWEEN_BREAKS, BETWEEN_LOOKS = 1e-3, 5e-3


class Breaks:
    """Breaks of ``loop``, in whose thread all of this runs, as long as ``waiting(self)`` for the other thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, waiting: Callable[[Breaks], bool]):
        self._loop, self._waiting = loop, waiting
        self._looks = False

    def begin(self) -> None:
        """Begin to look, as something waits for the other thread from now on."""
        if not self._looks:
            self._looks = True
            self._look_again(BETWEEN_LOOKS)

    def _look_again(self, seconds: float) -> None:
        self._since = time.perf_counter(), time.thread_time()
        self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        if not self._waiting(self):
            self._looks = False
            return
        since, computed = self._since
        busy = time.thread_time() - computed > BUSY * (time.perf_counter() - since)
        if busy:
            time.sleep(BREAK)
        self._look_again(BETWEEN_BREAKS if busy else BETWEEN_LOOKS)
