"""Logits that turn NaN end their request at once, with the tokens before them, and affect no other request."""

import asyncio
from functools import partial

import pytest
import torch

from orthrus_rt.aio import AsyncEngine
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints, engines, pace, poison
from tests.poison import EDITED, GREEDY, REJECTION, SAMPLED, jobs_of

pytestmark = pytest.mark.native
PACED = pytest.mark.usefixtures("paced")  # checks the cycles of requests that end without NaN

MODES = ("ar", "two_pass", "one_pass")
make = partial(engines.make, max_seq_len=128, max_batch_size=4)


@PACED
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kinds", ([GREEDY], [SAMPLED], [EDITED], [GREEDY, SAMPLED, EDITED]), ids=str)
def test_whoever_comes_upon_nan_ends_alone(folder, mode, kinds):
    engine = make(folder, mode=mode)
    poison.check_nan_ends_its_requests_alone(engine, jobs_of(kinds))


@PACED
def test_beside_and_by_rejection(folder):
    """Requests with rejection sampling share cycles with others; each request ends only if its own rows are NaN."""
    engine = make(folder)
    kinds = [GREEDY, REJECTION, SAMPLED]
    poison.check_nan_ends_its_requests_alone(engine, jobs_of(kinds))
    poison.check_nan_ends_its_requests_alone(engine, jobs_of([REJECTION], seed=1))


# How many requests draft and end without NaN, and their cycles: 234 and 264 if the diffusion view's o_proj is negated.
@pytest.mark.parametrize(("mode", "count", "cycles"), [("ar", 0, 0), ("two_pass", 15, 185), ("one_pass", 15, 229)])
def test_in_torch_alone(folder, mode, count, cycles, monkeypatch):
    """With the reference backend, whose cycles run op by op."""
    monkeypatch.setenv("ORTHRUS_BACKEND", "reference")
    engine = make(folder, mode=mode, dtype="float32", max_batch_size=8)
    with pace.noted(folder) as ended:
        poison.check_nan_ends_its_requests_alone(engine, jobs_of([GREEDY, SAMPLED], count=6))
    assert len(ended) == count and sum(one.cycles for one in ended) == pytest.approx(cycles, abs=6)


def test_few_pages_and_auto(folder):
    """A request that was preempted in between reaches the same NaN."""
    engine = make(folder, mode="auto", num_pages=3)
    long = [((prompt * 45)[:45], params) for prompt, params in jobs_of([GREEDY, SAMPLED])]
    poison.check_nan_ends_its_requests_alone(engine, long)
    assert engine.metrics.preemptions > 0


@PACED
@pytest.mark.parametrize("params", (GREEDY, SAMPLED, EDITED, REJECTION), ids=str)
def test_a_prompt_whose_logits_are_nan_yields_nothing(folder, params):
    """Wherever in the prompt the NaN lies. The other requests in its prefill pass get their tokens."""
    engine, params = make(folder), SamplingParams(10, ignore_eos=True, **params)
    batch = [([5, 6, 7], params), ([9, 6, 7, 8], params), ([8, 7, 9], params), ([7], params)]
    healthy = poison.run(engine, batch)
    prompt_tokens = engine.metrics.prompt_tokens
    with poison.nan_embedding(engine, 9):
        got = poison.run(engine, batch)
    for outcome, pair in zip(got, zip(batch, healthy, strict=True), strict=True):
        assert outcome == poison.outcome_with(9, *pair)
    assert got[1] == ([], "error", poison.error_of([9, 6, 7, 8], 0, params))
    assert got[2] == ([], "error", poison.error_of([8, 7, 9], 0, params))
    facts = engine.metrics.as_dict()
    assert facts["prompt_tokens"] == 2 * prompt_tokens and facts["recomputed_tokens"] == 0


@PACED
def test_without_a_first_token_there_is_no_time_of_it(folder):
    engine, params = make(folder), SamplingParams(10, ignore_eos=True)
    with poison.nan_embedding(engine, 9):
        nothing, some = (out.stats for out in engine.generate([[5, 9, 7], [5, 6, 7]], params))
    assert engine.metrics.as_dict()["first_token"]["count"] == 1
    assert (nothing.tokens, nothing.prefill_seconds, nothing.seconds) == (0, 0.0, 0.0)
    assert some.tokens == 10 and some.prefill_seconds > 0 and some.seconds > 0


@pytest.mark.parametrize(("mode", "at_least"), [("two_pass", 1.3), ("one_pass", 1.15)])
def test_nan_in_the_diffusion_view_costs_speed_alone(folder, mode, at_least):
    kinds = [GREEDY, SAMPLED, EDITED] + ([REJECTION] if mode == "two_pass" else [])
    poison.check_nan_drafts_cost_speed_alone(make(folder, mode=mode), jobs_of(kinds), at_least)


@PACED
def test_nobody_finds_what_a_request_left_that_came_upon_nan(folder):
    """Its keys and values may be the cause, and outlast the fault. A request that shares them meanwhile fails too."""
    engine, params = make(folder), SamplingParams(10, ignore_eos=True)
    prompt = [5, 6, 7, 8] * 17
    healthy = engine.generate(prompt, params).token_ids
    with poison.nan_embedding(engine, 9):
        assert engine.generate([[9, *prompt]] * 2, params)[1].finish_reason == "error"
    again = engine.generate([9, *prompt], params)
    assert (again.finish_reason, again.stats.cached_tokens) == ("length", 0)
    assert engine.generate(prompt, params).stats.cached_tokens == 64  # pages that other requests left are found
    assert engine.generate(prompt, params).token_ids == healthy


@pytest.mark.parametrize("chunk", (64, 128, 512))
@pytest.mark.parametrize("aborted", (False, True))
def test_nor_what_others_left_that_share_it(folder, monkeypatch, chunk, aborted):
    """Nor pages of requests whose prompts are still in prefill then, or that are aborted before they reach the NaN."""
    monkeypatch.setattr("orthrus_rt.runner.PREFILL_CHUNK", chunk)
    engine, params = make(folder, max_seq_len=512), SamplingParams(10, ignore_eos=True)
    head = [9, *[5, 6, 7, 8] * 33]  # two pages and a few tokens
    with poison.nan_embedding(engine, 9):
        first = engine.submit([*head, 1], params)
        others = [engine.submit([*head, *range(10, 10 + n)], params) for n in (20, 70, 85)]
        while engine.is_unfinished(first):
            engine.step()
    if aborted:
        for name in filter(engine.is_unfinished, others):
            engine.abort(name)
    engines.drain(engine)
    later = [engine.submit([*head, *range(10, 10 + n), 3], params) for n in (1, 20, 70, 85)]
    with pace.noted(folder) as ended:
        got = engines.drain(engine)
    assert [got[name][1] for name in later] == ["length"] * 4
    assert sum(one.cycles for one in ended) == pytest.approx(20, abs=4)  # 36 if no draft is accepted


@pytest.fixture
def ill(folder):
    """``(engine, (bad, outcome), (good, outcome))``: two greedy jobs; the bad one reaches NaN after some tokens."""
    engine, batch = make(folder), jobs_of([GREEDY], count=4)
    healthy = poison.run(engine, batch)
    token = poison.fatal_token(batch, healthy)
    with poison.nan_embedding(engine, token):
        known = [(job, poison.outcome_with(token, job, out)) for job, out in zip(batch, healthy, strict=True)]
        bad = next(pair for pair in known if pair[1][2] and len(pair[1][0]) > 3)
        yield engine, bad, next(pair for pair in known if not pair[1][2])


@PACED
def test_generate_raises_and_stream_yields_what_there_is_first(ill):
    engine, (job, (tokens, _, error)), _ = ill
    with pytest.raises(FloatingPointError) as raised:
        engine.generate(*job)
    assert str(raised.value) == error
    pieces = []
    with pytest.raises(FloatingPointError) as raised:
        for piece in engine.stream(*job):
            pieces.append(piece)
    assert str(raised.value) == error
    assert [t for piece in pieces for t in piece.token_ids] == tokens
    assert [(p.finished, p.finish_reason, p.error) for p in pieces[-2:]] == [
        (False, None, None), (True, "error", error),
    ]  # fmt: skip


@PACED
def test_streams_of_a_server(ill):
    engine, bad, good = ill

    async def collect(shared, job):
        pieces = [out async for out in shared.stream(*job)]
        return [t for out in pieces for t in out.new_token_ids], pieces[-1].finish_reason, pieces[-1].error

    async def main():
        async with AsyncEngine(engine) as shared:
            got = await asyncio.gather(*(collect(shared, job) for job, _ in (bad, good, bad)))
            assert got == [bad[1], good[1], bad[1]]
            facts = engine.metrics.as_dict()
            assert (facts["finished"]["error"], facts["running"], facts["waiting"]) == (2, 0, 0)

    before = engine.metrics.finished["error"]
    assert before == 0
    asyncio.run(main())


def test_parameters_that_rule_out_every_id_end_the_request_and_say_so(tmp_path):
    """A single id that is left is enough to go on."""
    folder = checkpoints.make(tmp_path / "tiny", dtype=torch.bfloat16, vocab_size=40, mask_token_id=39)
    engine = make(str(folder))
    for more in (GREEDY, {"temperature": 0.8, "seed": 1, "top_k": 2, "top_p": 0.5, "min_p": 0.1}):
        one_left = SamplingParams(9, min_tokens=6, stop_token_ids=[t for t in range(40) if t != 7], **more)
        none_left = SamplingParams(9, min_tokens=6, stop_token_ids=list(range(40)), **more)
        low, lowest = (
            SamplingParams(9, logit_bias=dict.fromkeys(range(40), bias), ignore_eos=True, **more)
            for bias in (-2e38, -3e38)
        )
        outs = engine.generate([[1, 2, 3]] * 4, [one_left, none_left, low, lowest])
        assert outs[0].token_ids[:6] == [7] * 6 and outs[0].finish_reason in ("stop", "length")
        assert (outs[1].token_ids, outs[1].finish_reason) == ([], "error")
        assert outs[1].error == poison.error_of([1, 2, 3], 0, none_left)
        assert "penalties, logit_bias and min_tokens rule out all" in outs[1].error
        assert len(outs[2].token_ids) == 9 and outs[2].finish_reason == "length"
        # Divided by the temperature, these logits are beyond the range of fp32.
        assert outs[3].finish_reason == ("length" if more is GREEDY else "error")


@PACED
def test_nor_what_free_pages_hold_behind_its_own(folder, monkeypatch):
    """They were left by a request that was aborted before it came upon the NaN."""
    monkeypatch.setattr("orthrus_rt.runner.PREFILL_CHUNK", 64)
    engine, params = make(folder, max_seq_len=512), SamplingParams(10, ignore_eos=True)
    long = [9, *[5, 6, 7, 8] * 50]
    with poison.nan_embedding(engine, 9):
        aborted = engine.submit(long, params)
        for _ in range(3):
            engine.step()
        engine.abort(aborted)
        assert engine.generate([long[:70]] * 2, params)[0].finish_reason == "error"
    assert engine.generate(long[:70], params).stats.cached_tokens == 0
    out = engine.generate(long, params)
    assert (out.finish_reason, out.stats.cached_tokens) == ("length", 64)
