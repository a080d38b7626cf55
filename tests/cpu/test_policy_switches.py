"""When another plan replaces the one in use: once it has promised to save SWITCH cycles. And when AR is timed again."""

import math

import pytest

from orthrus_rt.acceptance import Acceptance
from orthrus_rt.cycle_plan import AR, CyclePlan
from orthrus_rt.lane import (
    DEADBAND,
    DRIFT_REST,
    REFRESH_CYCLES,
    REFRESH_DRIFT,
    REFRESH_PRICE,
    REFRESH_REST,
    SWITCH,
    Lane,
)
from orthrus_rt.pass_costs import PassCosts

PLAN = CyclePlan("two_pass", 4)


@pytest.fixture
def lane():
    return Lane(1, [AR, PLAN], PassCosts(), Acceptance(3, ()))


def cycles_until(lane, wanted, rates, thinks_every=1):
    """Cycles that the plan in use runs until ``wanted`` replaces it."""
    ran = 0
    while lane.hold(rates) != wanted:
        for _ in range(thinks_every):
            lane.ran(lane.in_use)
        ran += thinks_every
        assert ran < 1000
    return ran


@pytest.mark.parametrize("saving", [0.05, 0.3])
def test_every_switch_is_earned_anew(lane, saving):
    assert lane.hold({AR: 1.0, PLAN: 2.0}) == AR
    due = SWITCH / (saving - DEADBAND)
    for wanted, rates in 3 * [(PLAN, {AR: 1.0, PLAN: 1 - saving}), (AR, {AR: 1 - saving, PLAN: 1.0})]:
        assert due <= cycles_until(lane, wanted, rates) <= due + 1
    assert due <= cycles_until(lane, PLAN, {AR: 1.0, PLAN: 1 - saving}, thinks_every=8) <= due + 8


def test_savings_within_the_deadband_are_none(lane):
    assert lane.hold({AR: 1.0, PLAN: 2.0}) == AR
    for _ in range(1000):
        lane.ran(AR)
        assert lane.hold({AR: 1.0, PLAN: 1 - 0.9 * DEADBAND}) == AR


def test_a_promise_that_does_not_last_is_forgotten(lane):
    rates = {AR: 1.0, PLAN: 0.5}
    assert lane.hold({AR: 1.0, PLAN: 2.0}) == AR
    due = cycles_until(lane, PLAN, rates)
    assert cycles_until(lane, AR, {AR: 0.5, PLAN: 1.0}) == due > 1
    for _ in range(20):
        for _ in range(due - 1):
            lane.ran(AR)
            assert lane.hold(rates) == AR
        for _ in range(round(SWITCH / DEADBAND)):
            lane.ran(AR)
            assert lane.hold({AR: 1.0, PLAN: 2.0}) == AR
    for _ in range(1000):
        lane.ran(AR)
        assert lane.hold({AR: 1.0, PLAN: 2.0}) == AR
    assert cycles_until(lane, PLAN, rates) == due  # nor is it owed anything


def test_how_long_until_the_plan_in_use_is_replaced(lane):
    rates = {AR: 1.0, PLAN: 0.9}
    assert lane.hold({AR: 1.0, PLAN: 2.0}) == AR
    assert lane.until_switch({AR: 1.0, PLAN: 1.0}) == math.inf
    wait = lane.until_switch(rates)
    assert wait == pytest.approx(SWITCH / (0.1 - DEADBAND))
    for _ in range(5):
        lane.ran(AR)
    assert lane.hold(rates) == AR and lane.until_switch(rates) == pytest.approx(wait - 5)
    assert wait <= 5 + cycles_until(lane, PLAN, rates) <= wait + 1


@pytest.mark.parametrize(
    ("drift", "rate", "cycles"),
    [
        (0.0, 0.999, REFRESH_REST),
        (0.0, 0.9, math.ceil(REFRESH_CYCLES * 0.1 / (REFRESH_PRICE * 1.8))),
        (REFRESH_DRIFT - 0.01, 0.999, REFRESH_REST),
        (REFRESH_DRIFT + 0.01, 0.1, DRIFT_REST),
    ],
)
def test_when_ar_is_timed_again(lane, monkeypatch, drift, rate, cycles):
    """As soon as it is cheap, or at any price if the machine's speed may have changed. ``rate`` is relative to AR's."""
    monkeypatch.setattr(lane.costs, "drift", lambda *_: drift)
    lane.costs.set(1, AR, 1.0)
    lane.costs.set(1, PLAN, 1.8)
    assert lane.hold({AR: 1.0, PLAN: rate}) == PLAN
    for plan in [AR] + [PLAN] * (cycles - 1):
        lane.ran(plan)
        assert not lane.cycles_to_time_ar(rate)
    lane.ran(PLAN)
    assert lane.cycles_to_time_ar(rate) == REFRESH_CYCLES


def test_a_cost_of_ar_that_was_measured_briefly_is_checked_at_any_price(lane):
    for _ in range(3):
        lane.costs.observe(1, AR, 2.0)
        lane.ran(AR)
    lane.hold({AR: 2.0, PLAN: 0.2})
    for _ in range(REFRESH_REST):
        assert not lane.cycles_to_time_ar(0.2)
        lane.costs.observe(1, PLAN, 1.8)
        lane.ran(PLAN)
    assert lane.cycles_to_time_ar(0.2) == 1
    lane.costs.observe(1, AR, 1.0)
    lane.ran(AR)
    assert lane.seconds(AR) == pytest.approx(1.0)
