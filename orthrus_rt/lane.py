"""What ``mode="auto"`` keeps of each batch bucket, greedy or sampling, and of each course; the rule is in policy.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from orthrus_rt.acceptance import Acceptance, Outcome
from orthrus_rt.cycle_plan import AR, CyclePlan
from orthrus_rt.pass_costs import PassCosts

SAFETY = 0.01  # of AR's time that may be lost against AR
SWITCH = 1.0  # cycles of savings before the plan in use changes
DEADBAND = 0.01  # relative savings below this do not count
REFRESH_REST, REFRESH_CYCLES = 16, 3  # cycles without AR before AR is timed again, and for how many cycles
DRIFT_REST = 8  # the same if the machine's speed seems to have changed: it may be the plan in use alone
# Share of all time that may be lost on timing AR: where AR is close that is cheap, and AR may win. In any case AR is
# timed within the time of 1,200 AR cycles.
REFRESH_PRICE = 0.0025
REFRESH_DRIFT = 0.25  # drift (see PassCosts) beyond which AR is timed at any price


class Account:
    """Seconds of credit up to a cap; negative if overdrawn."""

    def __init__(self):
        self.balance = 0.0

    def add(self, seconds: float, cap: float) -> None:
        self.balance = min(cap, self.balance + seconds)


class Lane:
    """Cycles of one batch bucket, greedy or sampling: the plans, their costs and yields, and the one in use."""

    def __init__(self, bucket: int, plans: list[CyclePlan], costs: PassCosts, acceptance: Acceptance):
        self.bucket, self.plans, self.costs, self.acceptance = bucket, plans, costs, acceptance
        self.in_use: CyclePlan | None = None
        self.since_ar = math.inf  # cycles; inf: AR's true cost here is not known
        self._savings = 0.0  # cycles
        self._since_look = 0  # cycles
        self.trial: CyclePlan | None = None  # in progress, also while other lanes run
        self.trial_left = 0  # cycles to go

    def seconds(self, plan: CyclePlan, hopeful: bool = False) -> float:
        """Expected seconds per cycle."""
        return self.costs.seconds(self.bucket, plan, hopeful)

    def guesses(self, plan: CyclePlan) -> bool:
        """Whether its cost is not measured, or not confirmed by a second cycle yet."""
        return (self.bucket, plan) not in self.costs or self.costs.measured_once(self.bucket, plan)

    def worst_loss(self, plan: CyclePlan) -> float:
        """Seconds that a cycle costs the safety account if no draft is accepted."""
        return self.seconds(plan) - (1 + SAFETY) * self.seconds(AR)

    def cycles_to_time_ar(self, rate: float) -> int:
        """How many AR cycles to time now; ``rate``: seconds per token of the plan in use."""
        drifted = self.costs.drift(self.bucket, AR) > REFRESH_DRIFT
        if self.since_ar < (DRIFT_REST if drifted else REFRESH_REST):
            return 0
        if (self.bucket, AR) in self.costs and self.costs.measured_briefly(self.bucket, AR):
            return 1  # all other costs are guessed from it at first
        lost = REFRESH_CYCLES * (self.seconds(AR) - rate)
        cheap = lost <= REFRESH_PRICE * self.since_ar * self.seconds(self.in_use)
        return REFRESH_CYCLES if drifted or cheap else 0

    def ran(self, plan: CyclePlan) -> None:
        """Count a launched cycle of ``plan``."""
        self.since_ar = 0 if plan == AR else self.since_ar + 1
        self._since_look += 1

    def hold(self, rates: dict[CyclePlan, float]) -> CyclePlan:
        """The plan in use, replaced first if another has promised enough savings for long enough."""
        best = min(self.plans, key=rates.get)
        self.in_use = self.in_use or best
        self._savings = max(0.0, self._savings + self._since_look * self._saving(rates))
        self._since_look = 0
        if self._savings >= SWITCH:
            self.in_use, self._savings = best, 0.0
        return self.in_use

    def _saving(self, rates: dict[CyclePlan, float]) -> float:
        """What the best plan would save in a cycle, in cycles of the one in use."""
        return 1 - min(rates[plan] for plan in self.plans) / rates[self.in_use] - DEADBAND

    def until_switch(self, rates: dict[CyclePlan, float]) -> float:
        """Cycles until :meth:`hold` replaces the plan in use, as far as these rates say."""
        saving = self._saving(rates)
        return (SWITCH - self._savings) / saving if saving > 0 else math.inf


@dataclass(eq=False, slots=True)
class Course:
    """Cycles of one plan, which are chosen together, and those of their results that have not been weighed."""

    lane: Lane
    plan: CyclePlan
    left: int  # cycles to go
    reserved: float  # seconds that each cycle may cost the safety account
    trial: bool
    against: float | None  # of a trial: seconds per token of the plan in use, once any cost is known
    fills: bool  # the next result to weigh is of a one_pass without drafts in its pipeline
    alone: bool  # cycles should run by themselves to be timed
    outcomes: list[list[Outcome]] = field(default_factory=list)  # of each cycle
    seconds: list[float] = field(default_factory=list)  # of the timed cycles
