"""A request that cannot go on ends alone, whatever fails."""

import contextlib
import gc
import os
import tempfile
import warnings
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from orthrus_rt.cache_folder import cache_root
from orthrus_rt.config import CheckpointError
from orthrus_rt.cycle import Cycle
from orthrus_rt.model import Activations
from orthrus_rt.pass_costs import PassCosts
from orthrus_rt.prefill import PrefillPass
from orthrus_rt.rejection import RejectionSampler
from orthrus_rt.rounds import _without_frames
from orthrus_rt.sampling import SamplingParams
from tests import culprits, engines
from tests.failing import exhausted

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=20, temperature=0.8, seed=3, ignore_eos=True)
REJECTION = SamplingParams(max_new_tokens=20, temperature=0.8, seed=3, ignore_eos=True, acceptance="rejection")
make = partial(engines.make, max_seq_len=128, max_batch_size=4)


def drain_with_errors(engine):
    """As ``engines.drain``, in a bounded number of steps; also returns the error messages."""
    got, errors = {}, []
    for _ in range(500):
        outputs = engine.step()
        engines.take(outputs, got)
        assert all((out.error is not None) == (out.finish_reason == "error") for out in outputs)
        errors += [out.error for out in outputs if out.error]
        if not engine.has_unfinished():
            return got, errors
    raise AssertionError("it never ends")


def refuse(owner, name, monkeypatch, refused):
    """Calls for which ``refused(*args)`` is true find no memory."""
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kw: exhausted() if refused(*args) else real(*args, **kw))


def test_no_memory_for_logits_ends_those_who_sample(folder, alone, monkeypatch):
    """Every cycle that needs logits would fail: requests that need them must not keep the others waiting."""
    engine = make(folder)
    monkeypatch.setattr(Activations, "logits", exhausted)
    jobs = [([1, 2], GREEDY), ([3, 4], SAMPLED), ([5], GREEDY), ([6], REJECTION)]
    ids = [engine.submit(*job) for job in jobs]
    got, errors = drain_with_errors(engine)
    assert len(errors) == 2 and all("making room for logits: lower draft_len" in e for e in errors)
    for request_id, (prompt, params) in zip(ids, jobs, strict=True):
        assert got[request_id] == ((alone(prompt, params), "length") if params is GREEDY else ([], "error"))
    assert engine.kv.num_free_pages == engine.kv.num_pages


def test_no_memory_for_a_bigger_batch_ends_the_latest(folder, alone, monkeypatch):
    engine = make(folder)
    refuse(Cycle, "__init__", monkeypatch, lambda _, model, kv, state, slots, *rest: slots > 2)
    ids = [engine.submit([i + 1] * 3, GREEDY) for i in range(4)]
    got, errors = drain_with_errors(engine)
    assert len(errors) == 2 and all("building the two_pass cycle of 4 slots: lower" in e for e in errors)
    assert [got[i][1] for i in ids] == ["length", "length", "error", "error"]
    assert [got[i][0] for i in ids[:2]] == [alone([i + 1] * 3, GREEDY) for i in range(2)]


def no_memory_for_scored_cycles(monkeypatch):
    real = Cycle.__init__
    scored = lambda *args, sampling, **kw: exhausted() if sampling else real(*args, sampling=sampling, **kw)  # noqa: E731
    monkeypatch.setattr(Cycle, "__init__", scored)


def no_memory_to_verify(monkeypatch):
    monkeypatch.setattr(RejectionSampler, "verify", exhausted)


def no_memory_on_the_cpu(monkeypatch):
    def cpu_allocator(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("orthrus_rt.ops.process_logits", cpu_allocator)


@pytest.mark.parametrize(
    ("fault", "params"),
    [
        (no_memory_for_scored_cycles, SAMPLED),
        (no_memory_to_verify, REJECTION),
        (no_memory_on_the_cpu, SAMPLED),
    ],
)
def test_who_needs_the_memory_ends_whoever_came_later(folder, alone, monkeypatch, fault, params):
    engine = make(folder)
    fault(monkeypatch)
    ids = [engine.submit([9, 8], params)] + [engine.submit([i + 1] * 3, GREEDY) for i in range(3)]
    got, errors = drain_with_errors(engine)
    assert len(errors) == 1 and "max_batch_size, num_pages" in errors[0]
    assert got[ids[0]][1] == "error" and len(got[ids[0]][0]) <= 1
    assert [got[i] for i in ids[1:]] == [(alone([i + 1] * 3, GREEDY), "length") for i in range(3)]


def test_a_prefill_pass_is_the_fault_of_nobody_outside_it(folder, alone, monkeypatch):
    engine = make(folder)
    monkeypatch.setattr("orthrus_rt.runner.PREFILL_CHUNK", 16)
    refuse(PrefillPass, "run", monkeypatch, lambda this: this.prompt_rows.rows.num_rows == 16)
    long, short = engine.submit([7] * 40, GREEDY), engine.submit([1, 2], GREEDY)
    got, errors = drain_with_errors(engine)
    assert len(errors) == 1 and (got[long], got[short]) == (([], "error"), (alone([1, 2], GREEDY), "length"))


def test_parameters_at_their_limits_run(folder):
    engine = make(folder)
    extreme = SamplingParams(
        2**40, temperature=3e38, top_k=2**31 - 1, top_p=2e-38, repetition_penalty=3e38, logit_bias={5: -3e38},
        min_tokens=2**40, seed=2**63 - 1,
    )  # fmt: skip
    assert engine.generate([1, 2], extreme).finish_reason == "length"


def test_generate_and_stream_go_on_beside_a_request_that_cannot(folder, alone, monkeypatch):
    engine = make(folder)
    refuse(engine.runner, "begin", monkeypatch, lambda request: request.prompt == [6, 6])
    outs = engine.generate([[1, 2], [6, 6], [3]], GREEDY)
    assert [(o.token_ids, o.finish_reason) for o in (outs[0], outs[2])] == [
        (alone(prompt, GREEDY), "length") for prompt in ([1, 2], [3])
    ]
    assert (outs[1].token_ids, outs[1].finish_reason) == ([], "error") and "2.00 GiB" in outs[1].error
    assert outs[0].error is None
    stream = engine.stream([4, 5], GREEDY)
    tokens = next(stream).token_ids
    bad = engine.submit([6, 6], GREEDY)
    assert tokens + [t for piece in stream for t in piece.token_ids] == alone([4, 5], GREEDY)
    assert drain_with_errors(engine)[0][bad] == ([], "error")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):  # it was the only prompt of the call
        engine.generate([6, 6], GREEDY)
    pieces = engine.stream([6, 6], GREEDY)
    assert next(pieces).finish_reason == "error"
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        next(pieces)


def test_an_error_that_is_kept_holds_no_tensors(folder, monkeypatch):
    """Neither in the frames that it passed through, nor in those of its cause or of an exception being handled."""
    engine, held = make(folder), []

    def exhausted_amid_tensors(*_):
        tensor = torch.empty(4)
        held.append(weakref.ref(tensor))
        try:
            raise KeyError
        except KeyError:
            exhausted()

    monkeypatch.setattr(engine.runner, "begin", exhausted_amid_tensors)
    gc.disable()
    try:
        assert engine.generate([[1, 2], [3]], GREEDY)[1].finish_reason == "error"
        assert [ref() for ref in held] == [None] * 2
    finally:
        gc.enable()


def test_who_was_to_end_with_an_error_and_did_not_has_none(folder, alone, monkeypatch):
    """Ctrl-C arrived in between."""
    engine = make(folder)
    engine.submit([1, 2], GREEDY, "mine")
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "begin", exhausted)
        patch.setattr(engine.outbox, "hear", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    outs = []
    while engine.has_unfinished():
        outs += engine.step()
    assert [t for out in outs for t in out.new_token_ids] == alone([1, 2], GREEDY)
    assert [out.error for out in outs] == [None] * len(outs)


def test_what_fails_says_whom_it_may_be_due_to(folder, monkeypatch):
    engine = make(folder)
    for name in ("first", "second"):
        engine.submit([1, 2], GREEDY, name)
    engine.step()
    monkeypatch.setattr(engine.runner, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        engine.step()
    assert raised.value.__notes__ == ["orthrus_rt: this may be due to ['first', 'second']"]


def test_a_prompt_that_fails_twice_has_a_pass_of_its_own(folder, alone, monkeypatch):
    """So that the notes on later failures name no other request, whether that comes earlier or later."""
    engine, got = make(folder), {}
    notes, prompts = culprits.fail(engine, "prefill", monkeypatch), {"a": [1, 2], "b": culprits.CULPRIT}
    for name, prompt in prompts.items():
        engine.submit(prompt, GREEDY, name)
    while len(notes) < 5:
        with contextlib.suppress(ValueError):
            engines.take(engine.step(), got)
        assert len(notes) < 3 or engine.outbox.get("a").failures == 0  # it decodes before each failure
        if len(notes) == 3 and "c" not in prompts:
            prompts["c"] = [3]
            engine.submit([3], GREEDY, "c")
    assert notes == [f"orthrus_rt: this may be due to {names}" for names in 2 * [["a", "b"]] + 3 * [["b"]]]
    engine.abort("b")
    engines.drain(engine, got)
    assert got == {"b": ([], "abort")} | {n: (alone(prompts[n], GREEDY), "length") for n in "ac"}


def test_generate_counts_failures_of_submitted_requests_too(folder, alone, monkeypatch):
    engine = make(folder)
    notes, name = culprits.fail(engine, "prefill", monkeypatch), engine.submit(culprits.CULPRIT, GREEDY)
    for _ in range(3):
        with pytest.raises(ValueError, match="lost"):
            engine.generate([1, 2], GREEDY)
    assert len(notes) == 3 and notes[-1] == f"orthrus_rt: this may be due to {[name]}"
    engine.abort(name)
    assert engine.generate([1, 2], GREEDY).token_ids == alone([1, 2], GREEDY)


@pytest.mark.parametrize("what", ("landed", "stopwatch", "recovery", "memory"))
def test_what_fails_outside_the_work_for_a_request_may_be_due_to_any(folder, alone, monkeypatch, what):
    """Although the step has done work for one of them before, or the last step has failed in it."""
    engine, got = make(folder), {}
    engine.submit([1, 2], REJECTION, "a")  # so that b's prompt has a pass of its own
    engine.step()
    engine.submit([3], GREEDY, "b")
    with monkeypatch.context() as patch:
        if what == "recovery":
            patch.setattr(engine.runner, "prefill", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError) as raised:
                engine.step()
            assert raised.value.__notes__ == ["orthrus_rt: this may be due to ['b']"]
        place, name = {
            "landed": (engine.metrics, "landed"), "stopwatch": (engine.runner.stopwatch, "take"),
            "recovery": (engine.runner, "reset"), "memory": (engine.runner.stopwatch, "take"),
        }[what]  # fmt: skip
        if what == "landed":
            engines.take(engine.step(), got)  # so that both have results
        if what == "memory":
            patch.setattr(engine.runner, "begin", exhausted)
        patch.setattr(place, name, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    failures = {"recovery": [1, 2], "memory": [1]}.get(what, [1, 1])
    assert [request.failures for request in engine.outbox.unfinished] == failures
    assert engines.drain(engine, got)["b"] == (([], "error") if what == "memory" else (alone([3], GREEDY), "length"))


def test_rejection_keeps_no_draft_distributions(folder):
    engine = make(folder)
    stream = engine.stream([1, 2], REJECTION)
    next(stream), next(stream)
    (request,) = engine.scheduler.active
    assert request.rejection._draft_probs is None


def test_an_interrupt_between_outbox_and_queue_loses_no_request(folder, alone, monkeypatch):
    engine = make(folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "enqueue", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.submit([1, 2], GREEDY, "mine")
    assert engine.is_unfinished("mine")
    with pytest.raises(ValueError, match="request_id must be unused"):
        engine.submit([1, 2], GREEDY, "mine")
    assert drain_with_errors(engine) == ({"mine": (alone([1, 2], GREEDY), "length")}, [])


@pytest.mark.parametrize("what", ("no temporary files", "a folder of another's"))
def test_where_costs_cannot_be_kept_auto_runs_all_the_same(folder, tmp_path, monkeypatch, what):
    """No home, and nowhere to write or nowhere safe. Nothing else of a local checkpoint needs a cache."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", _no_home)
    if what == "no temporary files":
        monkeypatch.setattr(tempfile, "gettempdir", _no_temporary_files)
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        (tmp_path / f"orthrus_rt-{os.getuid()}").write_text("")
    with pytest.raises(CheckpointError, match="as there is no home folder for a cache; let XDG_CACHE_HOME name one"):
        cache_root()
    engine = make(folder, mode="auto", max_batch_size=1)
    assert not engine._autos[engine._plan].known
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.warmup()
    assert engine.generate([1, 2], GREEDY).finish_reason == "length"


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def _no_temporary_files():
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")


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
        engine.warmup()  # the warning is given once
    assert engine.generate([1, 2], GREEDY).finish_reason == "length"


def test_who_finds_no_memory_is_who_ends(folder, alone, monkeypatch):
    """Not the latest one: the rejection sampler that found no memory says whose it is."""
    engine, jobs = make(folder, mode="two_pass"), [([6], REJECTION), ([3, 4], SAMPLED), ([1, 2], GREEDY)]
    ids = [engine.submit(*job) for job in jobs]
    monkeypatch.setattr(RejectionSampler, "draft", exhausted)
    got, errors = drain_with_errors(engine)
    assert len(errors) == 1 and got[ids[0]][1] == "error"
    assert [got[i] for i in ids[1:]] == [(alone(*job), "length") for job in jobs[1:]]


@pytest.mark.parametrize("ends", ("stop", "length"))
def test_an_interrupt_before_an_end_is_told_does_not_go_on_behind_it(folder, alone, monkeypatch, ends):
    free = alone([1, 2, 3], GREEDY)
    stop = max(free, key=free.index)  # the token that appears last
    stops = (stop,) if ends == "stop" else ()
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, stop_token_ids=stops)
    engine, struck = make(folder, mode="two_pass"), []
    finish = engine._finish

    def interrupted(request, reason, *args):
        if not struck and reason == ends:
            struck.append(engine.metrics.cycles)
            raise KeyboardInterrupt
        return finish(request, reason, *args)

    monkeypatch.setattr(engine, "_finish", interrupted)
    request_id, got = engine.submit([1, 2, 3], params), {}
    while engine.has_unfinished():
        try:
            engines.take(engine.step(), got)
        except KeyboardInterrupt:
            continue
    assert got[request_id] == (free[: free.index(stop) + 1] if ends == "stop" else free, ends)
    assert engine.metrics.cycles == struck[0] and engine.metrics.recomputed_tokens == 0


def test_whoever_is_back_in_the_queue_after_a_fault_holds_no_slot(folder, monkeypatch):
    """Otherwise aborting it would take the slot from the request that has it by then."""
    engine = make(folder)
    for i in range(2):
        engine.submit([i], GREEDY)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.abort("nobody")  # every call recovers first
    assert [r.slot for r in engine.scheduler.waiting.values()] == [None, None]


def test_causes_in_a_circle_lose_their_frames():
    def raised(error):
        with pytest.raises(ValueError) as caught:
            raise error
        return caught.value

    a, b, c = (raised(ValueError(name)) for name in "abc")
    a.__cause__, a.__context__, b.__cause__ = b, c, a
    _without_frames(a)
    assert [error.__traceback__ for error in (a, b, c)] == [None] * 3
