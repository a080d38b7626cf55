"""Measures how long launched work takes on its device, without ever waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch


class Stretch:
    """Work of one kind, which a ``with`` block runs or launches; ``seconds`` is None until they are known."""

    def __init__(self, kind: str, stopwatch: Stopwatch):
        self.kind, self.seconds, self._stopwatch = kind, None, stopwatch

    def __enter__(self) -> Stretch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, failed, *_) -> None:
        stopwatch, self._stopwatch = self._stopwatch, None  # the stopwatch refers to this
        if failed is None:
            self.seconds = time.perf_counter() - self._start
            stopwatch.known.append(self)


class StretchOnDevice(Stretch):
    """The same for a CUDA stream: the seconds are known once the device has completed the work."""

    def __enter__(self) -> Stretch:
        spare = self._stopwatch.spare
        self.start, self.end = (spare.pop() if spare else torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.start.record()
        return self

    def __exit__(self, failed, *_) -> None:
        stopwatch, self._stopwatch = self._stopwatch, None
        if failed is None:
            self.end.record()
            stopwatch.running.append(self)


class Stopwatch:
    """Times stretches of work by kind: with the host's clock on the CPU, with events on CUDA. Events are reused."""

    def __init__(self, device: torch.device):
        self._stretch = StretchOnDevice if device.type == "cuda" else Stretch
        self.running: deque[StretchOnDevice] = deque()
        self.known: list[Stretch] = []
        self.spare: list[torch.cuda.Event] = []

    def time(self, kind: str) -> Stretch:
        """Time what is run or launched inside, as in ``with stopwatch.time("prefill"):``, as one stretch."""
        return self._stretch(kind, self)

    def take(self) -> Iterator[tuple[str, float]]:
        """``(kind, seconds)`` of every completed stretch that was not taken before."""
        self.settle()
        known, self.known = self.known, []
        yield from ((stretch.kind, stretch.seconds) for stretch in known)

    def settle(self) -> None:
        """Read the times of the stretches that the device has completed."""
        while self.running and self.running[0].end.query():
            stretch = self.running.popleft()
            stretch.seconds = stretch.start.elapsed_time(stretch.end) * 1e-3
            self.known.append(stretch)
            self.spare += [stretch.start, stretch.end]
            del stretch.start, stretch.end
