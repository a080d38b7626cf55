"""What mode="auto" may lose against plain AR, whatever the drafter and the clock do: see tests/policy_simulator.py."""

import itertools
import math
import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from orthrus_rt.acceptance import Outcome
from orthrus_rt.cycle_plan import AR, CyclePlan
from orthrus_rt.lane import REFRESH_CYCLES, SAFETY
from orthrus_rt.pass_costs import PassCosts
from orthrus_rt.policy import AR_COURSE, COURSE, GRANT, SAFETY_CAP, Policy
from tests.policy_simulator import (
    DEVICES,
    HORIZON,
    PLANS,
    PROMISE,
    by_turns,
    cycle_seconds,
    policy,
    run,
)


def test_the_account_is_the_one_that_is_promised():
    """README: 1% and eight cycles, 3% from 400 tokens on."""
    assert (SAFETY, GRANT) == (0.01, 8) and SAFETY * 400 + GRANT <= 0.03 * 400


def alternating(period):
    return lambda cycle, i: (0.9 if (cycle // period) % 2 else 0.0, 1.0)


ADVERSARIES = {
    "never": (lambda cycle, i: (0.0, 1.0), 1),
    "good, then never again": (lambda cycle, i: (0.95 if cycle < 500 else 0.0, 1.0), 1),
    "every other cycle": (alternating(1), 1),
    "alternating by 50": (alternating(50), 1),
    "alternating by 200": (alternating(200), 1),
    "one good sequence in four": (lambda cycle, i: (0.95 if i % 4 == 0 else 0.0, 1.0), 8),
    "sequences and batch change": (
        lambda cycle, i: (random.Random(cycle // 40 * 64 + i).choice((0.0, 0.5, 0.9)), 1.0),
        lambda cycle: random.Random(cycle // 30).choice((1, 2, 3, 7, 16)),
    ),
}


@pytest.mark.parametrize(("adversary", "device", "lag"), by_turns(ADVERSARIES, DEVICES, (0, 1)))
def test_no_drafter_costs_more_than_the_safety_account(adversary, device, lag):
    """With known costs, at every moment since the start, and over every stretch except for the capped credit."""
    seq_of, batch = ADVERSARIES[adversary]
    got = run(device, seq_of, 2000, batch=batch, lag=lag)
    assert got.most_behind <= GRANT * cycle_seconds(device, 16 if callable(batch) else batch, AR) + 1e-9
    assert got.over_ar <= PROMISE
    if not callable(batch):
        assert got.worst_stretch <= SAFETY_CAP + 1
    assert got.switches <= 200


@pytest.mark.parametrize("device", DEVICES)
def test_a_drafter_that_fails_whenever_the_account_is_rich(device):
    chooser = policy(device)
    rich = 10 * cycle_seconds(device, 1, AR)
    got = run(device, lambda cycle, i: (0.0 if chooser.safety.balance > rich else 1.0, 1.0), 2000, chooser=chooser)
    assert got.most_behind <= GRANT * cycle_seconds(device, 1, AR) + 1e-9
    assert got.over_ar <= PROMISE


@pytest.mark.parametrize("device", DEVICES)
def test_a_drafter_that_fails_whenever_it_is_trusted(device):
    chooser = policy(device)
    got = run(device, lambda cycle, i: (0.95 if chooser.current in (None, AR) else 0.0, 1.0), 2000, chooser=chooser)
    assert got.most_behind <= GRANT * cycle_seconds(device, 1, AR) + 1e-9
    assert got.over_ar <= PROMISE


@settings(max_examples=25, deadline=None)
@given(seed=hs.integers(0, 2**32), lag=hs.integers(0, 3), generous=hs.floats(0, 1), clocked=hs.booleans())
def test_the_account_is_never_overdrawn(seed, lag, generous, clocked):
    """Any costs, outcomes and batch sizes, results as late as they may be, and choices that take up to an AR cycle."""
    luck, costs, late = random.Random(seed), PassCosts(), []
    for bucket in (1, 2, 4, 8):
        ar = luck.uniform(1e-3, 1e-2)
        for plan in PLANS:
            costs.set(bucket, plan, ar if plan == AR else ar * luck.uniform(0.9, 4.0))
    now = 0.0

    def clock():
        nonlocal now
        now += luck.uniform(0.0, 2e-3)
        return now

    chooser = Policy(PLANS, 8, costs, clock=clock if clocked else None)
    for _ in range(300):
        size = luck.randint(1, 8)
        drafts = chooser.choose(size).block_len - 1
        late.append([Outcome(drafts, drafts if luck.random() < generous else 0) for _ in range(size)])
        if len(late) > lag:
            chooser.record(late.pop(0))
        if luck.random() < 0.5:  # otherwise when the policy thinks again
            chooser.settle()
        assert chooser.safety.balance >= -1e-12
    chooser.settle()
    assert chooser.plan_counts.total() == 300 - lag
    assert clocked or chooser.spent <= (1 + SAFETY) * chooser.ar_equivalent + GRANT * 1e-2


DRIFTS = {
    "the machine's speed swings": lambda cycle, plan: 1 + 0.5 * math.sin(cycle / 150),
    "the machine halves its speed and recovers": lambda cycle, plan: 2 if (cycle // 700) % 2 else 1,
    "contexts grow": lambda cycle, plan: 1 + cycle / HORIZON * (0.5 if plan == AR else 1.0),
    "AR alone gets cheaper": lambda cycle, plan: 1 - 0.3 * cycle / HORIZON if plan == AR else 1,
    "drafting costs twice as much at once": lambda cycle, plan: 2 if plan != AR and cycle > 1500 else 1,
}


@pytest.mark.parametrize("hazard", [0.0, 0.6])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drift", DRIFTS)
def test_costs_that_drift_and_are_timed_with_outliers(drift, device, hazard):
    """Measured times alone keep the promise over the run, with 5% noise and one time in 50 five times too long."""
    got = run(
        device,
        lambda cycle, i: (hazard, 1.0),
        cost=lambda cycle, bucket, plan: cycle_seconds(device, bucket, plan) * DRIFTS[drift](cycle, plan),
        noise=0.05,
    )
    assert got.over_ar <= PROMISE


class Stalls(Policy):
    """The very first cycle takes ``stalled`` times as long."""

    stalled = 1.0

    def record(self, outcomes, seconds=None):
        super().record(outcomes, self.stalled * seconds)
        self.stalled = 1.0


@pytest.mark.parametrize("seed", [0, 3, 36])  # in the latter two the third time is too long as well
@pytest.mark.parametrize("stalled", [1, 3, 10])
@pytest.mark.parametrize("device", DEVICES)
def test_a_first_cycle_that_stalls_does_not_raise_the_grant(device, stalled, seed):
    """As a multiple of AR cycles, whose time is not known yet."""
    chooser = Stalls(PLANS, 64, PassCosts({"flat": 256, "steep": 14}[device]))
    chooser.stalled = stalled
    got = run(device, lambda cycle, i: (0.0, 1.0), 420, chooser=chooser, noise=0.02, seed=seed)
    lost = got.seconds - (1 + SAFETY) * got.ar_seconds
    assert lost <= (GRANT + 0.5) * cycle_seconds(device, 1, AR)  # the noise


@pytest.mark.parametrize("prefill", [0.0, 4.0])
def test_the_grant_follows_what_an_ar_cycle_takes(prefill):
    """And what a prompt has earned stays."""
    chooser = Policy([AR], 1)
    chooser.prefilled(prefill / SAFETY)
    for seconds in (10.0, 1.0, 1.0, 1.0):
        assert chooser.choose(1) == AR
        chooser.record([Outcome(0, 0)], seconds)
        chooser.settle()
    assert chooser.safety.balance == pytest.approx(GRANT + prefill + SAFETY * (10 + 10 + 1 + 1))


def test_prefill_earns_a_share_too():
    chooser, ar = policy("flat"), cycle_seconds("flat", 1, AR)
    chooser.prefilled(1.0)
    assert chooser.safety.balance == SAFETY and chooser.spent == chooser.ar_equivalent == 1.0
    chooser.choose(1)
    chooser.record([Outcome(0, 0)])
    chooser.settle()
    assert chooser.safety.balance == pytest.approx(SAFETY + (GRANT + SAFETY) * ar)
    chooser.prefilled(1e3)
    chooser.choose(1)
    chooser.record([Outcome(0, 0)])
    chooser.settle()
    assert chooser.safety.balance == pytest.approx(SAFETY_CAP * ar)


def test_nothing_timed_is_nothing_earned():
    chooser = policy("flat", measured=False)
    for _ in range(500):
        assert chooser.choose(1) == AR
        chooser.record([Outcome(0, 0)])
    chooser.choose(1)
    chooser.record([Outcome(0, 0)], 5e-3)
    chooser.settle()
    assert chooser.safety.balance == pytest.approx((GRANT + SAFETY) * 5e-3)
    assert chooser.costs.measured_once(1, AR)  # a time does not confirm itself


def test_lost_cycles_hold_no_credit():
    chooser = policy("flat")
    for _ in range(200):
        chooser.choose(1)
        chooser.record([Outcome(15, 15)] if chooser.current != AR else [Outcome(0, 0)])
    chooser.settle()
    free = chooser.safety.balance
    chooser.choose(1)
    chooser.forget_pending()
    chooser.settle()
    assert chooser.safety.balance == free
    assert chooser.choose(1) != AR
    worst = chooser._pending[-1].reserved
    chooser.record([])
    chooser.settle()
    assert worst > 0.0
    assert chooser.safety.balance == pytest.approx(free - worst)  # a cycle that served no sequence was still paid for


def test_choosing_is_paid_from_the_account_and_overdraws_it_never():
    """A choice that took longer than an AR cycle was stalled, and counts as one. Within a course nothing is chosen."""
    times = []
    chooser = Policy([AR], 1, clock=lambda: times.pop())
    chooser.costs.set(1, AR, 1.0)

    def cycle(choosing=None):
        """One cycle, with a choice that takes this long, or none."""
        times[:] = [] if choosing is None else [100.0 + choosing, 100.0]
        chooser.settle()
        before = chooser.safety.balance
        chooser.choose(1)
        assert not times
        paid = before - chooser.safety.balance
        chooser.record([Outcome(0, 0)])
        return paid

    assert cycle(0.25) == 0.0  # nothing granted yet
    for _ in range(REFRESH_CYCLES - 1):
        assert cycle(0.25) == pytest.approx(0.25)
    assert cycle(0.5) == pytest.approx(0.5)
    for _ in range(AR_COURSE - 1):
        assert cycle() == 0.0
    assert cycle(7.0) == pytest.approx(1.0)
    chooser.settle()
    chooser.safety.balance, chooser.current = 0.3, None
    assert cycle(0.9) == pytest.approx(0.3)
    chooser.settle()
    assert chooser.spent == pytest.approx(chooser.plan_counts[AR] + REFRESH_CYCLES * 0.25 + 0.5 + 1.0 + 0.9)


LOSSES = {
    "a fault": lambda chooser: chooser.forget_pending(),
    "rejection sampling ran": lambda chooser: setattr(chooser, "current", None),  # as Auto.choose does it
}


@pytest.mark.parametrize("loss", LOSSES)
def test_lost_drafts_end_the_course_and_the_pipeline_fills_anew(loss, monkeypatch):
    """The cycle that fills it tells nothing of drafts."""
    plan, good, bad = CyclePlan("one_pass", 16, 4), Outcome(15, 12), Outcome(0, 0)
    chooser = Policy([AR, plan], 1)
    for p, seconds in ((AR, 1.0), (plan, 1.4)):
        chooser.costs.set(1, p, seconds)
    before, _ = None, chooser.choose(1)
    while not (chooser.current == plan and chooser._course.left == COURSE - 3):
        chooser.record([good if chooser.current == before == plan else bad])
        before = chooser.current
        chooser.choose(1)
    chooser.record([good])
    LOSSES[loss](chooser)
    assert chooser.choose(1) == plan
    seen = []
    monkeypatch.setattr(chooser.acceptance, "observe", lambda *args: seen.append(args))
    chooser.record([bad])
    assert chooser.choose(1) == plan
    chooser.record([good])
    chooser.settle()
    assert seen == [(plan, [[good]])]
    assert chooser.choose(1) == plan
    chooser.record([good])
    chooser.settle()
    assert seen[1:] == [(plan, [[good]])]


def test_a_course_that_the_account_does_not_cover_any_more_ends():
    """A drafter that starts to fail from one cycle to the next, with credit for a part of the course."""
    chooser, ar = policy("steep"), cycle_seconds("steep", 1, AR)
    run("steep", lambda cycle, i: (0.9, 1.0), 1000, chooser=chooser)
    while chooser._course.left < COURSE - 1 or chooser.current == AR:
        plan = chooser.choose(1)
        chooser.record([Outcome(plan.block_len - 1, plan.block_len - 1)])
    chooser.settle()
    chooser.safety.balance, followed, least = 5.5 * chooser._course.reserved, chooser.current, math.inf
    ran = []
    for _ in range(COURSE):
        ran.append(chooser.choose(1))
        chooser.record([Outcome(ran[-1].block_len - 1, 0)])
    assert ran[:5] == [followed] * 5 and ran[5] != followed
    for _ in range(200):
        chooser.choose(1)
        chooser.record([Outcome(chooser.current.block_len - 1, 0)])
        chooser.settle()
        least = min(least, chooser.safety.balance)
    assert -1e-12 <= least < ar


@pytest.mark.parametrize("lag", [0, 1])
def test_cycles_dearer_than_they_were_thought_are_paid_at_the_price_they_began_at(lag):
    """No course is overdrawn because of its own times: they make the next course dearer."""
    plan = CyclePlan("two_pass", 16)
    chooser = Policy([AR, plan], 1)
    for p, seconds in ((AR, 1.0), (plan, 2.0)):
        chooser.costs.set(1, p, seconds)
    late = []
    for cycle in range(400):
        ran, good = chooser.choose(1), cycle < 150  # after that no draft is accepted, and drafting takes twice as long
        drafts = ran.block_len - 1
        late.append(([Outcome(drafts, drafts if good else 0)], 1.0 if ran == AR else 2.0 if good else 4.0))
        if len(late) > lag:
            chooser.record(*late.pop(0))
        assert chooser.safety.balance >= -1e-9 - 2.0 * lag  # a cycle under way is paid at what is known by then
    assert 150 < chooser.plan_counts[plan] + lag < 200


def test_a_course_is_paid_at_the_price_that_it_began_at():
    plan = CyclePlan("two_pass", 16)
    chooser, price = Policy([AR, plan], 1), {AR: 1.0, plan: 2.0}
    for p, seconds in price.items():
        chooser.costs.set(1, p, seconds)
    while chooser.current in (None, AR) or chooser._course.left < COURSE - 1:
        drafts = chooser.choose(1).block_len - 1
        chooser.record([Outcome(drafts, drafts)], price[chooser.current])
    chooser.settle()
    before, worst, cycles = chooser.safety.balance, chooser._course.reserved, chooser._course.left
    assert worst == pytest.approx(2.0 - (1 + SAFETY), rel=1e-3)
    for _ in range(cycles):
        assert chooser.choose(1) == plan
        chooser.record([Outcome(15, 0)], 4.0)
    chooser.settle()
    assert chooser.safety.balance == pytest.approx(before - cycles * worst, rel=1e-3)
    assert chooser.costs.seconds(1, plan) > 2.5


def drafting(seconds, clock=None):
    """A policy whose course of this plan, of so many seconds where AR takes one, has just ended."""
    plan = CyclePlan("two_pass", 16)
    chooser = Policy([AR, plan], 1, clock=clock)
    for p, cost in ((AR, 1.0), (plan, seconds)):
        chooser.costs.set(1, p, cost)
    while chooser.current != plan or chooser._course.left:
        drafts = chooser.choose(1).block_len - 1
        chooser.record([Outcome(drafts, drafts)])
    chooser.settle()
    return chooser, plan


def test_credit_is_held_for_cycles_whose_results_have_not_arrived():
    chooser, plan = drafting(2.0)
    worst, ran = chooser._course.reserved, []
    chooser.safety.balance = 2.5 * worst
    for _ in range(4):
        ran.append(chooser.choose(1))
        chooser.settle()
    assert ran == [plan, plan, AR, AR]


def test_choosing_takes_no_credit_that_cycles_need():
    """Neither the next one, nor those under way."""
    chooser, plan = drafting(2.0, clock=partial(next, itertools.count(step=0.9)))
    worst = chooser._course.reserved
    for in_flight in (0, 1):
        chooser.settle()
        chooser.safety.balance, chooser.current = (1.5 + in_flight) * worst, None
        assert chooser.choose(1) == plan
        assert chooser.safety.balance == pytest.approx((1 + in_flight) * worst)
    chooser.safety.balance, chooser.current = -1.0, None
    assert chooser.choose(1) == AR
    assert chooser.safety.balance == -1.0


def test_a_prefill_may_end_the_wait_for_credit():
    chooser, plan = drafting(2.0)
    chooser.safety.balance = 0.0
    for _ in range(2):
        assert chooser.choose(1) == AR
        chooser.record([Outcome(0, 0)])
    chooser.prefilled(1e3)
    assert chooser.choose(1) == plan
