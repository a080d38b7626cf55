"""mode="auto" in the engine: the same tokens whatever the plans, and what it reports about them."""

import itertools
import json
import time
from collections import Counter
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from orthrus_rt import state as st
from orthrus_rt.auto import MAX_ROWS, REPEATS, Auto
from orthrus_rt.cycle import Cycle
from orthrus_rt.cycle_plan import AR, CyclePlan, batch_bucket
from orthrus_rt.engine import Engine
from orthrus_rt.policy import Policy
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints
from tests.native_cpu import threads

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [1, 6, 1, 8, 0, 3, 3]]
LONG = SamplingParams(max_new_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("tiny")
    return str(checkpoints.make(where, dtype=torch.bfloat16, diff_noise=0.02, vocab_size=700, mask_token_id=699))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "orthrus_rt"


def engine(folder, **how):
    return Engine.from_pretrained(folder, device="cpu", **({"max_seq_len": 256, "max_batch_size": 4} | how))


def in_turn(monkeypatch, modes):
    """Make every policy run through its candidates of these modes, one cycle each."""
    order = itertools.count()

    def choose(policy, batch_size, greedy=True, real=Policy.choose):
        real(policy, batch_size, greedy)
        plans = [p for p in policy.plans_of(batch_bucket(batch_size, policy.max_batch_size)) if p.mode in modes]
        plan = plans[next(order) % len(plans)]
        policy._pending[-1] = replace(policy._pending[-1], plan=plan, outcomes=[], seconds=[])
        return plan

    monkeypatch.setattr(Policy, "choose", choose)


def tokens_per_cycle(stats) -> float:
    stats = list(stats)
    return sum(one.tokens - 1 for one in stats) / sum(one.cycles for one in stats)


def test_from_a_folder_that_is_not_installed(folder, monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert len(engine(folder).generate(PROMPTS[0], SamplingParams(4, ignore_eos=True)).token_ids) == 4


# Tokens per cycle over all plans in turn, ar included; a broken drafter gives 1. Sampled, the value is 1.157, or 1.180
# where two_pass drafts with coded weights.
@pytest.mark.parametrize(("temperature", "pinned"), [(0.0, 1.463), (0.8, 1.168)])
def test_plans_that_change_every_cycle_change_no_token(folder, monkeypatch, temperature, pinned):
    params = SamplingParams(max_new_tokens=60, temperature=temperature, seed=5, ignore_eos=True)
    in_turn(monkeypatch, ("ar", "two_pass", "one_pass"))
    auto = engine(folder)
    outs = auto.generate(PROMPTS, params)
    assert [o.token_ids for o in outs] == [o.token_ids for o in auto.generate(PROMPTS, params, mode="ar")]
    for out in outs:
        assert len(out.stats.plans) >= 5
        assert sum(out.stats.plans.values()) == out.stats.cycles
    assert tokens_per_cycle(out.stats for out in outs) == pytest.approx(pinned, abs=0.02)
    assert auto.metrics.as_dict()["plans"].keys() >= {"ar", "two_pass/3", "one_pass/7x4"}


def test_requests_come_and_go_while_plans_change(folder, monkeypatch):
    in_turn(monkeypatch, ("ar", "two_pass", "one_pass"))
    auto = engine(folder, max_batch_size=2, num_pages=6)
    names = [auto.submit(p, LONG) for p in PROMPTS]
    got, stats = {n: [] for n in names}, {}
    while auto.has_unfinished():
        for out in auto.step():
            got[out.request_id] += out.new_token_ids
            stats[out.request_id] = out.stats
    assert tokens_per_cycle(stats.values()) == pytest.approx(1.475, abs=0.05)  # a broken drafter gives 1
    assert list(got.values()) == [o.token_ids for o in auto.generate(PROMPTS, LONG, mode="ar")]


def test_the_policy_hears_of_every_cycle(folder):
    auto = engine(folder)
    for _ in range(3):
        auto.generate(PROMPTS, LONG)
    auto._autos[auto._plan].policy.settle()
    facts = json.loads(json.dumps(auto.explain(3)))
    for size in (0, -1, 5):
        with pytest.raises(ValueError, match=rf"batch_size must be within \[1, 4\], got {size}"):
            auto.explain(size)
    counts = {label: c["cycles"] for label, c in facts["candidates"].items() if c["cycles"]}
    assert counts == auto.metrics.as_dict()["plans"]
    assert facts["candidates"]["ar"]["cost_measured"]
    assert facts["ar_equivalent_seconds"] > auto.metrics.as_dict()["times"]["prefill"]["seconds"] > 0
    assert f'orthrus_plan_cycles_total{{plan="ar"}} {counts["ar"]}' in auto.metrics.as_prometheus()
    assert not auto._autos[auto._plan].policy._pending
    auto.generate(PROMPTS[0], LONG, mode="two_pass")
    assert auto.explain() is None  # the mode is fixed


def test_prefill_alone_is_told_to_the_policy_as_such(folder, monkeypatch):
    """Only prefill time is passed there: the time of a cycle is weighed with the tokens that the cycle yielded."""
    told = []
    monkeypatch.setattr(Policy, "prefilled", lambda policy, seconds: told.append(seconds))
    auto = engine(folder)
    for _ in range(2):
        auto.generate(PROMPTS, LONG)
    prefill = auto.metrics.as_dict()["times"]["prefill"]
    assert len(told) == prefill["count"] == 2 and sum(told) == pytest.approx(prefill["seconds"])


def test_the_time_of_a_kinds_first_cycle_is_not_weighed(folder, monkeypatch):
    """It includes building the cycle and first-use costs, which no later cycle has."""
    heard, record = [], Policy.record

    def hear(policy, outcomes, seconds=None):
        heard.append((policy._pending[0].plan, seconds))
        record(policy, outcomes, seconds)

    monkeypatch.setattr(Policy, "record", hear)
    in_turn(monkeypatch, ("ar", "two_pass", "one_pass"))
    engine(folder).generate(PROMPTS[0], LONG)
    known = set()
    for plan, seconds in heard:
        assert (seconds is not None) == (plan in known)
        known.add(plan)
    assert len(known) >= 5 and len(heard) > 2 * len(known)


def test_rejection_sampling_runs_two_pass_whatever_the_policy_thinks(folder):
    auto = engine(folder)
    params = SamplingParams(max_new_tokens=20, temperature=0.8, seed=3, acceptance="rejection", ignore_eos=True)
    auto.generate(PROMPTS[0], LONG)
    policy = auto._autos[auto._plan].policy
    assert policy.current is not None
    assert set(auto.generate(PROMPTS[0], params).stats.plans) == {"two_pass/3"}  # the default on a CPU
    assert policy.current is None  # one_pass's waiting drafts, if any, are gone


@pytest.mark.parametrize("mode", ["ar", "two_pass", "one_pass"])
def test_outcomes_tell_every_token_and_every_beginning(folder, monkeypatch, mode):
    heard, record = [], Policy.record
    monkeypatch.setattr(Policy, "record", lambda self, outs, *args: heard.extend(outs) or record(self, outs, *args))
    in_turn(monkeypatch, (mode,))
    outs = engine(folder, max_batch_size=2).generate(PROMPTS, LONG)
    assert sum(out.num_tokens for out in heard) == sum(len(out.token_ids) - 1 for out in outs)
    fresh = [out for out in heard if out.fresh]
    assert len(fresh) == len(PROMPTS)
    assert mode != "one_pass" or all(out.num_verified == 0 for out in fresh)
    assert all(out.num_accepted <= out.num_verified for out in heard)


def test_a_fault_leaves_no_cycle_pending(folder, monkeypatch):
    in_turn(monkeypatch, ("two_pass",))
    auto = engine(folder)
    request = auto.outbox.get(auto.submit(PROMPTS[0], LONG))
    auto.step()
    with monkeypatch.context() as patch:
        patch.setattr(auto.runner.flights, "post", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            auto.step()
    while auto.has_unfinished():
        auto.step()
    assert tokens_per_cycle([request.stats]) == pytest.approx(1.639, abs=0.1)  # a broken drafter gives 1
    assert request.tokens == auto.generate(PROMPTS[0], LONG, mode="ar").token_ids
    assert all(not a.policy._pending for a in auto._autos.values())


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


DEAR = ("one_pass", 4, 4), ("one_pass", 8, 4), ("one_pass", 8, 8)
DEARER_THAN_AR = ("two_pass", 6, 0), ("two_pass", 8, 0), ("one_pass", 8, 2)


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


CONTEXTS = [  # by number of slots: less than 256 where two blocks of 8 positions, or the pages, leave less
    ({}, {1: 240, 2: 240, 4: 240}),
    ({"num_pages": 4, "max_batch_size": 5}, {1: 240, 2: 120, 4: 56}),
    ({"max_seq_len": 60}, {1: 44, 2: 44, 4: 44}),
    ({"max_seq_len": 16}, {}),
    ({"num_pages": 7}, {1: 240, 2: 184, 4: 56}),
]


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


def test_candidates_stay_within_what_was_asked(folder):
    def labels(**how):
        return {plan.label for plan, _ in engine(folder, **how)._autos.popitem()[1].shapes()}

    assert "one_pass/7x8" in labels(max_batch_size=1)
    assert labels(draft_len=1) == {"ar", "two_pass/1", "one_pass/1x2"}
    assert labels(fan_out=3) == {
        "ar", "two_pass/3", "two_pass/5", "two_pass/7", "one_pass/3x3", "one_pass/7x3",
    }  # fmt: skip


def test_one_pass_candidates_stay_within_the_rows_of_a_pass(folder):
    shapes = engine(folder, max_batch_size=16)._autos.popitem()[1].shapes()
    assert 0 < max(plan.max_rows * slots for plan, slots in shapes if plan.mode == "one_pass") <= MAX_ROWS


def test_the_policy_is_asked_for_the_slots_that_run_and_by_whether_any_request_samples(monkeypatch):
    """If any request uses rejection sampling, the policy is not asked, as there is no choice."""
    asked = []
    monkeypatch.setattr(Policy, "choose", lambda self, *args: asked.append(args) or AR)
    auto = Auto(CyclePlan("auto", 8), 4, torch.device("cpu"), lambda: "a model")

    def choose(**requests):
        """The choice for these requests; each argument is a slot with a way of sampling."""
        ways = {"greedy": (False, False), "sampled": (False, True), "rejection": (True, True)}
        running = []
        for slot, way in requests.items():
            rejection, scored = ways[way]
            params = SimpleNamespace(scored=scored)
            running.append(SimpleNamespace(slot=int(slot[1:]), rejection=rejection, params=params))
        return auto.choose(running)

    assert choose(_0="greedy") == choose(_2="greedy") == choose(_0="sampled", _1="greedy") == (AR, auto.policy)
    assert asked == [(1, True), (3, True), (2, False)]
    assert choose(_0="greedy", _1="rejection") == (CyclePlan("two_pass", 4), None) and len(asked) == 3
    auto = Auto(CyclePlan("auto", 3), 4, torch.device("cpu"), lambda: "a model")
    assert choose(_0="rejection") == (CyclePlan("two_pass", 3), None)  # no more drafts than auto may have


@pytest.mark.parametrize(("device", "counts"), [("cpu", True), ("cuda", False)])
def test_choosing_counts_where_nothing_runs_meanwhile(monkeypatch, device, counts):
    think = Policy._think
    monkeypatch.setattr(Policy, "_think", lambda *args: time.sleep(0.01) or think(*args))
    policy = Auto(CyclePlan("auto", 8), 4, torch.device(device), lambda: "a model").policy
    policy.costs.set(1, AR, 1.0)
    policy.choose(1)
    assert (0.01 <= policy.spent < 1.0) if counts else policy.spent == 0.0


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
