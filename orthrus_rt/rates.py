"""Measures how fast an engine decodes given prompts, by mode."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from orthrus_rt.cycle_plan import MODES, batch_buckets
from orthrus_rt.outputs import complete
from orthrus_rt.sampling import SamplingParams


def decode_rates(
    engine, prompts: Mapping[str, list[list[int]]], modes: Sequence[str], *, draft_len=None, fan_out=None,
    max_new_tokens: int,
) -> list[dict]:  # fmt: skip
    """Decode the prompts of each kind in each mode, greedily, as many at a time as the engine has slots.

    Args:
        prompts: the ids of the prompts of each kind.

    Returns:
        A row per kind and mode: ``kind``, ``mode``, ``block_len`` (for ``auto`` the longest), ``prompts``, ``batch``
        (prompts at a time), ``tokens``, ``tokens_per_cycle`` (of a sequence), ``ms_per_cycle`` (of the batch, on the
        device) and ``tok_s`` (by the clock, prefill included).

    Raises:
        RuntimeError: a prompt could not be continued.
    """
    rows = []
    for kind, ids in prompts.items():
        for mode in modes:
            options = dict(mode=mode, draft_len=draft_len, fan_out=fan_out)
            rows.append({"kind": kind} | _rate(engine, ids, options, max_new_tokens))
    return rows


def _rate(engine, ids, options, max_new_tokens) -> dict:
    _warm(engine, ids, options)
    params, before, start = SamplingParams(max_new_tokens), _cycles(engine), time.perf_counter()
    outs = complete(engine.generate(ids, params, **options))
    seconds, stats = time.perf_counter() - start, [out.stats for out in outs]
    count, device_seconds = (now - then for now, then in zip(_cycles(engine), before, strict=True))
    return {
        "mode": options["mode"],
        "block_len": engine.make_plan(**options).block_len,
        "prompts": len(outs),
        "batch": min(len(outs), engine.scheduler.num_slots),
        "tokens": sum(s.tokens for s in stats),
        "tokens_per_cycle": sum(s.tokens - 1 for s in stats) / max(1, sum(s.cycles for s in stats)),
        "ms_per_cycle": 1e3 * device_seconds / max(1, count),
        "tok_s": sum(s.tokens for s in stats) / seconds,
    }


def _warm(engine, ids, options) -> None:
    """Pay first-use costs, and build the cycles of every batch size that remains as prompts end, outside the timed
    part.

    Prompts of one token are decoded from the first step on, all at once. An engine in mode ``auto`` itself knows which
    cycles that mode may run.
    """
    for _ in range(2 if engine.runner.pads_prefill else 1):
        engine.generate(ids, SamplingParams(max_new_tokens=4), **options)
    if engine.mode == options["mode"] == "auto":
        return engine.warmup()
    for size in batch_buckets(min(len(ids), engine.scheduler.num_slots)):
        engine.generate([ids[0][:1]] * size, SamplingParams(max_new_tokens=4, ignore_eos=True), **options)


def _cycles(engine) -> tuple[int, float]:
    """The number of cycles so far, of any mode, and their seconds on the device."""
    counts, seconds = zip(*(engine.metrics.times.get(f"{mode}_cycle", (0, 0.0)) for mode in MODES), strict=True)
    return sum(counts), sum(seconds)
