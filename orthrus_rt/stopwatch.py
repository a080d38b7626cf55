"""How long launched work takes on its device, without ever waiting for it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class Stopwatch:
    """Times stretches of work by kind: with the host's clock on the CPU, with events on CUDA.

    On CUDA a stretch is known only when the device has passed it; events are used again.
    """

    def __init__(self, device: torch.device):
        self._on_device = device.type == "cuda"
        self._running: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._known: list[tuple[str, float]] = []
        self._spare: list[torch.cuda.Event] = []

    @contextlib.contextmanager
    def time(self, kind: str):
        """What is run or launched in here is one stretch of this kind."""
        if not self._on_device:
            start = time.perf_counter()
            yield
            self._known.append((kind, time.perf_counter() - start))
            return
        start, end = (self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._running.append((kind, start, end))

    def take(self) -> Iterator[tuple[str, float]]:
        """``(kind, seconds)`` of every stretch that is through and was not taken before."""
        while self._running and self._running[0][2].query():
            kind, start, end = self._running.popleft()
            self._known.append((kind, start.elapsed_time(end) * 1e-3))
            self._spare += [start, end]
        known, self._known = self._known, []
        yield from known
