"""Time and bandwidth as benchmarks and the profile measure them."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from orthrus_rt import huge_pages

SLEEP_CYCLES = 1_000_000  # of the device, about 0.5 ms; up to 64 times as many if the host is slow to launch
CHUNK = 100  # runs launched after one sleep; far fewer than the driver's queue takes
WARM_UP_S = 0.05  # idle clocks are several times slower and take some tens of ms to rise


def percentiles(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)
    pick = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return {"p50": statistics.median(ordered), "p20": pick(0.2), "p80": pick(0.8)}


def measure(
    run: Callable[[], object],
    device: torch.device,
    *,
    repeats: int = 20,
    warmup: int = 3,
    reset: Callable = lambda: None,
) -> dict[str, float]:
    """Microseconds of ``run()``, ``reset()`` before each: p50, p20, p80. See :func:`time_each`.

    ``warmup`` runs come first, on a GPU followed by as many as it takes to raise its clocks; 0 means none.
    """
    _warm_up(run, device, warmup, reset)
    return percentiles(time_each([run], device, repeats=repeats, reset=reset)[0])


def _warm_up(run: Callable[[], object], device: torch.device, count: int, reset: Callable) -> None:
    for _ in range(count):
        reset()
        run()
    if device.type != "cuda" or not count:
        return
    torch.cuda.synchronize()  # time spent on compiling or recording does not count
    end = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < end:
        reset()
        run()
        torch.cuda.synchronize()


def time_each(
    runs: list[Callable[[], object]], device: torch.device, *, repeats: int, reset: Callable = lambda: None
) -> list[list[float]]:
    """Microseconds of each of ``runs``, ``repeats`` times each: run in order, with ``reset()`` before each round.

    On a GPU by events, after a sleep of the device that lasts until the host has launched everything; otherwise work
    that is shorter than its launch would be measured with the launch. On the CPU by the clock.
    """
    samples, sleep = [], SLEEP_CYCLES
    while len(samples) < repeats:
        reset()
        times, hidden = _on_device(runs, sleep) if device.type == "cuda" else (_on_host(runs), True)
        if hidden or sleep >= 64 * SLEEP_CYCLES:
            samples.append(times)
        else:
            sleep *= 2
    return [list(column) for column in zip(*samples, strict=True)]


def _on_host(runs) -> list[float]:
    times = []
    for run in runs:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def _on_device(runs, sleep: int) -> tuple[list[float], bool]:
    """The runs' times, and whether all were launched while the device slept."""
    times, hidden = [], True
    for first in range(0, len(runs), CHUNK):
        chunk = runs[first : first + CHUNK]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(chunk) + 1)]
        torch.cuda._sleep(sleep)
        marks[0].record()
        for run, mark in zip(chunk, marks[1:], strict=True):
            run()
            mark.record()
        hidden &= not marks[0].query()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)]
    return times, hidden


def read_bandwidth(device: torch.device) -> float:
    """GB/s when reading memory far larger than any cache, in huge pages as weights are, and writing next to nothing."""
    if device.type != "cuda":
        data = huge_pages.empty([64 << 20], torch.float32).fill_(1.0)
        return data.numel() * 4e-3 / measure(lambda: torch.dot(data, data), device)["p20"]
    from orthrus_rt.triton_kernels.sum_words import num_sums, sum_words

    data = torch.ones(1 << 30, dtype=torch.int32, device=device)
    out = torch.empty(num_sums(data.numel()), dtype=torch.int32, device=device)
    run = functools.partial(sum_words, data, out)
    return data.numel() * 4e-3 / measure(run, device)["p20"]
