"""What the policy of mode="auto" chooses, on simulated devices and drafters: see tests/policy_simulator.py."""

import itertools
import statistics
from functools import partial

import pytest

from orthrus_rt.acceptance import Outcome
from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.lane import REFRESH_CYCLES
from orthrus_rt.pass_costs import PassCosts
from orthrus_rt.policy import (
    AR,
    AR_COURSE,
    COURSE,
    COURSE_SHARE,
    GRANT,
    RECENT,
    REST,
    Policy,
    candidate_plans,
)
from tests import policy_simulator
from tests.policy_simulator import (
    DEVICES,
    HORIZON,
    PLANS,
    PROMISE,
    by_turns,
    cycle_seconds,
    expected_tokens,
    policy,
    run,
)


def best_fixed(device: str, bucket: int, hazard: float, decay: float) -> tuple[float, CyclePlan]:
    """The fewest seconds per token of the whole batch, and the plan that achieves them."""
    return min((cycle_seconds(device, bucket, p) / expected_tokens(p, hazard, decay) / bucket, p) for p in PLANS)


GRID = [
    *[("flat", 1, h) for h in (0.0, 0.3, 0.6, 0.8, 0.9)],
    *[("flat", 4, h) for h in (0.3, 0.7, 0.97)],
    *[("flat", 16, h) for h in (0.5, 0.7)],
    *[("steep", 1, h) for h in (0.0, 0.5, 0.6, 0.7, 0.9)],
    *[("steep", 4, h) for h in (0.7, 0.9)],
]
CLOSE = [  # two_pass and one_pass differ little, and luck misleads: these seeds misled an earlier policy
    *[("flat", 1, 0.9, seed) for seed in (1, 2, 12)],
    *[("flat", 2, 0.9, seed) for seed in (2, 16)],
    *[("flat", 1, 0.97, 12), ("flat", 4, 0.8, 1)],
]
WHOLE_GRID = list(
    itertools.product(
        (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97),
        (1.0, 0.95, 0.85),
        ((1, 0), (2, 1)),  # seed and lag
    )
)


def over_best(device: str, batch: int, hazard: float, decay: float = 1.0, **how) -> float:
    """Seconds per token relative to those of the best fixed plan."""
    got = run(device, lambda cycle, i: (hazard, decay), batch=batch, **how)
    assert got.most_behind <= GRANT * cycle_seconds(device, batch, AR) + 1e-9
    assert got.switches <= 2 * HORIZON / REST + 40
    best, _ = best_fixed(device, batch, hazard, decay)
    return got.seconds_per_token / best


def check_stationary(*where, **how) -> None:
    assert over_best(*where, **how) <= 1.05


@pytest.mark.parametrize(("device", "batch", "hazard"), GRID)
def test_stationary_text_runs_within_5_percent_of_the_best_fixed_plan(device, batch, hazard):
    check_stationary(device, batch, hazard)


@pytest.mark.parametrize(("device", "batch", "hazard", "seed"), CLOSE)
def test_plans_that_differ_little_are_told_apart(device, batch, hazard, seed):
    check_stationary(device, batch, hazard, seed=seed, lag=1)


@pytest.mark.parametrize(("device", "batch"), [("flat", 1), ("steep", 2)])
def test_later_drafts_worse_than_early_ones(device, batch):
    check_stationary(device, batch, 0.9, 0.9)


OTHER_MODELS = {  # factors for KEPT and KNOWN, and what drafts after an unseen bonus token are worth
    "foresees more": (0.5, 2.0, (0.7, 0.85)),
    "drafts badly behind an unseen token": (1.0, 1.0, (0.5, 0.7)),
}


@pytest.mark.parametrize("hazard", [0.75, 0.9])
@pytest.mark.parametrize("model", OTHER_MODELS)
def test_a_model_unlike_the_one_that_the_priors_are_of(model, hazard, monkeypatch):
    kept, known, unseen = OTHER_MODELS[model]
    before = expected_tokens(CyclePlan("one_pass", 16, 4), hazard, 1.0)
    monkeypatch.setattr(policy_simulator, "KEPT", {f: kept * share for f, share in policy_simulator.KEPT.items()})
    monkeypatch.setattr(policy_simulator, "KNOWN", {f: known * share for f, share in policy_simulator.KNOWN.items()})
    monkeypatch.setitem(policy_simulator.KINDS, "unseen", unseen)
    expected_tokens.cache_clear()
    try:
        assert abs(expected_tokens(CyclePlan("one_pass", 16, 4), hazard, 1.0) / before - 1) > 0.05
        for batch, seed in ((1, 1), (1, 2), (4, 3)):
            check_stationary("flat", batch, hazard, seed=seed, lag=1)
    finally:
        expected_tokens.cache_clear()


@pytest.mark.full
def test_luck_misleads_seldom():
    """Three plans within 13% of each other, one of which may look worse than it is for a thousand cycles."""
    cases = itertools.product((1, 2), (0.85, 0.9, 0.97), range(14))
    over = sorted(over_best("flat", batch, hazard, seed=seed) for batch, hazard, seed in cases)
    assert len(over) == 84 and statistics.mean(over) <= 1.016 and over[-1] <= 1.05


@pytest.mark.full
@pytest.mark.parametrize("batch", (1, 2, 4, 8, 16, 32, 64))
@pytest.mark.parametrize("device", DEVICES)
def test_stationary_text_on_the_whole_grid(device, batch):
    for hazard, decay, (seed, lag) in WHOLE_GRID:
        check_stationary(device, batch, hazard, decay, seed=seed, lag=lag)


RIVAL = CyclePlan("one_pass", 4, 2)
CHANGES = {  # factors on the costs that a warm-up measured
    "the warm-up's machine was half as fast": lambda cycle, plan: 0.5,
    "the warm-up's machine was twice as fast": lambda cycle, plan: 2.0,
    "the machine halves its speed for a while": lambda cycle, plan: 2.0 if 300 <= cycle < 600 else 1.0,
    "memory slows down as arithmetic speeds up, and back": lambda cycle, plan: (
        1.0 if cycle // 500 % 2 == 0 else 1.3 if plan == AR else 0.93
    ),
    "a rival becomes cheaper": lambda cycle, plan: 1.0 if plan != RIVAL else 1.12 if cycle < 700 else 0.9,
}


@pytest.mark.parametrize("change", CHANGES)
def test_costs_that_change_mislead_little(change, request):
    """2,000 cycles, times with 5% noise and one in 50 five times too long, against the best plan at current costs."""
    factor, over, seeds = CHANGES[change], [], range(2 if request.config.getoption("--full") else 1)
    for device, batch, hazard, seed in itertools.product(DEVICES, (1, 8), (0.6, 0.8), seeds):
        yields = {plan: expected_tokens(plan, hazard, 1.0) for plan in PLANS}
        seconds = {plan: cycle_seconds(device, batch, plan) for plan in PLANS}
        got = run(
            device, lambda cycle, i, hazard=hazard: (hazard, 1.0), 2000, noise=0.05, batch=batch, seed=seed,
            cost=lambda cycle, bucket, plan, seconds=seconds: seconds[plan] * factor(cycle, plan),
        )  # fmt: skip
        best = 0.0
        for cycle, ran in enumerate(got.plans):
            best += yields[ran] * min(seconds[plan] * factor(cycle, plan) / yields[plan] for plan in PLANS)
        over.append(got.seconds / best)
    assert statistics.mean(over) <= 1.03 and max(over) <= 1.1


LEARNT = [
    *[(device, 1, hazard, 0) for device in DEVICES for hazard in (0.0, 0.5, 0.8)],
    ("steep", 4, 0.9, 1),  # two_pass/4 looks best for a long time, unless idle credit buys another look
]


@pytest.mark.parametrize(("where", "lag"), by_turns(LEARNT, (0, 1)))
def test_costs_learnt_from_the_cycles_themselves(where, lag):
    device, batch, hazard, seed = where
    got = run(
        device, lambda cycle, i: (hazard, 1.0), chooser=policy(device, measured=False), noise=0.05, batch=batch,
        lag=lag, seed=seed,
    )  # fmt: skip
    assert got.over_ar <= PROMISE
    best, _ = best_fixed(device, batch, hazard, 1.0)
    assert got.seconds_per_token <= 1.15 * best


@pytest.mark.parametrize(("device", "at_least"), [("flat", 2.2), ("steep", 1.6)])
def test_a_fresh_engine_drafts_from_its_first_tokens_on(device, at_least):
    """AR first, to learn its cost. After that, luck with a few drafts does not decide the next hundred tokens."""
    runs = [run(device, lambda cycle, i: (0.8, 1.0), 64, seed=seed) for seed in range(20)]
    assert {next(i for i, plan in enumerate(got.plans) if plan != AR) for got in runs} == {REFRESH_CYCLES}
    speedups = [cycle_seconds(device, 1, AR) / got.seconds_per_token for got in runs]
    assert statistics.mean(speedups) >= at_least and min(speedups) >= 0.6 * at_least


def test_another_batch_size_begins_with_ar():
    """AR's cost there is measured before anything is compared with it, however rich the account."""
    chooser = policy("flat")
    run("flat", lambda cycle, i: (0.95, 1.0), 300, chooser=chooser)
    assert chooser.choose(1) != AR
    chooser.record([Outcome(15, 15)])
    plans = []
    for _ in range(20):
        plans.append(chooser.choose(3))
        chooser.record([Outcome(*[plans[-1].block_len - 1] * 2)] * 3, cycle_seconds("flat", 4, plans[-1]))
    assert [plan == AR for plan in plans] == [True] * REFRESH_CYCLES + [False] * (20 - REFRESH_CYCLES)


def test_what_is_to_be_timed_is_to_run_by_itself():
    """AR while it is timed anew, and every plan that was never timed. A cycle that takes prompts along is not timed."""
    chooser, wanted = policy("flat"), []
    for _ in range(10):
        plan = chooser.choose(3)
        wanted.append(chooser.wants_time)
        chooser.record([Outcome(*[plan.block_len - 1] * 2)] * 3, cycle_seconds("flat", 4, plan))
    assert wanted == [True] * REFRESH_CYCLES + [False] * (10 - REFRESH_CYCLES)
    chooser, wanted = Policy([AR], 1), []
    for _ in range(10):
        chooser.choose(1)
        wanted.append(chooser.wants_time)
        chooser.record([Outcome(0, 0)], 1.0)
    assert wanted == [True] * REFRESH_CYCLES + [False] * (10 - REFRESH_CYCLES)
    chooser = policy("flat", measured=False)
    for _ in range(10):
        chooser.choose(3)
        assert chooser.wants_time
        chooser.record([Outcome(0, 0)] * 3, None)


@pytest.mark.parametrize(("hazard", "decay"), [(0.3, 1.0), (0.8, 1.0), (0.9, 0.9)])
def test_expected_tokens_are_learnt(hazard, decay):
    chooser = policy("flat")
    run("flat", lambda cycle, i: (hazard, decay), 2000, batch=4, chooser=chooser)
    ran = chooser.plan_counts.most_common(1)[0][0]
    estimate = chooser.acceptance.tokens(PLANS)
    assert estimate[ran] == pytest.approx(expected_tokens(ran, hazard, decay), rel=0.12)
    assert estimate[AR] == 1.0


@pytest.mark.parametrize("length", [12, 48])
def test_short_requests_run_within_5_percent_of_the_best_fixed_plan(length):
    def rate(chooser):
        got = run("flat", lambda cycle, i: (0.8, 1.0), 3000, batch=4, length=length, chooser=chooser)
        return got.seconds / got.tokens

    assert rate(policy("flat")) <= 1.05 * min(map(rate, PLANS))


@pytest.mark.parametrize(("seconds", "balance", "runs"), [((1.5, 1.9, 3.0), 1.0, 4), ((4.5, 3.5, 6.0), 3.7, 8)])
def test_short_of_credit_it_keeps_what_runs_where_that_beats_ar(seconds, balance, runs):
    """The longest of three is wanted but not covered, the shortest is in use, the middle one is best of the rest."""
    plans = [CyclePlan("two_pass", k) for k in (4, 8, 16)]
    chooser = Policy([AR, *plans], 1)
    for plan, cost in zip([AR, *plans], (1.0, *seconds), strict=True):
        chooser.costs.set(1, plan, cost)
    chooser.acceptance.observe(plans[-1], [[Outcome(15, 15)]] * 100)
    for _ in range(REFRESH_CYCLES):
        assert chooser.choose(1) == AR
        chooser.record([Outcome(0, 0)])
    chooser.settle()
    assert chooser.explain()["in_use"] == plans[-1].label
    chooser.current, chooser.safety.balance = plans[0], balance
    assert chooser.choose(1).block_len == runs


@pytest.mark.parametrize(("balance", "starts"), [(0.6, False), (0.9, True)])
def test_one_pass_starts_with_credit_until_its_first_drafts_are_verified(balance, starts):
    plan = CyclePlan("one_pass", 16, 4)
    chooser = Policy([AR, plan], 1)
    chooser.costs.set(1, AR, 1.0)
    chooser.costs.set(1, plan, 1.4)
    chooser.acceptance.observe(plan, [[Outcome(15, 15)]] * 100)
    for _ in range(REFRESH_CYCLES):
        assert chooser.choose(1) == AR
        chooser.record([Outcome(0, 0)])
    chooser.settle()
    chooser.safety.balance = balance
    assert (chooser.choose(1) == plan) == starts
    chooser.record([Outcome(0, 0)])
    assert (chooser.choose(1) == plan) == starts


def test_it_thinks_once_in_a_course_and_whenever_the_batch_changes(monkeypatch):
    thoughts, think = [], Policy._think
    monkeypatch.setattr(Policy, "_think", lambda *args: thoughts.append(args) or think(*args))
    chooser = policy("flat")

    def cycles(count, batch=1):
        before = len(thoughts)
        for _ in range(count):
            plan = chooser.choose(batch)
            chooser.record([Outcome(plan.block_len - 1, plan.block_len - 1)] * batch)
        return len(thoughts) - before

    assert cycles(COURSE_SHARE) == COURSE_SHARE
    cycles(COURSE * COURSE_SHARE)
    assert 20 <= cycles(20 * COURSE) <= 30  # trials end courses, too
    while not chooser._course.left:
        cycles(1)
    assert cycles(1, batch=8) == 1 and cycles(1) == 1
    chooser = Policy([AR], 1)
    chooser.costs.set(1, AR, 1.0)
    cycles(REFRESH_CYCLES)
    chooser.safety.balance = -100.0
    assert cycles(10 * AR_COURSE) == 10  # overdrawn or not


@pytest.mark.parametrize(("choosing", "wait"), [(0.0, 29), (0.02, 31), (0.25, 54)])
def test_ar_runs_in_one_course_until_the_account_covers_the_wanted_plan(monkeypatch, choosing, wait):
    """And the choice itself, which at 1% of a cycle or more takes all that the cycles after it bring in."""
    plan, thoughts, think, now = CyclePlan("two_pass", 4), [], Policy._think, itertools.count(step=choosing)
    chooser = Policy([AR, plan], 1, clock=lambda: next(now))
    for p, seconds in ((AR, 1.0), (plan, 1.295)):
        chooser.costs.set(1, p, seconds)
    while chooser.current != plan or chooser._course.left:
        drafts = chooser.choose(1).block_len - 1
        chooser.record([Outcome(drafts, drafts)])
    chooser.settle()
    chooser.safety.balance = 0.0
    monkeypatch.setattr(Policy, "_think", lambda *args: thoughts.append(args) or think(*args))
    for _ in range(wait):  # 1% each, for 1.295 - 1.01 and the choice
        assert chooser.choose(1) == AR
        chooser.record([Outcome(0, 0)])
    assert chooser.choose(1) == plan and len(thoughts) == 2


def test_candidates():
    assert candidate_plans(8, 20) == [*(p for p in candidate_plans(8) if not p.fan_out), CyclePlan("one_pass", 8, 20)]
    assert [p.label for p in candidate_plans(4, 6)] == ["ar", "two_pass/3", "one_pass/3x6"]
    assert [p.label for p in candidate_plans(8)] == [
        "ar", "two_pass/3", "two_pass/5", "two_pass/7",
        "one_pass/3x2", "one_pass/3x4", "one_pass/7x2", "one_pass/7x4", "one_pass/7x8",
    ]  # fmt: skip
    assert {p.block_len for p in candidate_plans(32)} == {1, 4, 6, 8, 16, 32}
    assert [p.mode for p in candidate_plans(4, 10)][2:] == ["one_pass"] and len(candidate_plans(4, 11)) == 2
    assert Policy([AR], 1).choose(1) == AR
    with pytest.raises(ValueError, match="plans must hold"):
        Policy([CyclePlan("two_pass", 8)], 1)


def test_sampling_cycles_are_judged_by_their_own_costs():
    chooser = policy("flat")
    for _ in range(200):
        plan = chooser.choose(1, greedy=False)
        chooser.record([Outcome(plan.block_len - 1, plan.block_len - 1)], 1e-3 if plan == AR else 1.0)
    chooser.settle()
    # Each plan is tried once, and once more in case that was a stall. Greedy cycles are 200 times cheaper.
    assert chooser.plan_counts[AR] >= 200 - 2 * len(PLANS)
    while chooser.choose(1) == AR:
        chooser.record([Outcome(0, 0)])
    assert chooser.explain()["candidates"]["ar"]["seconds_per_cycle"] == pytest.approx(cycle_seconds("flat", 1, AR))
    assert chooser.explain(greedy=False)["candidates"]["ar"]["seconds_per_cycle"] == pytest.approx(1e-3, rel=0.2)


def test_sampling_cycles_are_supposed_to_cost_in_proportion_to_greedy_ones():
    chooser = policy("flat")
    chooser.choose(1, greedy=False)
    chooser.record([Outcome(0, 0)], 1.5 * cycle_seconds("flat", 1, AR))
    chooser.settle()
    greedy, sampled = (chooser.explain(greedy=kind)["candidates"] for kind in (True, False))
    assert [row["seconds_per_cycle"] for row in sampled.values()] == [
        pytest.approx(1.5 * row["seconds_per_cycle"]) for row in greedy.values()
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_and_sampled_batches_in_turn_are_judged_by_their_own_acceptance(device, monkeypatch):
    """Sampled drafts are accepted less often. Alternating 20 cycles of each must not pass for a text in between."""
    hazards, seconds, best = {True: 0.9, False: 0.3}, 0.0, 0.0
    choosers = [policy(device) for _ in range(3)]  # with luck of its own each
    for i, turn in itertools.product(range(3), range(100)):
        chooser, greedy = choosers[i], turn % 2 == 0
        monkeypatch.setattr(chooser, "choose", partial(Policy.choose, chooser, greedy=greedy))
        how = dict(chooser=chooser, seed=100 * i + turn)
        got = run(device, lambda cycle, i: (hazards[greedy], 1.0), 20, **how)  # noqa: B023
        seconds += got.seconds
        best += got.prospects * best_fixed(device, 1, hazards[greedy], 1.0)[0]
    assert seconds <= 1.05 * best


def test_one_pass_plans_stay_within_the_rows_of_a_pass():
    chooser = Policy(PLANS, 8, PassCosts(), max_rows=144)
    assert chooser.plans_of(1) == PLANS
    assert [p.label for p in chooser.plans_of(4)] == [
        "ar", "two_pass/3", "two_pass/5", "two_pass/7", "two_pass/15",
        "one_pass/3x2", "one_pass/3x4", "one_pass/7x2",
    ]  # fmt: skip
    assert [p.label for p in chooser.plans_of(8)][5:] == ["one_pass/3x2"]
    assert Policy(PLANS, 8, max_rows=1).plans_of(8) == [p for p in PLANS if p.mode != "one_pass"]


def test_a_close_rival_of_ar_hears_soon_that_ar_has_become_faster():
    """A machine's memory and its arithmetic do not change speed together: two_pass's cost says nothing about ar's."""
    plan = CyclePlan("two_pass", 4)
    subject, seconds = Policy([AR, plan], 1), {AR: 1.0, plan: 1.8}
    for p in seconds:
        subject.costs.set(1, p, seconds[p])

    def decode(count):
        ran = []
        for _ in range(count):
            ran.append(subject.choose(1))
            drafts = ran[-1].block_len - 1
            subject.record([Outcome(drafts, min(drafts, 1))], seconds[ran[-1]])
        return ran

    assert decode(700)[-1] == plan
    seconds[AR] = 0.7
    assert decode(250)[-20:] == [AR] * 20


def test_a_courses_last_times_correct_the_costs_once(monkeypatch):
    chooser, seen = Policy([AR], 1), []
    chooser.costs.set(1, AR, 1.0)
    for i in range(REFRESH_CYCLES + AR_COURSE):
        if i == REFRESH_CYCLES + 1:
            monkeypatch.setattr(chooser.costs, "observe", lambda *args: seen.append(args))
        chooser.choose(1)
        chooser.record([Outcome(0, 0)], 1.0 + i)
    chooser.settle()
    assert seen == [(1, AR, 1.0 + i - RECENT + j) for j in range(1, RECENT + 1)]
    assert [chooser.choose(1), chooser.choose(1)] == [AR, AR]
    for seconds in (2.0, 3.0):  # weighed one by one
        chooser.record([Outcome(0, 0)], seconds)
        chooser.settle()
    assert seen[RECENT:] == [(1, AR, 2.0), (1, AR, 3.0)]
