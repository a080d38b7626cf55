"""The bitwise promise as checks of one engine, for every device: whatever the mode, the block length, the company, the
order of arrival, the pages and the way a cycle is run, AR decoding alone gives the same tokens, logits and cache.

A mode to come joins by one more line in ``MODES``.
"""

from __future__ import annotations

import random

from orthrus_rt.sampling import SamplingParams
from tests import traces
from tests.traces import assert_same, decode

MODES = {"two_pass": {}, "one_pass": {"fan_out": 3}}  # AR apart, and what else ``generate`` is told


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
    """Tokens per cycle over all of them."""
    cycles = sum((len(t.tokens) - 1) / t.tokens_per_cycle for t in decoded if t.tokens_per_cycle)
    return sum(len(t.tokens) - 1 for t in decoded if t.tokens_per_cycle) / cycles


def check_alone(engine, prompts, params, want, way, replayed=None) -> float:
    """Every prompt by itself; its tokens per cycle. For ``replayed`` see :func:`~tests.traces.decode`."""
    got = decode(engine, prompts, params, replayed=replayed, **way)
    assert_same(got, want, way)
    return rate(got)


def check_together(engine, prompts, params, want, way, seed=0) -> None:
    """All at once, in another order of arrival, between random others."""
    rng = random.Random(seed)
    others = random_prompts(engine.config.vocab_size, len(prompts) // 2, 90, seed)
    jobs = list(zip(prompts, params, want, strict=True))
    jobs += [(ids, SamplingParams(max_new_tokens=rng.randint(1, 30)), None) for ids in others]
    rng.shuffle(jobs)
    ids, each, expected = (list(column) for column in zip(*jobs, strict=True))
    got = decode(engine, ids, each, together=True, **way)
    assert_same([g for g, w in zip(got, expected, strict=True) if w], [w for w in expected if w], ("together", way))


def check_preempted(engine, prompts, params, want, way, num_pages) -> None:
    """Together on so few pages that some are thrown out and begin again."""
    with traces.few_pages(engine, num_pages):
        got = decode(engine, prompts, params, together=True, **way)
    assert_same(got, want, ("preempted", way))
    assert sum(t.preemptions for t in got) > 0


def check_eager(engine, prompts, params, want, way, again=True) -> None:
    """Op by op, no cycle recorded; and ``again``, as ever, nearly every cycle a replay where this device can record."""
    with traces.eager_cycles(engine):
        got = decode(engine, prompts, params, replayed=False, **way)
    assert_same(got, want, ("eager", way))
    if again:
        assert_same(decode(engine, prompts, params, replayed=True, **way), want, ("replayed", way))


def check_prefill(engine, monkeypatch) -> None:
    """The chunk size, and prompts that share the passes' budget, change no bit of the pages or of what follows."""
    prompts = random_prompts(engine.config.vocab_size, 6, 200, seed=2)
    params = greedy(6, max_new_tokens=3, ignore_eos=True)
    want = decode(engine, prompts, params)
    for chunk in (1, 7, 64, 100):
        monkeypatch.setattr("orthrus_rt.runner.PREFILL_CHUNK", chunk)
        for together in (False, True) if chunk > 1 else (True,):  # one token a pass is the same pass for one prompt
            assert_same(decode(engine, prompts, params, together=together), want, ("prefill chunk", chunk))
