"""Breaks of a busy event loop, in which a thread beside it gets the interpreter.

A loop that always has something to run lets go of the interpreter (its lock, the GIL) whenever it looks for input, and
has it back within a microsecond, before a thread that waits for it can wake up. Nor is it made to hand it over, as a
thread would be that keeps it for ``sys.getswitchinterval()``: that time begins anew each time it lets go. So a loop
that is busy with short tasks can keep another thread from running at all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

BUSY = 0.8  # of a stretch that the loop's thread computes: more, and it takes breaks
BREAK = 50e-6  # seconds, in which a thread that waits wakes up
# Seconds: of a busy loop, and of one that was not when last looked at. Some loops know whole milliseconds alone.
BETWEEN_BREAKS, BETWEEN_LOOKS = 1e-3, 5e-3


class Breaks:
    """Of a loop, in whose thread all of this runs, as long as somebody is ``waiting(self)`` for the other thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, waiting: Callable[[Breaks], bool]):
        self._loop, self._waiting = loop, waiting
        self._looks = False

    def begin(self) -> None:
        """Somebody waits from now on."""
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
