"""A lock for state that all threads share, which also works in forked children."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator


class ForkLock:
    """A lock that is free in a forked child, where the thread that held it at the fork does not exist. Never freed."""

    def __init__(self, kind=threading.Lock):
        self._kind = kind
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = self._kind()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:  # the same lock to the end, even if this thread forks meanwhile
            yield
