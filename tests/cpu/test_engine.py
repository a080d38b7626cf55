"""The engine's behaviour on a tiny checkpoint: how requests end, limits, streams, sampling."""

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orthrus_rt import state as st
from orthrus_rt.checkpoint import head_name
from orthrus_rt.cycle_plan import MAX_BLOCK_LEN, MODES, cycle_plan
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints, engines

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
# Drafts that each cycle of two_pass accepts, for 80 greedy tokens after PROMPT, in float32 on any CPU variant.
ACCEPTED = [0, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 2, 1, 1, 1, 1, 1, 0, 7, 7, 6, 7, 2, 0, 3, 0, 0, 0, 2, 0, 2]
# Without attention in the diffusion view, or with another mask token, there are more than twice as many cycles.
CHECKPOINT = dict(seed=110, diff_noise=0.05, vocab_size=24, mask_token_id=23, head_dim=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(checkpoints.make(tmp_path_factory.mktemp("engine"), **CHECKPOINT))


@pytest.fixture(scope="module")
def engine(folder):
    return engines.make(folder, dtype="float32", max_seq_len=512)


def greedy(engine, n=40, prompt=PROMPT, **kwargs):
    params = {k: kwargs.pop(k) for k in ("stop_token_ids", "ignore_eos") if k in kwargs}
    return engine.generate(prompt, SamplingParams(max_new_tokens=n, **({"ignore_eos": True} | params)), **kwargs)


def cycles_of(num_tokens):
    """Cycles that two_pass takes for so many greedy tokens after PROMPT, if the limit cuts no block that matters."""
    ends = itertools.accumulate(ACCEPTED, lambda end, accepted: end + accepted + 1, initial=1)
    return next(cycles for cycles, end in enumerate(ends) if end >= num_tokens)


def decoded(out):
    """Tokens, and the number of cycles that they took."""
    return out.token_ids, out.stats.cycles


@pytest.mark.parametrize(("draft_len", "cycles"), [*enumerate((21, 18, 19, 19, 20, 20, 19), 1)])
def test_every_draft_len_gives_the_ar_tokens(engine, draft_len, cycles):
    want = greedy(engine, mode="ar")
    got = greedy(engine, mode="two_pass", draft_len=draft_len)
    assert got.token_ids == want.token_ids
    assert got.stats.block_len == draft_len + 1 and len(got.stats.accepted) == draft_len + 1
    assert got.stats.passes == 2 * got.stats.cycles == 2 * cycles and want.stats.passes == want.stats.cycles == 39
    emitted = sum((j + 1) * count for j, count in enumerate(got.stats.accepted))
    assert emitted >= got.stats.tokens - 1  # the last cycle may lose its bonus token to the limit


def test_a_tokenizer_that_is_asked_for_while_this_thread_loads_it(engine, monkeypatch):
    """By a module that transformers imports, for example, or a signal handler: the thread does not wait for itself."""
    loads = iter([lambda: engine.tokenizer, lambda: "loaded"])
    monkeypatch.setattr(engine, "_tokenizer", None)
    monkeypatch.setattr(type(engine.checkpoint), "load_tokenizer", lambda _: next(loads)())
    assert engine.tokenizer == "loaded"


def test_tokens_per_cycle_is_pinned(engine):
    """A broken drafter gives the right text, only slowly."""
    stats = greedy(engine, 80, mode="two_pass", draft_len=7).stats
    assert stats.accepted == [ACCEPTED.count(drafts) for drafts in range(8)]
    assert stats.cycles == len(ACCEPTED) == 31 and stats.tokens_per_cycle == 79 / 31


@pytest.mark.parametrize("n", (1, 2, 7, 8, 9, 17))
def test_never_more_than_max_new_tokens(engine, n):
    want = greedy(engine, 40, mode="ar").token_ids[:n]
    for mode in MODES:
        out = greedy(engine, n, mode=mode)
        assert out.token_ids == want and out.finish_reason == "length" and out.stats.tokens == n
        assert mode != "two_pass" or out.stats.cycles == cycles_of(n)


def test_stops_at_the_exact_token_inside_a_block(engine):
    tokens = greedy(engine, 40, mode="ar").token_ids
    for stop in sorted(set(tokens)):
        first = tokens.index(stop)
        for mode in MODES:
            out = greedy(engine, 40, mode=mode, stop_token_ids=(stop,))
            assert out.token_ids == tokens[: first + 1], (stop, mode)
            assert out.finish_reason == "stop"
            assert mode != "two_pass" or out.stats.cycles == cycles_of(first + 1)


def test_every_eos_of_the_checkpoint_ends_unless_ignored(engine, monkeypatch):
    tokens = greedy(engine, 40, mode="ar").token_ids
    late = max(set(tokens), key=tokens.index)
    monkeypatch.setattr(engine, "config", dataclasses.replace(engine.config, eos_token_ids=(0, late)))
    for mode in ("ar", "two_pass"):
        cut = greedy(engine, 40, mode=mode, ignore_eos=False)
        assert cut.token_ids == tokens[: tokens.index(late) + 1] and cut.finish_reason == "stop"
        assert greedy(engine, 40, mode=mode, ignore_eos=True).token_ids == tokens


def test_never_past_max_seq_len(folder):
    small = engines.make(folder, dtype="float32", max_seq_len=64)
    want = greedy(small, 1000, mode="ar").token_ids
    for mode in MODES:
        out = greedy(small, 1000, mode=mode)
        assert out.token_ids == want and len(PROMPT) + len(want) == 64 and out.finish_reason == "length"
        assert mode != "two_pass" or out.stats.cycles == cycles_of(56)
    one = greedy(small, 5, prompt=[1] * 63, mode="two_pass")
    assert len(one.token_ids) == 1 and one.finish_reason == "length"


def test_prompt_of_several_chunks(engine, monkeypatch):
    prompt = [(7 * i * i + i) % 20 for i in range(150)]
    want = decoded(greedy(engine, 30, prompt=prompt))
    monkeypatch.setattr("orthrus_rt.runner.PREFILL_CHUNK", 64)
    assert decoded(greedy(engine, 30, prompt=prompt)) == want


def test_stream_is_generate_in_pieces(engine):
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    pieces = list(engine.stream(PROMPT, params))
    assert [t for p in pieces for t in p.token_ids] == engine.generate(PROMPT, params).token_ids
    assert len(pieces[0].token_ids) == 1 and pieces[-1].finish_reason == "length"
    assert pieces[-1].stats.cycles == cycles_of(30)
    assert all(p.finish_reason is None for p in pieces[:-1])


@pytest.mark.native
def test_an_engine_made_in_inference_mode_does_not_break_the_next(folder):
    """Packed weights share blocks of memory, whichever engine asks for them."""
    for mode in (True, False):
        with torch.inference_mode(mode):
            Engine.from_pretrained(folder, device="cpu", mode="two_pass", dtype="bfloat16", max_seq_len=64)


def test_closing_a_stream_frees_everything(engine):
    want, free = greedy(engine, 5).token_ids, engine.kv.num_free_pages
    stream = engine.stream(PROMPT, SamplingParams(max_new_tokens=30, ignore_eos=True))
    next(stream)
    with pytest.raises(RuntimeError, match="cannot change while requests run"):
        next(engine.stream(PROMPT, mode="ar"))
    stream.close()
    assert engine.kv.num_free_pages == free and bool((engine.kv.page_table == 0).all())
    assert bool((engine.runner.state.finish == st.EMPTY).all())
    assert decoded(greedy(engine, 5)) == (want, cycles_of(5))


def test_batch_gives_the_tokens_of_each_alone(engine):
    prompts = [PROMPT, torch.tensor([1, 2, 3]), [5]]
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    outs = engine.generate(prompts, params)
    assert list(map(decoded, outs)) == [decoded(engine.generate(p, params)) for p in prompts]
    with pytest.raises(ValueError, match="params must be one SamplingParams or 3 of them, got 2"):
        engine.generate(prompts, [params, params])


@pytest.mark.native
def test_a_block_size_beyond_the_kernels(tmp_path):
    """Such a checkpoint drafts as many tokens as they take, and asking for more is an error before anything runs."""
    folder = checkpoints.make(tmp_path, **CHECKPOINT, block_size=512)
    engine = Engine.from_pretrained(str(folder), device="cpu", mode="two_pass", dtype="float32", max_batch_size=1)
    assert engine.config.block_len == MAX_BLOCK_LEN == 256
    want = greedy(engine, 40, mode="ar").token_ids
    for mode, cycles in (("two_pass", 20), ("one_pass", 31), ("auto", None)):
        out = greedy(engine, 40, mode=mode, draft_len=255)
        assert out.token_ids == want, mode
        assert mode == "auto" or (out.stats.block_len, out.stats.cycles) == (MAX_BLOCK_LEN, cycles)
    message = r"draft_len must be within \[1, 255\] \(the checkpoint's block_size - 1, at most 255\), got 256"
    with pytest.raises(ValueError, match=message):
        engine.make_plan(draft_len=256)
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(str(folder), device="cpu", draft_len=256)


def test_stale_cache_changes_nothing(engine):
    want = greedy(engine, 30)
    engine.kv.pages.fill_(torch.nan)
    assert decoded(greedy(engine, 30)) == decoded(want) and want.stats.cycles == cycles_of(30)
    assert greedy(engine, 30, mode="ar").token_ids == want.token_ids


FILTERS = ({}, {"top_k": 10}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 12, "top_p": 0.95, "min_p": 0.01})


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_seed_gives_the_same_text_in_every_mode(engine, filters):
    params = SamplingParams(max_new_tokens=24, temperature=0.9, seed=3, ignore_eos=True, **filters)
    want = engine.generate(PROMPT, params, mode="ar")
    assert want.stats.seed == 3
    for draft_len, cycles in ((1, 12 if filters == {"top_p": 0.9} else 13), (7, 9)):
        got = engine.generate(PROMPT, params, mode="two_pass", draft_len=draft_len)
        assert decoded(got) == (want.token_ids, cycles)
    drawn = engine.generate(PROMPT, dataclasses.replace(params, seed=None))
    again = dataclasses.replace(params, seed=drawn.stats.seed)
    assert engine.generate(PROMPT, again, mode="ar").token_ids == drawn.token_ids
    assert decoded(engine.generate(PROMPT, again)) == decoded(drawn)


def test_a_seed_of_0_is_one(engine):
    params = SamplingParams(max_new_tokens=4, temperature=1.0, seed=0, ignore_eos=True)
    assert engine.generate(PROMPT, params).stats.seed == 0


def test_rejection_belongs_to_two_pass(engine):
    params = SamplingParams(30, temperature=0.8, top_k=10, seed=7, ignore_eos=True, acceptance="rejection")
    a, b = (engine.generate(PROMPT, params, mode="two_pass") for _ in range(2))
    assert decoded(a) == decoded(b) == (a.token_ids, 13)
    with pytest.raises(ValueError, match="acceptance='rejection' belongs to mode two_pass alone, got mode 'ar'"):
        engine.generate(PROMPT, params, mode="ar")


def test_what_ran_last_refuses_nothing_once_the_engine_is_idle(engine):
    """``check`` and ``submit`` agree."""
    params = SamplingParams(4, temperature=0.8, seed=7, ignore_eos=True, acceptance="rejection")
    greedy(engine, 3, mode="ar")
    engine.check(PROMPT, params)
    engine.abort(engine.submit(PROMPT, params))
    assert [out.finish_reason for out in engine.step()] == ["abort"]


def test_a_call_that_asks_for_no_mode_joins_the_one_that_runs(engine):
    params = SamplingParams(20, ignore_eos=True)
    want, cycles = decoded(engine.generate(PROMPT, params))
    assert cycles == cycles_of(20)
    rejection = SamplingParams(4, temperature=0.8, seed=7, acceptance="rejection")
    early = engine.stream(PROMPT, rejection)  # fits until another mode runs
    stream = engine.stream(PROMPT, SamplingParams(200, ignore_eos=True), mode="ar")
    next(stream)
    out = engine.generate(PROMPT, params)
    assert out.token_ids == want and out.stats.mode == "ar"
    assert [t for piece in engine.stream(PROMPT, params) for t in piece.token_ids] == want
    for call in (lambda: engine.generate(PROMPT, rejection), lambda: next(early)):
        with pytest.raises(ValueError, match="acceptance='rejection' belongs to mode two_pass alone, got mode 'ar'"):
            call()
    with pytest.raises(RuntimeError, match="the mode cannot change while requests run"):
        engine.generate(PROMPT, params, draft_len=3)
    stream.close()
    out = engine.generate(PROMPT, params)
    assert decoded(out) == (want, cycles) and out.stats.mode == "two_pass"


def test_top_k_one_is_greedy(engine):
    params = SamplingParams(max_new_tokens=30, temperature=1.3, top_k=1, ignore_eos=True)
    out = engine.generate(PROMPT, params)
    assert decoded(out) == decoded(greedy(engine, 30)) == (out.token_ids, cycles_of(30))


def test_next_logits_of_a_full_cache(folder):
    engine = Engine.from_pretrained(folder, device="cpu", max_seq_len=64)
    assert engine.next_logits([1] * 64).isfinite().all()
    with pytest.raises(ValueError, match=r"token_ids must hold at most max_seq_len \(64\) tokens, got 65"):
        engine.next_logits([1] * 65)
    with pytest.raises(ValueError, match="token_ids must hold at least one token"):
        engine.next_logits([])


def test_stop_ids_are_more_ends_beside_those_of_the_checkpoint(engine, monkeypatch):
    sampled = dict(max_new_tokens=40, temperature=100.0, seed=1)
    tokens = engine.generate(PROMPT, SamplingParams(**sampled, ignore_eos=True)).token_ids
    eos, stop = sorted(set(tokens), key=tokens.index)[4:6]  # eos comes first
    monkeypatch.setattr(engine, "config", dataclasses.replace(engine.config, eos_token_ids=(eos,)))
    out = engine.generate(PROMPT, SamplingParams(**sampled, stop_token_ids=(stop,)))
    assert decoded(out) == (tokens[: tokens.index(eos) + 1], 2) and out.finish_reason == "stop"


def test_as_many_stop_ids_as_are_supported(engine):
    assert engine.generate(PROMPT, SamplingParams(1, stop_token_ids=tuple(range(24)) * 2 + tuple(range(16)))).token_ids
    with pytest.raises(ValueError, match="stop_token_ids must be at most 64, got 65"):
        SamplingParams(1, stop_token_ids=tuple(range(24)) * 2 + tuple(range(17)))


def test_next_logits_leaves_nothing_behind_and_takes_any_length(engine, monkeypatch):
    prompt = [(7 * i * i + i) % 20 for i in range(150)]
    want, free = engine.next_logits(prompt), engine.kv.num_free_pages
    monkeypatch.setattr("orthrus_rt.runner.PREFILL_CHUNK", 64)
    assert torch.equal(engine.next_logits(prompt), want) and engine.kv.num_free_pages == free == engine.kv.num_pages
    request_id = engine.submit(PROMPT, SamplingParams(30, ignore_eos=True))
    engine.step()
    with pytest.raises(RuntimeError, match="next_logits: no request may be running"):
        engine.next_logits(prompt)
    engine.abort(request_id)
    engine.step()  # which reports the abort


def test_next_logits_are_the_callers(engine):
    """The caller may change them, and compute gradients with them."""
    want = engine.next_logits(PROMPT)
    logits = engine.next_logits(PROMPT)
    logits[3] = -torch.inf
    assert torch.equal(engine.next_logits(PROMPT), want)
    scale = torch.ones(1, requires_grad=True)
    (want * scale).sum().backward()
    assert torch.equal(scale.grad, want.sum(0, keepdim=True))


def test_the_hidden_row_is_what_the_logits_are_made_of(engine):
    logits, hidden = engine.next_logits_and_hidden(PROMPT)
    engine.next_logits([*PROMPT, 1])  # of another prompt
    head = engine.checkpoint.tensors[head_name(engine.config)].float()
    torch.testing.assert_close(head @ hidden.float(), logits, atol=1e-3, rtol=1e-3)


def test_one_pass_has_160_rows_by_default_or_one_block(engine):
    config = dataclasses.replace(engine.config, block_len=256)
    plans = [cycle_plan("one_pass", drafts, None, config) for drafts in (1, 7, 15, 21, 22, 31, 79, 80, 255)]
    assert [plan.fan_out for plan in plans] == [4, 6, 6, 6, 5, 4, 1, 1, 1]
    assert [plan.max_rows <= 160 for plan in plans] == 7 * [True] + 2 * [False]


def test_a_fan_out_of_the_engine_is_no_reason_to_refuse_a_call(folder):
    """It is limited to what a shorter block allows, but one that is given with the call is refused."""
    how = dict(device="cpu", mode="one_pass", draft_len=7, dtype="float32", max_seq_len=64)
    engine = Engine.from_pretrained(folder, fan_out=22, **how)
    params = SamplingParams(40, ignore_eos=True)
    want = engine.generate(PROMPT, params)
    assert want.stats.cycles == 31
    for mode, cycles in (("ar", 39), ("two_pass", 21), (None, 33)):
        out = engine.generate(PROMPT, params, mode=mode, draft_len=1)
        assert decoded(out) == (want.token_ids, cycles), mode
    assert engine.make_plan(draft_len=2).fan_out == 7
    with pytest.raises(ValueError, match=r"fan_out must be within \[1, 4\] for draft_len 1, got 22"):
        engine.generate(PROMPT, params, draft_len=1, fan_out=22)
    with pytest.raises(ValueError, match=r"fan_out must be within \[1, 22\] for draft_len 7, got 23"):
        Engine.from_pretrained(folder, fan_out=23, **how)


def test_a_stream_that_is_over_refuses_nothing(engine):
    """Also before the next call has ended its request: it was closed in a thread other than the one that began it."""
    stream = engine.stream(PROMPT, SamplingParams(200, ignore_eos=True), mode="ar")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(next, stream).result()
    stream.close()
    assert engine.dropped
    params = SamplingParams(4, temperature=0.8, seed=7, ignore_eos=True, acceptance="rejection")
    assert len(engine.generate(PROMPT, params).token_ids) == 4 and not engine.dropped


def test_an_abort_may_be_overtaken_by_a_close(engine, monkeypatch):
    def overtaken(_):
        monkeypatch.setattr(engine, "closed", True)
        raise RuntimeError("this engine is closed")

    monkeypatch.setattr(engine, "_abort_named", overtaken)
    engine.abort("any")


def test_an_error_does_not_end_what_was_aborted(engine):
    failed, name = engine.metrics.finished["error"], engine.submit(PROMPT)
    engine.abort(name)
    engine._abort_named(name, ValueError("late"))
    assert [out.finish_reason for out in engine.step()] == ["abort"]
    assert engine.metrics.finished["error"] == failed
