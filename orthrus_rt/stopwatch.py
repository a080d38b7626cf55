"""Measures how long launched work takes on its device, without ever waiting for it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class Stretch:
    """Work of one kind; ``seconds`` is None until the device is known to have completed it."""

    def __init__(self, kind: str):
        self.kind, self.seconds = kind, None


class Stopwatch:
    """Times stretches of work by kind: with the host's clock on the CPU, with events on CUDA.

    On CUDA the time of a stretch is known only once the device has completed it. Events are reused.
    """

    def __init__(self, device: torch.device):
        self._on_device = device.type == "cuda"
        self._running: deque[tuple[Stretch, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._known: list[Stretch] = []
        self._spare: list[torch.cuda.Event] = []

    @contextlib.contextmanager
    def time(self, kind: str):
        """Time what is run or launched inside as one stretch of this kind."""
        stretch = Stretch(kind)
        if not self._on_device:
            start = time.perf_counter()
            yield stretch
            stretch.seconds = time.perf_counter() - start
            self._known.append(stretch)
            return
        start, end = (self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield stretch
        end.record()
        self._running.append((stretch, start, end))

    def take(self) -> Iterator[tuple[str, float]]:
        """``(kind, seconds)`` of every completed stretch that was not taken before."""
        self.settle()
        known, self._known = self._known, []
        yield from ((stretch.kind, stretch.seconds) for stretch in known)

    def settle(self) -> None:
        """Read the times of the stretches that the device has completed."""
        while self._running and self._running[0][2].query():
            stretch, start, end = self._running.popleft()
            stretch.seconds = start.elapsed_time(end) * 1e-3
            self._known.append(stretch)
            self._spare += [start, end]
