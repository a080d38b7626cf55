"""The engine as it runs on a device that it does not wait for: results are read one cycle after their launch.

On the CPU, with events and mailboxes that behave like CUDA's: a copy is unreadable until its event is waited for.
"""

import itertools
import random
import time
from functools import partial

import pytest
import torch

from orthrus_rt import ops
from orthrus_rt import state as st
from orthrus_rt.cycle import Cycle
from orthrus_rt.flights import Flights
from orthrus_rt.sampling import SamplingParams
from orthrus_rt.stopwatch import StretchOnDevice
from tests import culprits, engines, failing, poison

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

VOCAB = 96
POISON = -77
make = partial(engines.make, max_seq_len=256, max_batch_size=8)


class Stream:
    """Events in the order of their recording; the device has passed all up to the last one waited for."""

    def __init__(self):
        self.clock, self.passed, self.box, self.boxes = itertools.count(1), 0, None, []

    def event(self, enable_timing=False):
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream, self.number, self.copied = stream, 0, None

    def record(self):
        self.number, self.at = next(self.stream.clock), time.perf_counter()
        box, self.stream.box = self.stream.box, None
        if box is not None:
            self.copied = box, box.memory.clone()
            box.memory.fill_(POISON)

    def synchronize(self):
        self.stream.passed = max(self.stream.passed, self.number)
        box, values = self.copied
        assert bool((box.memory == POISON).all()), "a mailbox was used again before it was read"
        box.memory.copy_(values)

    def query(self):
        return self.number <= self.stream.passed

    def elapsed_time(self, end):
        assert self.number < end.number <= self.stream.passed, "CUDA refuses events that are not passed"
        return (end.at - self.at) * 1e3


@pytest.fixture
def late(folder, monkeypatch, tmp_path):
    """Makes engines that run one cycle ahead of the host; every cycle's rows are checked to lie in the slot's pages."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stream, empty, mailbox = Stream(), torch.empty, Flights._free_mailbox
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs))

    def tapped_mailbox(flights):
        box = mailbox(flights)
        stream.box = box.results
        stream.boxes += [] if any(stream.box is known for known in stream.boxes) else [stream.box]
        return box

    def checked_run(cycle, real=Cycle.run):
        real(cycle)
        for p in cycle.passes:
            ar = p.rows.position[: p.rows.num_rows_ar]
            valid = ar >= 0
            pages = cycle.kv.page_table[p.rows.seq[: len(ar)][valid].long(), ar[valid].long() // ops.PAGE_SIZE]
            assert bool((pages != 0).all()), "a row beyond the slot's pages"

    monkeypatch.setattr(Flights, "_free_mailbox", tapped_mailbox)
    monkeypatch.setattr(Cycle, "run", checked_run)

    def make_late(**kwargs):
        engine = make(folder, pads_prefill=True, **kwargs)
        engine.runner.flights.lag, engine.runner.stopwatch._stretch = 1, StretchOnDevice
        return engine

    make_late.stream = stream
    return make_late


def job(rng, longest):
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))]
    if longest > 100 and rng.random() < 0.5:  # a beginning that others share
        prompt = (list(range(rng.choice((70, 100)))) + prompt)[:longest]
    prompt = [token % VOCAB for token in prompt]
    stops = tuple(rng.sample(range(VOCAB), rng.choice((0, 0, 8))))
    more = {"temperature": 0.8, "seed": rng.randrange(99)} if rng.random() < 0.2 else {}
    if rng.random() < 0.2:
        more |= {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "logit_bias": {rng.randrange(VOCAB): 1.5}}
    return prompt, SamplingParams(rng.randint(1, 60), stop_token_ids=stops, ignore_eos=rng.random() < 0.5, **more)


@pytest.mark.parametrize("mode", ("ar", "two_pass", "one_pass", "auto"))
def test_arrivals_aborts_and_few_pages(late, alone, mode):
    """What the host does between cycles (begin, move, clear, pages given back) takes effect after the current cycle."""
    rng = random.Random(mode)
    engine = late(mode=mode, num_pages=6)
    todo, jobs, got, aborted = 80, {}, {}, set()
    while todo or engine.has_unfinished():
        for _ in range(min(todo, rng.choice((0, 0, 1, 2, 12)))):
            one = job(rng, 180)
            jobs[engine.submit(*one)] = one
            todo -= 1
        engines.take(engine.step(), got)
        unfinished = [i for i in jobs if got.get(i, (0, None))[1] is None and i not in aborted]
        if unfinished and rng.random() < 0.05:
            aborted.add(unfinished[0])
            engine.abort(unfinished[0])
    for request_id, one in jobs.items():
        tokens, reason = got[request_id]
        if request_id in aborted:
            assert tokens == alone(*one)[: len(tokens)] and reason == "abort"
        else:
            assert tokens == alone(*one) and reason in ("stop", "length")
    assert engine.metrics.preemptions > 0 and engine.metrics.cached_tokens > 0
    assert engine.kv.num_free_pages == engine.kv.num_pages
    assert len(late.stream.boxes) <= 4  # for two rounds, each with a cycle and a prefill pass; they are reused


@pytest.mark.parametrize(("mode", "shortest"), (("ar", 16), ("two_pass", 4)))
def test_nobody_gives_pages_up_for_whom_an_end_in_flight_makes_room(late, alone, mode, shortest):
    """The first request needs the other's page while the other's last tokens are unread, or later, or earlier."""
    engine = late(mode=mode, max_seq_len=128, max_batch_size=2, num_pages=2, prefix_caching=False)
    prompts, taken = [[1] * 30, [2] * 20], []
    for length in range(shortest, shortest + 9):
        params = [SamplingParams(n, ignore_eos=True) for n in (60, length)]
        outs = engine.generate(prompts, params)
        assert [out.token_ids for out in outs] == [alone(*job) for job in zip(prompts, params, strict=True)]
        assert outs[0].stats.preemptions == 0
        taken.append(outs[1].stats.preemptions)
    assert taken == sorted(taken) and set(taken) == {0, 1}


@pytest.mark.parametrize("mode", ("ar", "two_pass", "one_pass"))
def test_as_many_cycles_and_drafts_as_without_the_lag(late, folder, mode):
    """Nothing is counted of a cycle that finds its slot ended on the device, and no block is lost to the delay."""
    rng = random.Random(1)
    prompts, params = zip(*(job(rng, 60) for _ in range(12)), strict=True)
    want, got = (e.generate(list(prompts), list(params)) for e in (make(folder, mode=mode), late(mode=mode)))
    for one, other in zip(want, got, strict=True):
        assert (one.token_ids, one.stats.accepted) == (other.token_ids, other.stats.accepted)
        assert (one.stats.cycles, one.stats.passes) == (other.stats.cycles, other.stats.passes)
    if mode != "ar":
        assert sum(sum(out.stats.accepted[1:]) for out in got) > 5


def test_all_ways_to_choose_share_a_prefill_pass(late, folder, alone):
    """A rejection request's logits are read before those of the sampled request in the pass are processed in place."""
    greedy, coupled = SamplingParams(12, ignore_eos=True), SamplingParams(12, temperature=0.8, seed=4, ignore_eos=True)
    rejection = SamplingParams(12, temperature=0.8, seed=4, ignore_eos=True, acceptance="rejection")
    by_itself = make(folder, max_batch_size=1)
    engine = late(mode="two_pass")
    prompts, params = [[1, 2], [7, 8, 9], [3, 4, 5], [6]], [greedy, rejection, coupled, rejection]
    want = [by_itself.generate(*job) if job[1] is rejection else None for job in zip(prompts, params, strict=True)]
    outs = engine.generate(prompts, params)
    for out, one, prompt, p in zip(outs, want, prompts, params, strict=True):
        assert out.token_ids == (one.token_ids if one else alone(prompt, p))
    assert engine.metrics.as_dict()["times"]["prefill"]["count"] == 1


def test_a_fault_in_flight_loses_nothing(late, alone, monkeypatch):
    rng = random.Random(2)
    engine = late(mode="auto")
    jobs = {engine.submit(*one): one for one in (job(rng, 60) for _ in range(12))}
    got, faults = {}, 0

    def faulty(launch, *args):
        launch(*args)
        if rng.random() < 0.1:
            raise ZeroDivisionError

    for name in ("decode", "decode_and_prefill"):
        monkeypatch.setattr(engine.runner, name, partial(faulty, getattr(engine.runner, name)))
    while engine.has_unfinished():
        try:
            for out in engine.step():
                got[out.request_id] = got.get(out.request_id, []) + out.new_token_ids
        except ZeroDivisionError:
            faults += 1
    assert faults > 3
    assert got == {i: alone(*one) for i, one in jobs.items()}


@pytest.mark.parametrize("where", culprits.WHERE)
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("chunk", (16, 512))
def test_only_the_request_that_makes_steps_fail_ends(late, alone, monkeypatch, where, place, chunk):
    """Although what the others have gained may be unread when it fails."""
    culprits.check_that_only_the_culprit_ends(late(mode="ar"), where, place, alone, monkeypatch, chunk)


def test_after_a_fault_no_slot_runs_on(late, monkeypatch):
    """Until a request is in it again, with the pages that it writes."""
    engine = late(max_batch_size=2)
    ids = [engine.submit([i], SamplingParams(60, ignore_eos=True)) for i in (1, 2)]
    for _ in range(3):
        engine.step()
    assert engine.runner.state.finish.tolist() == [st.RUNNING] * 2
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.memory_report()  # any call recovers first
    assert engine.runner.state.finish.tolist() == [st.EMPTY] * 2 and not engine.torn
    engine.abort(ids[1])
    engine.step()
    assert engine.runner.state.finish.tolist() == [st.RUNNING, st.EMPTY]


@pytest.mark.parametrize("mode", ("ar", "two_pass", "one_pass"))
def test_nan_ends_a_slot_before_the_host_knows(late, mode):
    """The cycles launched meanwhile leave the slot alone."""
    kinds = [poison.GREEDY, poison.SAMPLED, poison.EDITED]
    poison.check_nan_ends_its_requests_alone(late(mode=mode, max_batch_size=4), poison.jobs_of(kinds))


@pytest.mark.parametrize("lacking", failing.AT_THE_START)
def test_who_finds_no_memory_at_the_start_costs_the_others_nothing(late, alone, lacking):
    failing.check_refused_at_the_start(lambda: late(max_batch_size=5), alone, lacking)


def test_prompts_that_arrive_while_others_decode(late, alone):
    """Prefill in chunks during cycles; the first token of each prompt is read a round later."""
    rng = random.Random(4)
    engine = late(max_batch_size=4)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(100, 220))] for _ in range(8)]
    got, jobs = {}, {}
    while len(jobs) < len(prompts) or engine.has_unfinished():
        if len(jobs) < len(prompts):
            prompt = prompts[len(jobs)]
            jobs[engine.submit(prompt, params)] = prompt
        for out in engine.step():
            got[out.request_id] = got.get(out.request_id, []) + out.new_token_ids
    assert got == {i: alone(prompt, params) for i, prompt in jobs.items()}


def test_auto_learns_costs_and_acceptance_a_cycle_late(late, alone):
    engine = late(mode="auto", max_batch_size=2)
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    for _ in range(4):
        outs = engine.generate([[3, 1, 4], [1, 5]], params)
        assert [o.token_ids for o in outs] == [alone(p, params) for p in ([3, 1, 4], [1, 5])]
    engine.step()
    engine._autos[engine._plan].policy.settle()
    facts = engine.explain(2)
    assert facts["candidates"]["ar"]["cost_measured"] and facts["spent_seconds"] > 0
    counts = {label: c["cycles"] for label, c in facts["candidates"].items() if c["cycles"]}
    assert counts == engine.metrics.as_dict()["plans"]
    assert not engine._autos[engine._plan].policy._pending


def test_whoever_ends_makes_room_for_the_next_pass(late):
    engine = late(max_batch_size=1)
    first, second = (engine.submit([i], SamplingParams(max_new_tokens=9, ignore_eos=True)) for i in (1, 2))
    told = {}
    while first not in told or not told[first].finished:
        told = {out.request_id: out for out in engine.step()}
    assert second not in told and engine.scheduler.slots == [None]
    told = {out.request_id: out for out in engine.step()}
    (running,) = engine.scheduler.slots
    assert second not in told and running.request_id == second and running.decoding  # prefilled, not read yet


def test_the_slot_of_a_finished_request_runs_no_more(late):
    """The cycle that was launched before the end was known finds the slot ended on the device."""
    engine = late(max_batch_size=1)
    engine.generate([1, 2, 3], SamplingParams(max_new_tokens=5, ignore_eos=True))
    assert int(engine.runner.state.finish[0]) == st.EMPTY and len(engine.runner.flights) == 1
    assert engine.step() == [] and not engine.runner.flights


def test_pages_are_given_up_only_once_all_that_was_launched_is_read(late, monkeypatch):
    engine, unread = late(max_seq_len=128, max_batch_size=2, num_pages=2, prefix_caching=False), []
    preempt = engine._preempt
    monkeypatch.setattr(engine, "_preempt", lambda r: (unread.append(len(engine.runner.flights)), preempt(r))[1])
    engine.generate([[1] * 30, [2] * 20], SamplingParams(60, ignore_eos=True))
    assert unread == [0]
