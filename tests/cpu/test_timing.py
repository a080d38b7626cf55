"""Time on a device that runs behind its host: measure() returns only that of the work, at full clocks, and a stopwatch
never waits.
"""

import contextlib
import functools
import gc
import itertools
import weakref

import pytest
import torch

from bench import bench_invariance, common
from orthrus_rt import profile, timing
from orthrus_rt.stopwatch import Stopwatch

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
        assert self.at <= end.at <= self.gpu.host, "CUDA refuses events that the device has not passed"
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


def test_no_warm_up_means_none(gpu):
    ran = []
    timing.measure(lambda: ran.append("run") or gpu.launch(3.0), DEVICE, repeats=2, warmup=0)
    assert len(ran) == 2


def test_the_bandwidth_is_that_of_a_read(gpu, monkeypatch):
    kernel, gb_s = pytest.importorskip("orthrus_rt.triton_kernels.sum_words"), 3000
    memory = torch.empty(1 << 40, dtype=torch.int32, device="meta")
    for name in ("ones", "empty"):
        monkeypatch.setattr(torch, name, lambda n, **how: memory[:n])

    def read(words, out):
        assert len(out) * 65_536 == len(words)
        gpu.launch(words.nbytes / gb_s * 1e-3)

    monkeypatch.setattr(kernel, "sum_words", read)
    assert timing.read_bandwidth(DEVICE) == pytest.approx(gb_s)


def test_a_profile_hides_launches_however_slow_the_host(monkeypatch):
    """The device sleeps longer and longer, until the host has launched each chunk of calls before it wakes up."""
    slept = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def query(self):
            return slept[-1] < 4 * timing.SLEEP_CYCLES and len(slept) % 2  # true once it has woken up: in first chunks

        def elapsed_time(self, end):
            return 1e-9 * slept[-1]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "CHUNK", 2)
    calls = [profile.Call("embed", "embed", lambda: None, lambda: 0)] * 3
    got = profile.time_calls(calls, torch.device("cuda:0"), repeats=2)
    assert slept == [timing.SLEEP_CYCLES * n for n in (1, 1, 2, 2, 4, 4, 4, 4, 4, 4)]
    assert got == [pytest.approx(1e-6 * slept[-1])] * 3


def timed(watch: Stopwatch, gpu: Gpu, *works: float) -> None:
    """Time works of so many µs, of which the last one fails."""
    with contextlib.suppress(ZeroDivisionError):
        for us in works:
            with watch.time("cycle"):
                gpu.launch(us)
                1 / (us is not works[-1])


def test_a_stopwatch_tells_what_the_device_has_done(gpu, monkeypatch):
    events, gpu.worked = [], 1e6
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: events.append(enable_timing) or Event(gpu))
    watch = Stopwatch(DEVICE)
    timed(watch, gpu, 1e3, 2e3, 3e3, 4e3)
    assert list(watch.take()) == []
    gpu.host = 3.5e3
    assert list(watch.take()) == [("cycle", pytest.approx(1e-3, 0.01)), ("cycle", pytest.approx(2e-3))]
    gpu.synchronize()
    assert list(watch.take()) == [("cycle", pytest.approx(3e-3))]
    timed(watch, gpu, 1e3, 2e3, 3e3)
    assert events == [True] * 8  # used again


def test_a_stopwatch_goes_with_its_last_user(gpu):
    """Not only when garbage is collected, as events belong to the device."""
    watch = Stopwatch(DEVICE)
    timed(watch, gpu, 1e3)
    gone = weakref.ref(watch)
    gc.disable()
    try:
        del watch
        assert gone() is None
    finally:
        gc.enable()


def test_a_stopwatch_on_a_cpu(gpu):
    watch = Stopwatch(torch.device("cpu"))
    timed(watch, gpu, 1e3, 2e3)
    assert list(watch.take()) == [("cycle", pytest.approx(LAUNCH * 1e-6))] and list(watch.take()) == []


def test_rounds_in_turn_are_warm_and_alone_too(gpu, monkeypatch):
    monkeypatch.setattr(bench_invariance, "graphed", lambda run, device: run)
    candidates = {"long": lambda i: gpu.launch(5.0), "short": lambda i: gpu.launch(2.0)}
    took = bench_invariance.least_times(candidates, copies=4, device=DEVICE, rounds=1)
    assert took == {"long": pytest.approx(5.0), "short": pytest.approx(2.0)}


def test_on_a_cpu_the_clock_counts(monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", itertools.count().__next__)
    assert timing.time_each([int, int], torch.device("cpu"), repeats=3) == [[1e6] * 3] * 2


def test_on_a_cpu_ways_take_turns(monkeypatch):
    """Each turn runs all of them, and the first three turns are not samples."""
    ran, clock = [], itertools.count()
    monkeypatch.setattr(common, "SPINNING_S", 0.0)
    monkeypatch.setattr(common, "time_each", lambda runs, device, repeats: [[runs[0]() or float(next(clock))]])
    runs = {name: functools.partial(ran.append, name) for name in ("own", "base")}
    took = common.measure_in_turns(runs, torch.device("cpu"), repeats=5)
    assert ran == ["own", "base"] * 8
    assert {name: us["p50"] for name, us in took.items()} == {"own": 10.0, "base": 11.0}
