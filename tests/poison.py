"""Weights that turn NaN under a running engine, and how every request must then end; for the CPU and GPU tiers.

A token whose embedding is NaN is chosen as usual. The row that has it as input, and every row that attends to that row,
has NaN logits. So a request ends with the first such token, whatever its mode and whatever runs with it.
"""

from __future__ import annotations

import contextlib
import random

import torch

from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams

GREEDY = {}
SAMPLED = {"temperature": 0.8, "seed": 3, "top_p": 0.95}
EDITED = {"repetition_penalty": 1.3, "logit_bias": {7: 2.0}, "min_tokens": 4}
REJECTION = {"temperature": 0.8, "seed": 3, "acceptance": "rejection"}

Job = tuple[list[int], SamplingParams]
Outcome = tuple[list[int], str, str | None]  # tokens, finish reason, error


def jobs_of(kinds: list[dict], count: int = 10, seed: int = 0) -> list[Job]:
    """Random prompts of tests/checkpoints.py's vocabulary without its mask token; parameters cycle over ``kinds``."""
    rng = random.Random(seed)
    return [
        (
            [rng.randrange(1, 95) for _ in range(rng.randint(1, 9))],
            SamplingParams(rng.randint(12, 24), ignore_eos=True, **kinds[i % len(kinds)]),
        )
        for i in range(count)
    ]


@contextlib.contextmanager
def nan(weights: torch.Tensor):
    """Sets the weights in place, so that recordings read NaN too, and restores them afterwards."""
    before = weights.clone()
    weights.fill_(torch.nan)
    try:
        yield
    finally:
        weights.copy_(before)


def nan_embedding(engine: Engine, token: int):
    return nan(engine.model.embedding[token])


def nan_drafter(engine: Engine):
    """Every diffusion row's logits are NaN."""
    return nan(engine.model.layers[0].qk_norms[2])


def error_of(prompt: list[int], num_tokens: int, params: SamplingParams) -> str:
    why = "are they NaN, or do penalties, logit_bias and min_tokens rule out all?" if params.edits else "are they NaN?"
    return f"no logit is above -inf ({why}) at position {len(prompt) + num_tokens}, after {num_tokens} generated tokens"


def outcome_with(token: int, job: Job, healthy: Outcome) -> Outcome:
    """How ``job`` must end once the embedding of ``token`` is NaN."""
    (prompt, params), (tokens, _, _) = job, healthy
    text = [*prompt, *tokens]
    if token not in text[:-1]:  # the last token is no row's input
        return healthy
    num_tokens = max(0, text.index(token) + 1 - len(prompt))
    return tokens[:num_tokens], "error", error_of(prompt, num_tokens, params)


def fatal_token(jobs: list[Job], healthy: list[Outcome]) -> int:
    """A token that ends some requests in the middle of their text and leaves at least half of all unaffected."""
    found = []
    for token in range(1, max(t for tokens, _, _ in healthy for t in tokens) + 1):
        outcomes = [outcome_with(token, *pair) for pair in zip(jobs, healthy, strict=True)]
        cut = sum(reason == "error" and len(tokens) > 3 for tokens, reason, _ in outcomes)
        spared = sum(reason != "error" for _, reason, _ in outcomes)
        if cut and 2 * spared >= len(jobs):
            found.append((cut, token))
    return max(found)[1]


def run(engine: Engine, jobs: list[Job], **how) -> list[Outcome]:
    """Runs all of ``jobs`` together, and checks that no page is missing afterwards."""
    outs = engine.generate([prompt for prompt, _ in jobs], [params for _, params in jobs], **how)
    assert engine.kv.num_free_pages == engine.kv.num_pages
    assert not any(engine.scheduler.slots) and not engine.scheduler.waiting
    return [(out.token_ids, out.finish_reason, out.error) for out in outs]


def check_nan_ends_its_requests_alone(engine: Engine, jobs: list[Job], **how) -> None:
    """Requests that reach NaN end there with an error, and the others get their tokens. Once the NaN is gone, all do,
    on pages that held NaN.
    """
    healthy = run(engine, jobs, **how)
    assert {reason for _, reason, _ in healthy} <= {"stop", "length"}
    token, before = fatal_token(jobs, healthy), engine.metrics.finished["error"]
    want = [outcome_with(token, *pair) for pair in zip(jobs, healthy, strict=True)]
    with nan_embedding(engine, token):
        assert run(engine, jobs, **how) == want
    assert engine.metrics.finished["error"] - before == sum(reason == "error" for _, reason, _ in want)
    assert run(engine, jobs, **how) == healthy


def check_nan_drafts_cost_speed_alone(engine: Engine, jobs: list[Job], at_least: float) -> None:
    """More than ``at_least`` tokens per cycle before, and hardly more than one with a drafter whose logits are NaN."""
    prompts, params = ([job[i] for job in jobs] for i in range(2))
    healthy = engine.generate(prompts, params)
    with nan_drafter(engine):
        slow = engine.generate(prompts, params)
    for a, b, p in zip(healthy, slow, params, strict=True):
        assert b.finish_reason == "length" and b.error is None and len(b.token_ids) == len(a.token_ids)
        # With rejection the drafts take part in the draw, so only its distribution stays the same.
        assert b.token_ids == a.token_ids or p.acceptance == "rejection"

    def tokens_per_cycle(outs):
        return sum(o.stats.tokens - 1 for o in outs) / sum(o.stats.cycles for o in outs)

    assert tokens_per_cycle(healthy) > at_least
    assert tokens_per_cycle(slow) < 1.05  # now and then the first id is right
