"""The policy where cycles take unexpected times: noise, stalls, drafting that gets slower while AR does not, AR that
gets faster while drafting does not, requests that end within a cycle, batches that change with every cycle.
"""

import statistics

import pytest

from orthrus_rt.lane import REFRESH_CYCLES
from orthrus_rt.pass_costs import PassCosts
from orthrus_rt.policy import AR, Policy
from tests.policy_simulator import DEVICES, PLANS, cycle_seconds, expected_tokens, policy, run

RIDGE = {"flat": 256, "steep": 32}


class Stalls(Policy):
    """The first cycle that drafts takes ``stalled`` times as long."""

    stalled = 1.0

    def record(self, outcomes, seconds=None):
        if self._pending[0].plan != AR:
            seconds, self.stalled = self.stalled * seconds, 1.0
        super().record(outcomes, seconds)


@pytest.mark.parametrize("stalled", [3, 10, 1000])
@pytest.mark.parametrize("device", DEVICES)
def test_a_first_draft_that_stalls_ends_no_drafting(device, stalled):
    def seconds_per_token(seed):
        chooser = Stalls(PLANS, 64, PassCosts(RIDGE[device]))
        chooser.stalled = stalled
        how = dict(chooser=chooser, noise=0.02, seed=seed)
        return run(device, lambda cycle, i: (0.95, 1.0), 3000, **how).seconds_per_token

    best = min(cycle_seconds(device, 1, plan) / expected_tokens(plan, 0.95, 1.0) for plan in PLANS)
    mean = statistics.mean(map(seconds_per_token, range(4)))  # the acceptance of single seeds adds up to 4%
    assert mean <= 1.05 * best  # the account's grant covers a second look


@pytest.mark.parametrize("slower", [1.5, 2, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_first_times_of_ar_that_were_too_long_are_forgotten(device, slower):
    """As on a machine that was not quite ready: AR looks dear then, and drafts that all fail, worthwhile."""

    class Unready(Policy):
        recorded = 0

        def record(self, outcomes, seconds=None):
            self.recorded += 1
            super().record(outcomes, seconds * (slower if self.recorded <= REFRESH_CYCLES else 1))

    def over_ar(seed):
        chooser = Unready(PLANS, 64, PassCosts(RIDGE[device]))
        return run(device, lambda cycle, i: (0.0, 1.0), 420, chooser=chooser, noise=0.02, seed=seed).over_ar

    assert statistics.mean(map(over_ar, range(3))) <= 1.035  # 1.07 to 1.29 if AR is timed again only where it is cheap


@pytest.mark.parametrize(
    ("hazard", "slower", "begin", "length", "seed"),
    [(0.95, 2, 15, 12, 0), (0.95, 2, 15, 12, 5), (0.9, 3, 8, 20, 2), (0.9, 3, 8, 20, 4), (0.6, 3, 71, 4, 3)],
)
def test_a_disturbance_while_plans_are_first_timed_is_forgotten(hazard, slower, begin, length, seed):
    """Every cycle takes longer for a while, in which a plan is tried twice, or others' costs are guessed from it."""

    def cost(cycle, bucket, plan):
        return cycle_seconds("steep", bucket, plan) * (slower if begin <= cycle < begin + length else 1)

    how = dict(cost=cost, chooser=Policy(PLANS, 64, PassCosts(14)), noise=0.02, seed=seed)
    plans = run("steep", lambda cycle, i: (hazard, 1.0), 4000, **how).plans[1000:]
    seconds = sum(cycle_seconds("steep", 1, plan) for plan in plans)
    best = min(cycle_seconds("steep", 1, plan) / expected_tokens(plan, hazard, 1.0) for plan in PLANS)
    assert seconds / sum(expected_tokens(plan, hazard, 1.0) for plan in plans) <= 1.03 * best


@pytest.mark.parametrize("noise", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("device", DEVICES)
def test_noise_ends_no_drafting(device, noise):
    """600 cycles whose drafts are rejected, then text that drafts well."""
    chooser = policy(device, measured=False)
    got = run(device, lambda cycle, i: (0.9 if cycle >= 600 else 0.0, 1.0), 2500, chooser=chooser, noise=noise)
    assert sum(plan == AR for plan in got.plans[1500:]) < 500


@pytest.mark.parametrize(("device", "hazard"), [("steep", 0.65), ("steep", 0.8), ("flat", 0.5)])
def test_drafting_alone_gets_slower(device, hazard):
    """In every second stretch of 150 cycles. At first that may be the machine, which would slow AR down as well."""

    def cost(cycle, batch, plan):
        return cycle_seconds(device, batch, plan) * (3 if plan != AR and (cycle // 150) % 2 else 1)

    def over_ar(seed):
        how = dict(cost=cost, chooser=policy(device), noise=0.02, seed=seed)
        return run(device, lambda cycle, i: (hazard, 1.0), 2500, **how).over_ar

    assert statistics.mean(map(over_ar, range(4))) <= 1.03  # single seeds of many reach 1.10


@pytest.mark.parametrize("hazard", [0.7, 0.75])
def test_ar_alone_gets_faster(hazard):
    """As where memory suddenly is faster, but not arithmetic. Drafting is no longer the fastest then."""

    def cost(cycle, batch, plan):
        return cycle_seconds("steep", batch, plan) * (0.75 if plan == AR and cycle >= 100 else 1)

    def over_ar(seed):
        how = dict(cost=cost, chooser=policy("steep"), noise=0.02, seed=seed)
        return run("steep", lambda cycle, i: (hazard, 1.0), 420, batch=4, **how).over_ar

    assert statistics.mean(map(over_ar, range(12))) <= 1.025  # 1.036 with each if AR is timed again after 64 cycles


@pytest.mark.parametrize(("batch", "length", "hazard"), [(4, 4, 0.97), (1, 4, 0.9), (1, 8, 0.97), (4, 10, 0.97)])
def test_requests_of_a_few_tokens(batch, length, hazard):
    def rate(chooser):
        got = run("steep", lambda cycle, i: (hazard, 1.0), 3000, batch=batch, length=length, chooser=chooser)
        return got.seconds / got.tokens

    assert rate(policy("steep")) <= 1.1 * min(map(rate, PLANS))


@pytest.mark.parametrize("seed", (0, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 2))))
def test_batches_that_change_with_every_cycle(seed):
    chooser, sizes = policy("steep", measured=False), (1, 2, 4, 8, 16)
    got = run(
        "steep", lambda cycle, i: (0.0, 1.0), 3000, batch=lambda cycle: sizes[cycle % 5], chooser=chooser,
        noise=0.05, seed=seed,
    )  # fmt: skip
    assert got.over_ar <= 1.03
