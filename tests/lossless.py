"""The bitwise guarantee as checks of one engine, for every device: tokens, logits and cache are those of AR decoding
alone, whatever the mode, the block length, the other requests, the order of arrival, the pages and the way a cycle is
run. Tokens per cycle are those that each request has alone: a broken drafter gives the right text in more cycles.

A new mode is checked once it is added to ``MODES``.
"""

from __future__ import annotations

import random
import weakref

from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams
from tests import traces
from tests.traces import assert_same, decode

MODES = {"two_pass": {}, "one_pass": {"fan_out": 3}}  # all modes but AR, and further arguments of ``generate``


def ways(draft_lens, modes=tuple(MODES)) -> list[dict]:
    """The arguments of ``generate`` for each way to decode."""
    return [dict(mode=mode, draft_len=n, **MODES[mode]) for mode in modes for n in draft_lens]


def sampled(count: int, **kwargs) -> list[SamplingParams]:
    """Different filters, temperatures and seeds."""
    filters = ({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.95, "temperature": 1.3})
    return [SamplingParams(**({"temperature": 0.8, "seed": 100 + i} | filters[i % 5] | kwargs)) for i in range(count)]


def greedy(count: int, **kwargs) -> list[SamplingParams]:
    return [SamplingParams(**kwargs)] * count


def random_prompts(vocab_size: int, count: int, longest: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def rate(decoded) -> float:
    """Tokens per cycle over all traces."""
    cycles = sum((len(t.tokens) - 1) / t.tokens_per_cycle for t in decoded if t.tokens_per_cycle)
    return sum(len(t.tokens) - 1 for t in decoded if t.tokens_per_cycle) / cycles


_alone: weakref.WeakKeyDictionary[Engine, dict] = weakref.WeakKeyDictionary()  # tokens per cycle, by request and way


def key_of(prompt, params, way) -> tuple:
    return tuple(prompt), params, tuple(sorted(way.items()))


def remember(engine, prompts, params, way, decoded) -> None:
    """Store the tokens per cycle of each request decoded alone; every such decoding must have the same number."""
    known = _alone.setdefault(engine, {})
    for n, (ids, p, trace) in enumerate(zip(prompts, params, decoded, strict=True)):
        rate = known.setdefault(key_of(ids, p, way), trace.tokens_per_cycle)
        assert trace.tokens_per_cycle == rate, ("alone", way, n)


def check_pace(engine, prompts, params, way, decoded, what: str) -> None:
    """Each request takes as many cycles as alone; if that number is not known yet, it is decoded alone now. Requests of
    one_pass that lost their blocks by a preemption are left out.
    """
    known, compared = _alone.setdefault(engine, {}), 0
    for n, (ids, p, trace) in enumerate(zip(prompts, params, decoded, strict=True)):
        if trace.preemptions and way["mode"] == "one_pass":
            continue
        key = key_of(ids, p, way)
        if key not in known:
            known[key] = engine.generate(ids, p, **way).stats.tokens_per_cycle
        assert trace.tokens_per_cycle == known[key], (what, way, n)
        compared += 1
    assert compared, (what, way)


def check_alone(engine, prompts, params, want, way, replayed=None) -> float:
    """Decode each prompt by itself; returns the tokens per cycle. For ``replayed`` see :func:`~tests.traces.decode`."""
    got = decode(engine, prompts, params, replayed=replayed, **way)
    assert_same(got, want, way)
    remember(engine, prompts, params, way, got)
    return rate(got)


def check_together(engine, prompts, params, want, way, seed=0) -> None:
    """Decode all at once, in another order of arrival, among other random requests."""
    rng = random.Random(seed)
    others = random_prompts(engine.config.vocab_size, len(prompts) // 2, 90, seed)
    jobs = list(zip(prompts, params, want, strict=True))
    jobs += [(ids, SamplingParams(max_new_tokens=rng.randint(1, 30)), None) for ids in others]
    rng.shuffle(jobs)
    ids, each, expected = (list(column) for column in zip(*jobs, strict=True))
    got = decode(engine, ids, each, together=True, **way)
    ours = [(i, p, g, w) for i, p, g, w in zip(ids, each, got, expected, strict=True) if w]
    ids, each, got, expected = (list(column) for column in zip(*ours, strict=True))
    assert_same(got, expected, ("together", way))
    check_pace(engine, ids, each, way, got, "together")


def check_preempted(engine, prompts, params, want, way, num_pages) -> None:
    """Decode all together on so few pages that some are preempted and start again."""
    with traces.few_pages(engine, num_pages):
        got = decode(engine, prompts, params, together=True, **way)
    assert_same(got, want, ("preempted", way))
    assert sum(t.preemptions for t in got) > 0
    check_pace(engine, prompts, params, way, got, "preempted")


def check_eager(engine, prompts, params, want, way, again=True) -> None:
    """Decode op by op, with no cycle recorded. ``again``: then as usual, when nearly every cycle must be a replay."""
    with traces.eager_cycles(engine):
        got = decode(engine, prompts, params, replayed=False, **way)
    assert_same(got, want, ("eager", way))
    if again:
        replays = decode(engine, prompts, params, replayed=True, **way)
        assert_same(replays, want, ("replayed", way))
        remember(engine, prompts, params, way, replays)
    check_pace(engine, prompts, params, way, got, "eager")


def check_prefill(engine, monkeypatch) -> None:
    """Neither the chunk size nor prompts that share a pass's budget change any bit of the pages or of what follows."""
    prompts = random_prompts(engine.config.vocab_size, 6, 200, seed=2)
    params = greedy(6, max_new_tokens=3, ignore_eos=True)
    want = decode(engine, prompts, params)
    for chunk in (1, 7, 64, 100):
        monkeypatch.setattr("orthrus_rt.runner.PREFILL_CHUNK", chunk)
        for together in (False, True) if chunk > 1 else (True,):  # a pass of one token has one prompt either way
            assert_same(decode(engine, prompts, params, together=together), want, ("prefill chunk", chunk))
