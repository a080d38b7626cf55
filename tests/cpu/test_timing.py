"""measure() on a device that runs behind its host: it returns only the time of the work, at full clocks."""

import functools
import itertools

import pytest
import torch

from bench import bench_invariance, common
from orthrus_rt import timing

LAUNCH = 8.0  # µs that the host takes for a launch
DEVICE = torch.device("cuda")


class Gpu:
    """A device and its host with simulated clocks, in µs. Until the device has done 30 ms of work, it is slow."""

    def __init__(self, monkeypatch):
        self.host = self.device = self.worked = 0.0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / 2000))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host * 1e-6)

    def launch(self, us: float):
        us *= 1 if self.worked > 30e3 else 6
        self.host += LAUNCH
        self.device = max(self.device, self.host) + us
        self.worked += us

    def synchronize(self):
        self.host = max(self.host, self.device)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu.host += 1
        self.at = max(self.gpu.device, self.gpu.host)

    def query(self):
        return self.at <= self.gpu.host

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e-3


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


@pytest.mark.parametrize("launches", (1, 40, 400))
def test_neither_launches_nor_idle_clocks_are_measured(gpu, launches):
    took = timing.measure(lambda: [gpu.launch(3.0) for _ in range(launches)], DEVICE)
    assert took == {name: pytest.approx(3.0 * launches) for name in ("p50", "p20", "p80")}


def test_what_waits_for_the_device_itself_is_measured_all_the_same(gpu):
    def waits():
        gpu.launch(3.0)
        gpu.synchronize()
        gpu.launch(3.0)

    assert timing.measure(waits, DEVICE)["p50"] == pytest.approx(2 * 3.0 + LAUNCH)
    assert gpu.host < 1e6


def test_what_is_reset_is_not_measured(gpu):
    ran = []
    took = timing.measure(
        lambda: ran.append("run") or gpu.launch(3.0), DEVICE, reset=lambda: ran.append("reset") or gpu.launch(50.0)
    )
    assert took["p80"] == pytest.approx(3.0)
    assert ran == ["reset", "run"] * (len(ran) // 2)


def test_rounds_in_turn_are_warm_and_alone_too(gpu, monkeypatch):
    monkeypatch.setattr(bench_invariance, "graphed", lambda run, device: run)
    candidates = {"long": lambda i: gpu.launch(5.0), "short": lambda i: gpu.launch(2.0)}
    took = bench_invariance.least_times(candidates, copies=4, device=DEVICE, rounds=1)
    assert took == {"long": pytest.approx(5.0), "short": pytest.approx(2.0)}


def test_on_a_cpu_ways_take_turns(monkeypatch):
    """Each turn runs all of them, and the first three turns are not samples."""
    ran, clock = [], itertools.count()
    monkeypatch.setattr(common, "SPINNING_S", 0.0)
    monkeypatch.setattr(common, "time_each", lambda runs, device, repeats: [[runs[0]() or float(next(clock))]])
    runs = {name: functools.partial(ran.append, name) for name in ("own", "base")}
    took = common.measure_in_turns(runs, torch.device("cpu"), repeats=5)
    assert ran == ["own", "base"] * 8
    assert {name: us["p50"] for name, us in took.items()} == {"own": 10.0, "base": 11.0}
