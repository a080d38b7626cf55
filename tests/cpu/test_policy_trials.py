"""When the policy of mode="auto" tries a plan that is not in use, for how long, and what that may cost."""

import itertools
import random

import pytest

from orthrus_rt.acceptance import Outcome
from orthrus_rt.cycle_plan import AR, CyclePlan, batch_bucket
from orthrus_rt.lane import DEADBAND, REFRESH_CYCLES
from orthrus_rt.pass_costs import APART
from orthrus_rt.policy import EXPLORATION, EXPLORATION_CAP, OPTIMISM, REST, Policy
from tests.policy_simulator import cycle_seconds, policy

TWO_PASS, ONE_PASS, PRICE = CyclePlan("two_pass", 4), CyclePlan("one_pass", 4, 2), 0.02


def rested(rival, batch):
    """A policy that has run AR for as long as it rests between trials. Trying ``rival`` would lose PRICE a cycle."""
    chooser, bucket = Policy([AR, rival], 8), batch_bucket(batch, 8)
    chooser.costs.set(bucket, AR, 1.0)
    chooser.costs.set(bucket, rival, chooser.acceptance.tokens([rival])[rival] + PRICE)
    ran = 0
    while ran < REST + REFRESH_CYCLES or chooser._course.left:
        assert chooser.choose(batch) == AR
        chooser.exploration.balance, ran = 0.0, ran + 1
        chooser.record([Outcome(0, 0)] * batch)
    chooser.settle()
    return chooser


@pytest.mark.parametrize(("batch", "credit", "tried"), [(1, 3, False), (8, 3, True), (3, 3, True), (3, 2, False)])
def test_a_large_batch_tells_of_a_plan_in_fewer_cycles(batch, credit, tried):
    """Credit for some cycles of a plan that may beat AR: with eight sequences, one cycle is a trial."""
    chooser = rested(TWO_PASS, batch)
    chooser.exploration.balance = (credit + 0.5) * PRICE
    assert (chooser.choose(batch) == TWO_PASS) == tried


@pytest.mark.parametrize(("filling", "tried"), [(False, 0), (True, 2)])
def test_credit_for_a_trial_of_one_pass_is_for_more_than_its_first_cycle(filling, tried):
    """Its first cycle has no drafts to verify. With eight sequences, one more cycle is a trial."""
    chooser = rested(ONE_PASS, 8)
    chooser.exploration.balance = 1.5 * PRICE + filling * (chooser.costs.seconds(8, ONE_PASS) - 1.0)
    plans = []
    for _ in range(3):
        plans.append(chooser.choose(8))
        chooser.record([Outcome(0, 0)] * 8)
    assert plans == [ONE_PASS] * tried + [AR] * (3 - tried)


def test_a_plan_whose_only_cycle_may_have_stalled_gets_one_more_at_any_price():
    """That happens as soon as exploration has any credit."""
    plan = CyclePlan("two_pass", 4)
    chooser = Policy([AR, plan], 1)
    chooser.costs.set(1, AR, 1.0)
    chooser.costs.observe(1, plan, 5.0)
    while chooser._since_trial < 2 * REST or chooser._course.left:
        chooser.exploration.balance = -100.0
        assert chooser.choose(1) == AR
        chooser.record([Outcome(0, 0)])
    chooser.settle()
    chooser.exploration.balance = 0.1
    assert chooser.choose(1) == plan
    chooser.record([Outcome(3, 0)], 5.0)
    assert chooser.choose(1) == AR


@pytest.mark.parametrize(("share", "tried"), [(0.5, False), (1.5, True)])
def test_what_might_save_less_than_the_deadband_is_not_tried(share, tried):
    chooser = rested(TWO_PASS, 8)
    chooser.costs.set(8, TWO_PASS, 1.0)
    hopeful = chooser.costs.seconds(8, TWO_PASS, hopeful=True)
    tokens = chooser.acceptance.tokens([TWO_PASS], OPTIMISM)[TWO_PASS]
    chooser.costs.set(8, TWO_PASS, (1 - share * DEADBAND) * tokens / hopeful)
    chooser.exploration.balance = 10.0
    assert (chooser.choose(8) == TWO_PASS) == tried


def test_a_trial_costs_what_it_loses_against_the_plan_in_use():
    """AR here, which yields a token a second. What a trial gains is credited."""
    chooser = rested(TWO_PASS, 8)
    cost = chooser.costs.seconds(8, TWO_PASS)
    for accepted in (0, 3):
        chooser.exploration.balance, chooser._since_trial, chooser.current = 10.0, REST, None
        assert chooser.choose(8) == TWO_PASS
        chooser.record([Outcome(3, accepted)] * 8)
        chooser.settle()
        assert chooser.exploration.balance == pytest.approx(10.0 + EXPLORATION * cost - (cost - (1 + accepted)))


def test_credit_for_trials_is_capped():
    chooser = rested(TWO_PASS, 1)
    chooser.exploration.balance = 1e3
    chooser.choose(1)
    chooser.record([Outcome(0, 0)])
    chooser.settle()
    assert chooser.exploration.balance == EXPLORATION_CAP


def test_a_trial_begins_as_soon_as_the_last_one_is_long_past():
    """Whatever ended the courses between them, such as another batch or rejection sampling."""
    chooser = Policy([AR, TWO_PASS], 1)
    chooser.costs.set(1, AR, 1.0)
    chooser.costs.set(1, TWO_PASS, chooser.acceptance.tokens([TWO_PASS])[TWO_PASS] + PRICE)
    plans = []
    for cycle in range(REFRESH_CYCLES + REST + 1):
        if cycle == REFRESH_CYCLES + 10:
            chooser.current = None
        chooser.exploration.balance = 1.0
        plans.append(chooser.choose(1))
        chooser.record([Outcome(0, 0)])
    assert plans == [AR] * (REFRESH_CYCLES + REST) + [TWO_PASS]


@pytest.mark.parametrize("greedy", [True, False])
def test_the_first_times_known_are_no_gain(greedy):
    """Before, all costs are bare numbers; those of sampling also if those of greedy cycles are known."""
    chooser = policy("steep", measured=not greedy)
    for _ in range(8):
        plan = chooser.choose(1, greedy)
        chooser.record([Outcome(plan.block_len - 1, 0)], cycle_seconds("steep", 1, plan))
    chooser.settle()
    assert chooser.spent > 0 and chooser.exploration.balance <= EXPLORATION * chooser.spent


@pytest.mark.parametrize("seed", range(4))
def test_timing_ar_leaves_trials_of_others_their_turn(seed):
    """A plan 9% better than AR is in use, so timing AR is cheap and due often; another, which seems to be as good as
    AR, is 15% better than the one in use.
    """
    cost, rng = {AR: 1.0, TWO_PASS: 1.7, ONE_PASS: 1.45}, random.Random(seed)
    chooser, tried = Policy([*cost], 1), 0
    for plan, seconds in cost.items():
        chooser.costs.set(1, plan, seconds)
    while (plan := chooser.choose(1)) != ONE_PASS:
        tried += 1
        accepted = next(i for i in itertools.count() if i == plan.block_len - 1 or rng.random() >= 0.5)
        chooser.record([Outcome(plan.block_len - 1, accepted)], cost[plan] * rng.gauss(1, 0.02))
        assert tried < 2500


def rested_beside(*seconds):
    """A policy that has run AR for long, with credit for trials, and TWO_PASS's times measured before."""
    chooser = Policy([AR, TWO_PASS], 1)
    chooser.costs.set(1, AR, 1.0)
    for each in seconds:
        chooser.costs.observe(1, TWO_PASS, each)
    while chooser.costs._clock < 2 * REST or chooser._course.left:
        chooser.exploration.balance = -100.0
        assert chooser.choose(1) == AR
        chooser.record([Outcome(0, 0)], 1.0)
    chooser.settle()
    chooser.safety.balance = 50.0
    return chooser


@pytest.mark.parametrize(("share", "cost", "tried"), [(0.05, 5.0, False), (0.5, 5.0, True), (0.5, 20.0, False)])
def test_spare_credit_checks_a_cost_that_was_measured_briefly(share, cost, tried):
    chooser = rested_beside(cost, cost, cost)
    assert not chooser.costs.measured_once(1, TWO_PASS) and chooser.costs.measured_briefly(1, TWO_PASS)
    chooser.exploration.balance = share * EXPLORATION_CAP
    assert (chooser.choose(1) == TWO_PASS) == tried
    if tried:
        chooser.record([Outcome(3, 0)], 1.5)
        assert chooser.choose(1) == AR and chooser._since_trial == 1  # one cycle
        assert chooser.costs.seconds(1, TWO_PASS) == pytest.approx(1.5)


@pytest.mark.parametrize("late", [1.5, 25.0])  # the others, or this one, came while the machine was disturbed
def test_a_late_measurement_that_does_not_fit_confirms_nothing(late):
    costs = rested_beside(5.0, 5.0, 5.0).costs
    costs.observe(1, TWO_PASS, late)
    assert costs.measured_briefly(1, TWO_PASS)
    assert costs.seconds(1, TWO_PASS) < 8.0


def test_what_was_confirmed_much_later_is_known():
    chooser = rested_beside(5.0, 5.0, 5.0)
    chooser.costs.observe(1, TWO_PASS, 5.0)
    assert not chooser.costs.measured_briefly(1, TWO_PASS)
    chooser.exploration.balance = 0.9 * EXPLORATION_CAP
    assert chooser.choose(1) == AR
    chooser.costs.observe(1, TWO_PASS, 1.5)
    assert chooser.costs.seconds(1, TWO_PASS) > 4.0  # one time among several is no proof


@pytest.mark.parametrize("timed", (True, False))
def test_cycles_of_prompts_are_time_that_passes(timed):
    chooser = Policy([AR, TWO_PASS], 1)
    for seconds in (1.0, *[1.0 if timed else None] * 2 * APART, 1.0):
        assert chooser.choose(1) == AR
        chooser.record([Outcome(0, 0)], seconds)
        chooser.settle()
        chooser.safety.balance = 0.0
    assert not chooser.costs.measured_briefly(1, AR)


def test_what_was_measured_briefly_is_tried_by_itself():
    chooser, seconds, seen = Policy([AR, TWO_PASS], 1), {AR: 1.0, TWO_PASS: 1.5}, set()
    for _ in range(20 * REST):
        plan = chooser.choose(1)
        if plan == TWO_PASS and chooser._course.trial:
            seen.add((chooser.costs.measured_briefly(1, plan), chooser.wants_time))
        chooser.record([Outcome(plan.block_len - 1, 0)], seconds[plan])
    assert seen == {(True, True), (False, False)}
