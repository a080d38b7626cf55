"""A request that cannot go on ends alone, whatever fails; an engine that fails or is closed lets go of everything."""

import asyncio
import gc
import logging
import warnings
import weakref

import pytest
import torch

from orthrus_rt import dispatch
from orthrus_rt.aio import AsyncEngine
from orthrus_rt.device import claim
from orthrus_rt.engine import Engine
from orthrus_rt.graph import Cycle
from orthrus_rt.model import Activations
from orthrus_rt.pass_costs import PassCosts
from orthrus_rt.runner import Runner
from orthrus_rt.sampling import RejectionSampler, SamplingParams
from tests import checkpoints

pytestmark = pytest.mark.skipif(dispatch.native() is None, reason="the native module is not built")

GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=20, temperature=0.8, seed=3, ignore_eos=True)
REJECTION = SamplingParams(max_new_tokens=20, temperature=0.8, seed=3, ignore_eos=True, acceptance="rejection")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(checkpoints.make(tmp_path_factory.mktemp("tiny"), "qwen3", dtype=torch.bfloat16, diff_noise=0.05))


@pytest.fixture(scope="module")
def alone(folder):
    engine = make(folder, mode="ar", max_batch_size=1)
    return lambda prompt, params: engine.generate(prompt, params).token_ids


def make(folder, **kwargs):
    how = {"mode": "two_pass", "max_seq_len": 128, "max_batch_size": 4} | kwargs
    return Engine.from_pretrained(folder, device="cpu", **how)


def exhausted(*_, **__):
    raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")


def drain(engine):
    """Step to the end; tokens and finish reason by request id, and the errors on the way."""
    got, errors = {}, []
    while engine.has_unfinished():
        assert len(errors) < 20, "it never ends"
        try:
            outputs = engine.step()
        except (torch.OutOfMemoryError, FloatingPointError) as error:
            errors.append(error)
            continue
        for out in outputs:
            tokens, _ = got.get(out.request_id, ([], None))
            got[out.request_id] = tokens + out.new_token_ids, out.finish_reason
    return got, errors


def refuse(owner, name, monkeypatch, refused):
    """Calls for which ``refused(*args)`` holds find no memory."""
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kw: exhausted() if refused(*args) else real(*args, **kw))


def test_no_memory_for_logits_ends_those_who_sample(folder, alone, monkeypatch):
    """Every cycle that needs logits would fail: whoever needs them must not keep the others waiting."""
    engine = make(folder)
    monkeypatch.setattr(Activations, "logits", exhausted)
    jobs = [([1, 2], GREEDY), ([3, 4], SAMPLED), ([5], GREEDY), ([6], REJECTION)]
    ids = [engine.submit(*job) for job in jobs]
    got, errors = drain(engine)
    assert len(errors) == 2 and all("lower max_batch_size" in str(e) for e in errors)
    for request_id, (prompt, params) in zip(ids, jobs, strict=True):
        assert got[request_id] == ((alone(prompt, params), "length") if params is GREEDY else ([], "abort"))
    assert engine.kv.num_free_pages == engine.kv.num_pages - 1


@pytest.mark.parametrize("step", ("__init__", "_record"))
def test_no_memory_for_a_bigger_batch_ends_the_latest(folder, alone, monkeypatch, step):
    engine = make(folder)
    if step == "__init__":
        refuse(Cycle, "__init__", monkeypatch, lambda _, model, kv, state, *rest: state.num_slots > 2)
    else:
        refuse(Cycle, "_record", monkeypatch, lambda cycle: cycle.state.num_slots > 2)
    ids = [engine.submit([i + 1] * 3, GREEDY) for i in range(4)]
    got, errors = drain(engine)
    assert len(errors) == 2 and all("two_pass cycle of 4 slots: lower" in str(error) for error in errors)
    assert [got[i][1] for i in ids] == ["length", "length", "abort", "abort"]
    assert [got[i][0] for i in ids[:2]] == [alone([i + 1] * 3, GREEDY) for i in range(2)]


def test_logits_that_turn_nan_while_sampling_end_their_request(folder, alone, monkeypatch):
    engine = make(folder)
    real = RejectionSampler.verify

    def verify(sampler, logits, drafts, position):
        return real(sampler, logits if position < 8 else logits * torch.nan, drafts, position)

    monkeypatch.setattr(RejectionSampler, "verify", verify)
    bad, good = engine.submit([1, 2], REJECTION), engine.submit([3, 4], GREEDY)
    got, errors = drain(engine)
    assert [str(e) for e in errors] == ["sampling: the logits are not finite; are the weights?"]
    assert got[good] == (alone([3, 4], GREEDY), "length")
    assert got[bad][1] == "abort" and 0 < len(got[bad][0]) < 20


def test_rejection_keeps_no_draft_distributions(folder):
    engine = make(folder)
    stream = engine.stream([1, 2], REJECTION)
    next(stream), next(stream)
    (request,) = engine.scheduler.active
    assert request.rejection._draft_probs is None


def run(folder, use):
    """``use(shared)`` with an AsyncEngine."""

    async def main():
        shared = AsyncEngine(make(folder))
        try:
            await use(shared)
        finally:
            await shared.close()
            await shared.close()  # harmless

    asyncio.run(main())


async def collect(shared, prompt, params):
    pieces = [out async for out in shared.stream(prompt, params)]
    return [t for out in pieces for t in out.new_token_ids], pieces[-1].finish_reason


def test_async_a_bad_request_ends_alone(folder, alone, monkeypatch, caplog):
    async def use(shared):
        monkeypatch.setattr(Activations, "logits", exhausted)
        jobs = [([1, 2], GREEDY), ([3, 4], SAMPLED), ([5], GREEDY)]
        got = await asyncio.gather(*(collect(shared, *job) for job in jobs))
        assert got == [(alone([1, 2], GREEDY), "length"), ([], "abort"), (alone([5], GREEDY), "length")]

    with caplog.at_level(logging.ERROR, logger="orthrus_rt"):
        run(folder, use)
    assert "a step failed" in caplog.text and "making room for logits" in caplog.text


def test_async_what_fails_again_and_again_reaches_every_stream(folder, monkeypatch):
    async def use(shared):
        monkeypatch.setattr(shared.engine.runner, "prefill", lambda *_: 1 / 0)
        got = await asyncio.gather(*(collect(shared, [i], GREEDY) for i in range(3)), return_exceptions=True)
        assert [type(error) for error in got] == [ZeroDivisionError] * 3
        monkeypatch.undo()
        assert (await collect(shared, [1], GREEDY))[1] == "length"

    run(folder, use)


def test_async_a_slow_reader_of_the_last_piece_costs_nothing(folder):
    async def use(shared):
        steps, real = [], shared.engine.step
        shared.engine.step = lambda: (steps.append(1), real())[1]
        stream = shared.stream([1, 2], GREEDY)
        async for out in stream:
            if out.finished:
                before = len(steps)
                await asyncio.sleep(0.1)
                assert len(steps) <= before + 1  # the one that was under way

    run(folder, use)


def test_async_streams_of_a_closed_engine_end_with_an_error(folder):
    async def use(shared):
        stream = shared.stream([1, 2], SamplingParams(max_new_tokens=100, ignore_eos=True))
        await anext(stream)
        await shared.close()
        with pytest.raises(RuntimeError, match="this engine is closed"):
            async for _ in stream:
                pass
        with pytest.raises(RuntimeError, match="this engine is closed"):
            await anext(shared.stream([1, 2]))

    run(folder, use)


def test_an_engine_that_could_not_be_made_does_not_hold_its_device(folder, monkeypatch):
    made = []
    monkeypatch.setattr("orthrus_rt.engine.claim", lambda device, engine: made.append(engine))
    monkeypatch.setattr(Runner, "__init__", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        make(folder)
    device = torch.device("cuda:7")
    claim(device, made[0])  # as the constructor had
    claim(device, object.__new__(Engine))


@pytest.mark.parametrize("broken", (False, True))
def test_close_gives_the_memory_back(folder, monkeypatch, broken):
    """Also of an engine whose device fails and that would have to recover first."""
    engine = make(folder)
    name = engine.submit([1, 2], SAMPLED)
    for _ in range(3):
        engine.step()
    held = [weakref.ref(x) for x in (engine.kv.pages, engine.model, engine.runner.activations.normed)]
    if broken:
        engine.torn = True
        monkeypatch.setattr(engine.runner, "drop_cycles", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.close()
        monkeypatch.undo()
    engine.close()
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
    assert not engine.has_unfinished() and not engine.is_unfinished(name)
    facts = engine.metrics.as_dict()
    assert facts["finished"]["abort"] == 1 and facts["tokens"] > 1
    assert (facts["waiting"], facts["running"], facts["pages"], facts["pages_free"]) == (0, 0, 0, 0)
    for call in (
        engine.step,
        engine.memory_report,
        engine.warmup,
        lambda: engine.generate([1]),
        lambda: engine.abort("x"),
    ):
        with pytest.raises(RuntimeError, match="this engine is closed"):
            call()


def test_a_prompt_refused_by_a_closing_engine_is_not_counted(folder):
    engine = make(folder)
    stream = engine.stream([1, 2], GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="the mode cannot change"):
        engine.generate([3], GREEDY, mode="ar")
    assert engine.metrics.as_dict()["finished"]["abort"] == 0
    stream.close()
    assert engine.metrics.as_dict()["finished"]["abort"] == 1


def test_costs_that_cannot_be_kept_are_a_warning(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = make(folder, mode="auto", max_batch_size=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PassCosts, "save", full)
    with pytest.warns(UserWarning, match="cannot be kept for the next one: .*No space left"):
        engine.warmup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.warmup()  # said once
    assert engine.generate([1, 2], GREEDY).finish_reason == "length"
