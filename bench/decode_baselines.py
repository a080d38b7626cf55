"""Rows of bench_decode for the baselines of bench/baselines.py."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from bench.baselines import GrowingCache, StaticCache, Weights
from bench.decode_cases import MANY, WARM_UP, Bench, peak_gb, prompts_of

MOST_LOST = 1000  # kernels at the beginning of a profile


def for_each_baseline(bench: Bench, do: Callable) -> None:
    """Call ``do(name, weights, batch, case)`` for all requested baselines, with weights of one kind at a time."""
    for name in bench.args.baselines:
        gc.collect()
        weights = Weights(bench.checkpoint, bench.device, bench.dtype, bench.positions(), fused=name == "graphed")
        for case in bench.cases:
            for batch in bench.args.batch if name == "graphed" and not bench.real else (1,):
                do(name, weights, batch, case)
        del weights


def baseline_of(bench: Bench, name: str, weights: Weights, batch: int, length: int, mode: str):
    """A baseline without sequences."""
    if name == "eager":
        return GrowingCache(weights, mode, bench.draft_len)
    return StaticCache(weights, mode, bench.draft_len, batch, length)


def simulated_cycle(bench: Bench, name: str, weights: Weights, batch: int, context: int, mode: str):
    """A function that runs the next cycle of a baseline in the middle of its decoding."""
    baseline = baseline_of(bench, name, weights, batch, bench.room(context, mode, batch), mode)
    baseline.place(context)
    accepted = bench.trace(mode, batch).tolist()
    steps = iter(range(MANY))
    return lambda: baseline.cycle(accepted[next(steps) % len(accepted)])


def real_baseline(bench: Bench, name: str, weights: Weights, prompt: list[int], mode: str):
    """A baseline that has prefilled this prompt."""
    block_len = bench.draft_len + 1
    length = len(prompt) + max(bench.args.tokens, block_len) + WARM_UP * block_len
    baseline = baseline_of(bench, name, weights, 1, length, mode)
    baseline.prefill([prompt])
    return baseline


def device_ms(bench: Bench, name: str, weights: Weights, batch: int, case, mode: str) -> float:
    """The time that the kernels of a baseline's cycle take, without the gaps that the host leaves between them."""
    from torch.profiler import ProfilerActivity, profile

    if bench.real:
        cycle = real_baseline(bench, name, weights, prompts_of(bench, case)[-1], mode).cycle
    else:
        cycle = simulated_cycle(bench, name, weights, batch, case, mode)
    for _ in range(WARM_UP):
        cycle()
    bench.sync()
    dropped = torch.zeros(1, device=bench.device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        # CUPTI before CUDA 13.1 loses the first kernels of a session, one more in every session of a process (pytorch
        # issue 192021). So these come first.
        for _ in range(MOST_LOST):
            dropped.erfinv_()
        bench.sync()
        cycle()
        bench.sync()
    events = [event for event in profiled.key_averages() if "erfinv" not in event.key]
    return sum(event.self_device_time_total for event in events) * 1e-3


def baseline_row(bench: Bench, name: str, weights: Weights, batch: int, context: int, mode: str) -> dict:
    """A baseline's cycles under the same trace; the host reads each cycle's results at once."""
    cycle = simulated_cycle(bench, name, weights, batch, context, mode)
    for _ in range(WARM_UP):
        cycle()
    bench.begin()
    start, tokens = time.perf_counter(), 0
    for _ in range(bench.args.cycles):
        tokens += sum(map(len, cycle()))
    bench.sync()
    seconds = time.perf_counter() - start
    per_cycle = tokens / bench.args.cycles / batch
    more = peak_gb(bench) | {"grown": per_cycle * (WARM_UP + bench.args.cycles / 2)}
    return bench.row(f"baseline {name}", mode, batch, context, seconds / bench.args.cycles, per_cycle, **more)


def real_baseline_row(bench: Bench, name: str, weights: Weights, batch: int, kind: str, mode: str) -> dict:
    """A baseline over the prompts of one kind, one after another, prefill left out as for the engine."""
    seconds = tokens = cycles = 0
    ids = prompts_of(bench, kind)
    for prompt in ids:
        baseline = real_baseline(bench, name, weights, prompt, mode)
        baseline.cycle()  # a graph's recording is not part of decoding
        bench.sync()
        start, total = time.perf_counter(), 1
        while total < bench.args.tokens:
            total += len(baseline.cycle()[0])
            cycles += 1
        bench.sync()
        seconds += time.perf_counter() - start
        tokens += min(total, bench.args.tokens) - 1
    more = {"kind": kind} | peak_gb(bench)
    mean = sum(map(len, ids)) / len(ids) + bench.args.tokens / 2
    return bench.row(f"baseline {name}", mode, batch, mean, seconds / cycles, tokens / cycles, **more)
