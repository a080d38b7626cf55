"""A lock for what all threads share, in forked children too."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator


class ForkLock:
    """A lock that is free in a forked child, where whoever held it at the fork is not. Kept for good."""

    def __init__(self, kind=threading.Lock):
        self._kind = kind
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = self._kind()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:  # the same one to the end, should this thread fork meanwhile
            yield
