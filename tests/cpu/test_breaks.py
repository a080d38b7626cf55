"""Breaks of a busy event loop, measured with a simulated clock and loop."""

from types import SimpleNamespace

import pytest

from orthrus_rt import breaks
from orthrus_rt.breaks import BETWEEN_BREAKS, BETWEEN_LOOKS, BREAK, BUSY, Breaks


class Loop:
    """An event loop whose time passes only in :meth:`turn`, and when it sleeps."""

    def __init__(self, monkeypatch):
        self.now = self.computed = 0.0
        self.timers, self.slept = [], []
        clock = SimpleNamespace(perf_counter=lambda: self.now, thread_time=lambda: self.computed, sleep=self.sleep)
        monkeypatch.setattr(breaks, "time", clock)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def call_later(self, seconds, function):
        self.timers.append((seconds, function))

    def turn(self, computes: float) -> float:
        """Let the one timer expire, computing for that share of its time; returns seconds to the next, 0 if none."""
        ((seconds, function),) = self.timers
        self.timers.clear()
        self.now += seconds
        self.computed += computes * seconds
        function()
        return self.timers[0][0] if self.timers else 0


@pytest.fixture
def loop(monkeypatch):
    return Loop(monkeypatch)


def test_a_loop_makes_breaks_while_it_is_busy_alone(loop):
    Breaks(loop, lambda _: True).begin()
    shares = [0.1, 0.95, 1.0, 0.5, 0.99, BUSY - 0.01]
    nexts = [loop.turn(share) for share in shares]
    assert nexts == [BETWEEN_BREAKS if share > BUSY else BETWEEN_LOOKS for share in shares]
    assert loop.slept == [BREAK] * 3 and BETWEEN_BREAKS >= 1e-3  # some loops have a resolution of whole milliseconds


def test_it_looks_as_long_as_somebody_waits(loop):
    waiting = []
    taken = Breaks(loop, waiting.append)  # append returns None: no caller waits
    taken.begin(), taken.begin()
    assert len(loop.timers) == 1 and loop.timers[0][0] == BETWEEN_LOOKS
    assert loop.turn(1.0) == 0 and waiting == [taken] and not loop.slept
    taken.begin()
    assert len(loop.timers) == 1
