"""What a warm-up in mode="auto" times, what it keeps and for whom, and that it leaves no trace."""

import itertools
import json
from collections import Counter

import pytest
import torch

from orthrus_rt import state as st
from orthrus_rt.auto import REPEATS, Auto
from orthrus_rt.cycle import Cycle
from orthrus_rt.cycle_plan import AR, CyclePlan
from tests import auto_engine, failing
from tests.auto_engine import LONG, PROMPTS, engine
from tests.native_cpu import threads

pytestmark = pytest.mark.usefixtures("one_thread")

folder, cache = auto_engine.folder, auto_engine.cache
DEAR = ("one_pass", 4, 4), ("one_pass", 8, 4), ("one_pass", 8, 8)
DEARER_THAN_AR = ("two_pass", 6, 0), ("two_pass", 8, 0), ("one_pass", 8, 2)
CONTEXTS = [  # by number of slots: less than 256 where two blocks of 8 positions, or the pages, leave less
    ({}, {1: 240, 2: 240, 4: 240}),
    ({"num_pages": 4, "max_batch_size": 5}, {1: 240, 2: 120, 4: 56}),
    ({"max_seq_len": 60}, {1: 44, 2: 44, 4: 44}),
    ({"max_seq_len": 16}, {}),
    ({"num_pages": 7}, {1: 240, 2: 184, 4: 56}),
]


def test_warmup_measures_once_per_device_and_model_and_looks_again(folder, cache, monkeypatch):
    def warmup(engine, slowness):
        def seconds(self, cycle):
            timed.append((cycle.state.num_slots, cycle.plan))
            return slowness * cycle.plan.num_passes * (1e-3 + 2e-5 * cycle.plan.max_rows)

        timed = []
        monkeypatch.setattr(Auto, "_seconds", seconds)
        engine.warmup()
        return engine._autos[engine._plan].policy.costs.table(), timed

    table, timed = warmup(engine(folder), 1.0)
    (file,) = cache.glob("pass-costs-*.json")
    assert {(1, "ar"), (4, "ar"), (1, "two_pass")} <= {(row[0], row[1]) for row in table}
    assert len(table) == len(set(timed)) < len(timed) / 5
    written = file.read_text()
    now, timed = warmup(engine(folder), 2.0)  # the machine is slower today
    assert len(timed) == len(set(timed)) == len(table) - 1  # one plan costs more than drafting anew
    assert [row[:-1] for row in now] == [row[:-1] for row in table]
    assert [row[-1] for row in now] == pytest.approx([2 * row[-1] for row in table], rel=0.2)
    assert json.loads(file.read_text())["seconds"] == now
    file.write_text(written[:50])
    third = engine(folder)
    assert not third._autos[third._plan].known
    assert warmup(third, 1.0)[0] == table == json.loads(file.read_text())["seconds"]


def test_times_of_what_could_not_be_recorded_are_not_kept(folder, cache):
    """The next engine may be able to record it, and would start with times that are too long."""

    def spoil(cycle):
        if cycle.plan == AR:
            raise ValueError("lost")

    with failing.amid_recordings(spoil), pytest.warns(UserWarning, match="lost"):
        engine(folder).warmup()
    assert not list(cache.glob("pass-costs-*.json"))


def test_a_warmup_on_other_threads_is_kept_as_theirs(folder, cache, monkeypatch):
    """It also measures in full, although costs for the former number of threads are kept."""

    def warmup(engine):
        timed = []
        seconds = 1e-3 * torch.get_num_threads()
        monkeypatch.setattr(Auto, "_seconds", lambda self, cycle: timed.append(cycle.plan) or seconds)
        engine.warmup()
        return engine._autos[engine._plan].policy.costs.seconds(1, AR), len(timed)

    def kept():
        auto = engine(folder)._autos[plan]
        return auto.known and auto.policy.costs.seconds(1, AR)

    with threads(2):
        first, in_full = warmup(engine(folder))
        again = engine(folder)
    plan = again._plan
    assert not kept()
    assert warmup(again) == (pytest.approx(first / 2), in_full)
    assert kept() == pytest.approx(first / 2)
    with threads(2):
        assert kept() == pytest.approx(first)


@pytest.mark.parametrize(("per_row", "out"), [(0.0, ()), (0.4e-3, DEAR), (2.5e-3, (*DEAR, *DEARER_THAN_AR))])
def test_warmup_leaves_out_what_could_not_pay(folder, cache, monkeypatch, per_row, out):
    """It leaves out one_pass plans that cost more than drafting anew (none, if rows are free), and all plans that cost
    more than AR for as many tokens as they could yield.
    """

    def seconds(self, cycle):
        return cycle.plan.num_passes * (1e-3 + per_row * cycle.plan.max_rows)

    monkeypatch.setattr(Auto, "_seconds", seconds)
    auto = engine(folder, max_batch_size=1)
    recorded = auto._autos[auto._plan].warmup(auto)
    policy = auto._autos[auto._plan].policy
    timed = {row[1:4] for row in map(tuple, policy.costs.table())}
    assert set(recorded) == {(CyclePlan(*plan), 1) for plan in timed}
    plans = {(p.mode, p.block_len, p.fan_out) for p in policy.plans_of(1)}
    assert plans - timed == set(out)


def test_few_pages_have_costs_of_their_own(folder):
    """With few pages, or a small max_seq_len, the largest batches are timed at less context."""
    assert (
        engine(folder)._autos.identity()
        == engine(folder, num_pages=64)._autos.identity()
        != engine(folder, num_pages=7)._autos.identity()
    )
    few = engine(folder, max_seq_len=100)._autos.identity()
    assert few != engine(folder, max_seq_len=128)._autos.identity()


def test_another_version_times_anew(folder, monkeypatch):
    before = engine(folder)._autos.identity()
    monkeypatch.setattr("orthrus_rt.auto.installed", lambda package: "another")
    assert engine(folder)._autos.identity() != before


def snapshot(engine):
    """All that later requests depend on or report: state, pages, random numbers, metrics, what the policy has seen."""
    runner, auto = engine.runner, engine._autos[engine._plan]
    tensors = [t.clone() for t in (*vars(runner.state).values(), *runner.sampling.tensors(), engine.kv.page_table)]
    pages = engine.kv.num_free_pages, engine.kv._held
    seen = (*pages, engine.metrics.as_dict(), runner.flights, auto.policy.plan_counts)
    return [*tensors, torch.get_rng_state()], str(seen)


def test_warmup_takes_no_room_of_its_own(folder):
    """Its cycles fit the memory that the engine planned: the largest batches do not use the largest one_pass plans."""
    auto = engine(folder, max_batch_size=16)
    before = auto.memory_report()
    auto.warmup()
    after = auto.memory_report()
    assert {name for name in before if before[name] != after[name]} == {"cycles", "total"}


def test_costs_belong_to_the_implementation_that_was_timed(folder, monkeypatch):
    native = engine(folder)._autos.identity()
    assert engine(folder, dtype="float32")._autos.identity() != native
    monkeypatch.setenv("ORTHRUS_BACKEND", "row_linear=reference")
    assert engine(folder)._autos.identity() != native


@pytest.mark.parametrize(("how", "contexts"), CONTEXTS)
def test_warmup_times_sequences_in_the_middle_and_leaves_no_trace(folder, cache, monkeypatch, how, contexts):
    auto = engine(folder, **how)
    auto.generate(PROMPTS, LONG)  # so that pages were used and freed, and costs and acceptance learnt
    tensors, seen = snapshot(auto)
    timed = []

    def seconds(self, cycle):
        cycle.stage_first()
        state, rows = cycle.state, cycle.passes[0].rows
        (context,) = set(state.cache_seqlens.tolist())
        assert set(state.finish.tolist()) == {st.RUNNING} and int(rows.position.min()) >= context  # no invalid row
        timed.append((state.num_slots, context))
        return 1e-3 * cycle.plan.max_rows

    monkeypatch.setattr(Auto, "_seconds", seconds)
    auto.warmup()
    after, still_seen = snapshot(auto)
    assert still_seen == seen and all(torch.equal(a, b) for a, b in zip(tensors, after, strict=True))
    assert dict(timed) == contexts
    untimed = {(p, n) for p, n in auto._autos[auto._plan].shapes() if n not in contexts}
    assert untimed <= set(auto._autos[auto._plan].warmup(auto))
    assert untimed <= {(cycle.plan, cycle.state.num_slots) for cycle in auto.runner._cycles.values() if cycle.settled}
    assert auto._autos[auto._plan].known == bool(contexts) == bool(list(cache.glob("*")))
    assert [o.token_ids for o in auto.generate(PROMPTS, LONG)] == [
        o.token_ids for o in auto.generate(PROMPTS, LONG, mode="ar")
    ]


def test_kept_costs_are_of_one_number_of_slots_and_one_set_of_candidates(folder, monkeypatch):
    """Costs that were kept for other buckets, or for other plans, are not used."""
    monkeypatch.setattr(Auto, "_seconds", lambda self, cycle: 1e-3)
    engine(folder, max_batch_size=1).warmup()
    known = [engine(folder, **how)._autos.popitem()[1].known for how in (
        {"max_batch_size": 1}, {"max_batch_size": 2}, {"max_batch_size": 1, "draft_len": 3},
    )]  # fmt: skip
    assert known == [True, False, False]


def test_bursts_of_other_work_change_no_time_of_a_warmup(folder, cache, monkeypatch):
    """Neither bursts that slow down single cycles, nor one over as many cycles in a row as each plan is timed."""

    def warmup(stalled):
        count = itertools.count()

        def seconds(self, cycle):
            factor = 50 if next(count) in stalled else 1
            return factor * cycle.plan.num_passes * (1e-3 + 1e-5 * cycle.plan.max_rows)

        for file in cache.glob("pass-costs-*.json"):
            file.unlink()
        monkeypatch.setattr(Auto, "_seconds", seconds)
        auto = engine(folder, max_batch_size=1)
        auto.warmup()
        return auto._autos[auto._plan].policy.costs.table(), next(count)

    undisturbed, calls = warmup(())
    plans = len(undisturbed)
    assert calls == (2 + REPEATS) * plans
    assert warmup(range(0, calls, plans + 1))[0] == undisturbed
    assert warmup(range(3 * plans, 3 * plans + REPEATS))[0] == undisturbed


def test_a_warmup_times_what_is_steady(folder, monkeypatch):
    """On a GPU, a cycle is steady from its second replay on."""
    runs, run = Counter(), Cycle.run
    monkeypatch.setattr(Cycle, "run", lambda cycle: runs.update([cycle]) or run(cycle))
    monkeypatch.setattr(Cycle, "steady", property(lambda cycle: runs[cycle] >= 2))

    def seconds(self, cycle):
        assert cycle.steady
        timed.add(cycle)
        return 1e-3

    monkeypatch.setattr(Auto, "_seconds", seconds)
    for _ in range(2):  # the second time, costs are kept
        timed = set()
        engine(folder, max_batch_size=1).warmup()
        assert len(timed) > 5


def test_what_was_never_timed_is_guessed_by_the_kind_of_device(monkeypatch):
    """More rows cost a GPU little, as its passes wait for the weights. A CPU that multiplies tiles is in between."""
    dearer = []
    for device, isa in (("cpu", "avx2"), ("cpu", "amx_bf16"), ("cuda", None)):
        monkeypatch.setattr("orthrus_rt.auto.device_facts", lambda _, isa=isa: {"isa": isa})
        costs = Auto(CyclePlan("auto", 8), 4, torch.device(device), lambda: "a model").policy.costs
        dearer.append(costs.seconds(1, CyclePlan("one_pass", 8, 4)) / costs.seconds(1, AR))
    assert dearer[0] > 3.0 > dearer[1] > 2.0 and dearer[2] < 1.2
