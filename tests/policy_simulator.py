"""A decoder without a model: cost models and seeded acceptance processes for the policy's tests.

Time is in seconds. The truth is drawn once per run from named random streams, so that a plan has the same luck
whatever chooses it.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from orthrus_rt.acceptance import Outcome
from orthrus_rt.cycle_plan import AR, CyclePlan, batch_bucket, batch_buckets
from orthrus_rt.lane import REFRESH_CYCLES
from orthrus_rt.pass_costs import PassCosts
from orthrus_rt.policy import SAFETY, Policy, candidate_plans

PLANS = candidate_plans(16)
PROMISE = 1.03  # at most this many times plain AR's time, overall
HORIZON = 4000  # cycles within which a stationary case comes within 5% of the best fixed plan
DEVICES = ("flat", "steep")  # the costs of a GPU, of a CPU
CPU_MS = {1: 10.3, 4: 11.0, 6: 11.6, 8: 11.7, 16: 14.4, 32: 26.1}  # measured: the embedded model, two cores
# What the one_pass drafts follow, and the hazards of the first and second draft relative to two_pass: the true bonus
# token, an unseen one, or a rejected draft (the drafts after it are kept). The shares are by fan_out. With this fit
# they yield what the embedded model does on code and chat.
KINDS = {"known": (1.0, 1.0), "unseen": (0.7, 0.85), "kept": (0.2, 0.5)}
KEPT, KNOWN = {1: 0.42, 2: 0.25, 4: 0.14, 8: 0.08}, {1: 0.03, 2: 0.08, 4: 0.15, 8: 0.28}
ONE_PASS_BYTES = 1.2  # both views' attention weights, relative to one view's


def steep_pass(rows: int) -> float:
    """CPU-like: measured up to 32 rows, linear beyond."""
    sizes = list(CPU_MS)
    if rows > sizes[-1]:
        slope = (CPU_MS[32] - CPU_MS[16]) / 16
        return (CPU_MS[32] + slope * (rows - 32)) * 1e-3
    return float(np.interp(rows, sizes, list(CPU_MS.values()))) * 1e-3


def flat_pass(rows: int) -> float:
    """GPU-like: bound by weight reads, 0.5% dearer per 8 rows, up to a ridge of 295 rows; by arithmetic beyond it."""
    return 5e-3 * max(1 + 0.005 * rows / 8, rows / 295)


PASS_MODELS = {"steep": steep_pass, "flat": flat_pass}


@functools.cache
def cycle_seconds(device: str, bucket: int, plan: CyclePlan) -> float:
    """Seconds of a cycle of ``bucket`` slots on a ``flat`` or ``steep`` device."""
    views = ONE_PASS_BYTES if plan.mode == "one_pass" and device == "flat" else 1.0
    return views * plan.num_passes * PASS_MODELS[device](bucket * plan.max_rows)


@dataclass
class Sequence:
    """One sequence's drafter: hazard ``h * decay**i`` for draft i+1, and the drafts that one_pass left it with."""

    rng: random.Random
    hazard: float
    decay: float = 1.0
    drafted_by: CyclePlan | None = None  # one_pass: the plan that left drafts waiting, if any
    offered: int = 0  # the number of those drafts
    kind: str = "known"  # one of KINDS
    produced: int = 0  # tokens of the current request so far

    def cycle(self, plan: CyclePlan) -> Outcome:
        drafts = plan.block_len - 1
        if plan.mode != "one_pass":
            self.forget()
            return Outcome(drafts if plan.mode == "two_pass" else 0, self._accept(drafts, "known"))
        self.offered = min(self.offered, drafts)
        verified, accepted = self.offered, self._accept(self.offered, self.kind)
        luck = self.rng.random()
        self.kind = "kept" if luck < KEPT[plan.fan_out] else "known" if luck >= 1 - KNOWN[plan.fan_out] else "unseen"
        self.offered = max(0, verified - accepted - 1) if self.kind == "kept" else drafts
        self.drafted_by = plan
        return Outcome(verified, accepted)

    def within(self, length: int, out: Outcome) -> Outcome:
        """The same outcome for a request of ``length`` tokens, which ends there; the next request begins after it."""
        fresh, room = self.produced == 0, length - self.produced
        out = Outcome(out.num_verified, min(out.num_accepted, room), out.num_accepted >= room, fresh)
        self.produced += out.num_tokens
        if self.produced >= length:
            self.produced = 0
            self.forget()
        return out

    def forget(self) -> None:
        """Drops the drafts that wait."""
        self.drafted_by, self.offered = None, 0

    def prospect(self, plan: CyclePlan) -> float:
        """Tokens that a cycle is expected to yield, without luck: past and future draws are left out."""
        drafting = plan if plan.mode != "one_pass" else self.drafted_by or AR
        if drafting.block_len > plan.block_len:
            drafting = drafting._replace(block_len=plan.block_len)
        return expected_tokens(drafting, self.hazard, self.decay)

    def _accept(self, drafts: int, kind: str) -> int:
        random, hazard, decay, known = self.rng.random, self.hazard, self.decay, KINDS[kind]
        for i in range(drafts):  # hazard_at(), without the call
            if random() >= hazard * decay**i * (known[i] if i < 2 else 1.0):
                return i
        return drafts


def hazard_at(i: int, kind: str, hazard: float, decay: float) -> float:
    """Chance that the draft at 0-based position ``i`` is accepted, given that all before it were."""
    return hazard * decay**i * (KINDS[kind][i] if i < 2 else 1.0)


@functools.cache
def expected_tokens(plan: CyclePlan, hazard: float, decay: float) -> float:
    """Tokens per cycle of a :class:`Sequence` in the long run."""

    def accepted(drafts: int, kind: str) -> list[float]:
        """The probability of each number of accepted drafts."""
        alive = [1.0]
        for i in range(drafts):
            alive.append(alive[-1] * hazard_at(i, kind, hazard, decay))
        return [a - b for a, b in zip(alive, [*alive[1:], 0.0], strict=True)]

    drafts = plan.block_len - 1
    if plan.mode != "one_pass":
        return 1 + mean(accepted(drafts, "known"))
    kept, known = KEPT[plan.fan_out], KNOWN[plan.fan_out]
    fresh = {("known", drafts): known, ("unseen", drafts): 1 - kept - known}
    share = fresh | {("kept", 0): kept}
    for _ in range(64):  # the shares converge, as kept drafts become fewer every time
        left = fresh.copy()
        for (kind, offered), weight in share.items():
            for count, chance in enumerate(accepted(offered, kind)):
                to = "kept", max(0, offered - count - 1)
                left[to] = left.get(to, 0.0) + kept * weight * chance
        share = left
    return 1 + sum(weight * mean(accepted(offered, kind)) for (kind, offered), weight in share.items())


def mean(chances: list[float]) -> float:
    """The mean of a count with these chances of being 0, 1, ..."""
    return sum(count * chance for count, chance in enumerate(chances))


@dataclass
class Run:
    """What a run cost, and what plain AR would have needed for the same tokens."""

    seconds: float = 0.0
    ar_seconds: float = 0.0
    tokens: int = 0
    prospects: float = 0.0  # tokens without luck
    plans: list[CyclePlan] = field(default_factory=list)
    worst_stretch: float = 0.0  # the most that any stretch of cycles lost beyond 3% over AR, in AR cycles
    most_behind: float = -math.inf  # the most seconds beyond 1 + SAFETY times AR's at any moment

    @property
    def switches(self) -> int:
        """Changes of plan, without visits to AR to time it."""
        stays = ((plan, len([*cycles])) for plan, cycles in itertools.groupby(self.plans))
        kept = [plan for plan, length in stays if (plan, length) != (AR, REFRESH_CYCLES)]
        return sum(a != b for a, b in itertools.pairwise(kept))

    @property
    def over_ar(self) -> float:
        return self.seconds / self.ar_seconds

    @property
    def seconds_per_token(self) -> float:
        """Without luck: what the choice of plans is responsible for."""
        return self.seconds / self.prospects


def simulate(
    policy_or_plan, seq_of, cost, cycles: int, *, batch=1, lag: int = 0, noise: float = 0.0, seed=0, length: int = 0
) -> Run:
    """Run ``cycles`` cycles of a policy, or of one fixed plan.

    Args:
        policy_or_plan: a Policy or a CyclePlan.
        seq_of: ``f(cycle, i) -> (hazard, decay)`` of the i-th running sequence.
        cost: ``f(cycle, bucket, plan) -> seconds``, the truth.
        batch: sequences running, or ``f(cycle)``.
        lag: number of cycles by which results reach the policy late.
        length: tokens of a request, after which another replaces it; 0 for no end.
        noise: relative standard deviation of measured times; one in 50 takes five times as long.
    """
    fixed = policy_or_plan if isinstance(policy_or_plan, CyclePlan) else None
    policy: Policy | None = None if fixed else policy_or_plan
    largest = 64 if fixed else policy.max_batch_size
    luck, sequences, late, run, loss = random.Random(seed), [], [], Run(), 0.0
    for cycle in range(cycles):
        size = batch(cycle) if callable(batch) else batch
        while len(sequences) < size:
            sequences.append(Sequence(random.Random(1000 * (1 + seed) + len(sequences)), 0.0))
        bucket = batch_bucket(size, largest)
        plan = fixed or policy.choose(size)
        outcomes = []
        for i in range(size):
            sequences[i].hazard, sequences[i].decay = seq_of(cycle, i)
            run.prospects += sequences[i].prospect(plan)
            out = sequences[i].cycle(plan)
            outcomes.append(sequences[i].within(length, out) if length else out)
        for waiting in sequences[size:]:
            waiting.forget()
        seconds, ar = cost(cycle, bucket, plan), cost(cycle, bucket, AR)
        tokens = sum(out.num_tokens for out in outcomes)
        measured = seconds
        if noise:
            measured = seconds * max(0.5, 1 + luck.gauss(0, noise)) * (5 if luck.random() < 0.02 else 1)
        late.append((outcomes, measured))
        if policy and len(late) > lag:
            policy.record(*late.pop(0))
        run.plans.append(plan)
        run.seconds += seconds
        run.ar_seconds += ar * tokens / size
        run.tokens += tokens
        loss = max(0.0, loss + (seconds - 1.03 * ar * tokens / size) / ar)
        run.worst_stretch = max(run.worst_stretch, loss)
        run.most_behind = max(run.most_behind, run.seconds - (1 + SAFETY) * run.ar_seconds)
    return run


def cost_table(device: str, plans: list[CyclePlan], max_batch_size: int) -> PassCosts:
    """The costs of every candidate in every bucket, measured without error."""
    costs = PassCosts()
    for bucket in batch_buckets(max_batch_size):
        for plan in plans:
            costs.set(bucket, plan, cycle_seconds(device, bucket, plan))
    return costs


def policy(device: str, measured: bool = True) -> Policy:
    ridge = {"flat": 256, "steep": 32}[device]
    return Policy(PLANS, 64, cost_table(device, PLANS, 64) if measured else PassCosts(ridge))


def by_turns(*axes):
    """Parameters of every combination of axes, of which all but the first have two values. Every other one is ``full``:
    those left have each value of the first axis with each of the second, or of the third where there are three.
    """
    cases = itertools.product(*(enumerate(axis) for axis in axes))
    turns = ((sum(i for i, _ in case), [value for _, value in case]) for case in cases)
    return [pytest.param(*values, marks=pytest.mark.full if turn % 2 else ()) for turn, values in turns]


def run(device, seq_of, cycles=HORIZON, *, cost=None, chooser=None, **how):
    truth = cost or (lambda cycle, bucket, plan: cycle_seconds(device, bucket, plan))
    return simulate(chooser or policy(device), seq_of, truth, cycles, **how)
