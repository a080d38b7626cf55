"""How many tokens a cycle yields: running estimates of draft acceptance, for every plan at once.

A *hazard* ``h_i`` is the chance that draft ``i`` is accepted once drafts 1 ... i-1 were (Kaplan and Meier's product
estimator: a cycle that accepted all ``m`` of its drafts says nothing of position m+1). Hazards belong to the text and
are forgotten fast. two_pass has its own, and so has one_pass for every ``fan_out``, which determines how often drafts
follow the true bonus token, an unseen one or a rejected draft, or are missing (which counts as rejected).

The relation between hazards belongs to the model and is forgotten slowly. *Quality* is the ratio of a fan_out's hazards
to two_pass's, at the first, the second and later positions. It is the product of a *level*, which all fan_outs share,
and a *shape*, which distinguishes them. Both are Mantel-Haenszel ratios, over positions and over what both sides saw of
the same text: the level compares all fan_outs with two_pass, the shape each fan_out with the others. Through them, what
one plan has learnt of the text serves the other plans.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from orthrus_rt.cycle_plan import AR, CyclePlan

MEMORY = 128  # drafting cycles that a hazard remembers
IDLE_MEMORY = 1024  # cycles after which hazards fade if nothing is drafted for them
SLOW_MEMORY = 4096  # drafting cycles that quality remembers
PRIOR_HAZARD, PRIOR_TRIALS = 0.7, 4.0  # of the first draft
CHAIN_TRIALS = 8.0  # weight of the preceding position as a later position's prior
# By fan_out, for the first, the second and later drafts; measured with the embedded model on code and chat prompts.
PRIOR_QUALITY = {
    1: (0.53, 0.78, 0.97), 2: (0.60, 0.80, 0.97), 4: (0.67, 0.87, 0.97), 8: (0.73, 0.90, 0.97),
    12: (0.75, 0.91, 0.97),
}  # fmt: skip
LEVEL_TRIALS, SHAPE_TRIALS = 32.0, 256.0  # weights of the priors
PRIOR_LENGTH = 128.0  # tokens of a sequence, until more are known
EXACT = 32  # tokens; a sequence's cycles are counted exactly up to here
TINY = 1e-9  # as many trials count as none


def ignoring_underflow(method):
    """Let decayed counts underflow to 0, even in a program that has NumPy raise on underflow."""

    @functools.wraps(method)
    def run(*args, **kwargs):
        with np.errstate(under="ignore"):
            return method(*args, **kwargs)

    return run


class Outcome(NamedTuple):
    """What became of one sequence's drafts in a cycle."""

    num_verified: int
    num_accepted: int
    cut: bool = False  # the sequence ended with the last accepted draft: none was rejected, and no bonus token follows
    fresh: bool = False  # its first cycle: one_pass had no drafts for it yet

    @property
    def num_tokens(self) -> int:
        """Tokens that the cycle yielded, at least one."""
        return max(1, 1 + self.num_accepted - self.cut)


class Ratio:
    """Hits over expected hits, by position group, starting from a prior with the weight of ``trials``."""

    def __init__(self, prior: np.ndarray, trials: float):
        self._prior, self._trials = prior, trials
        self._hits, self._expected = np.zeros_like(prior), np.zeros_like(prior)

    def observe(self, hits: np.ndarray, expected: np.ndarray, cycles: int) -> None:
        for counts, new in ((self._hits, hits), (self._expected, expected)):
            counts *= (1 - 1 / SLOW_MEMORY) ** cycles
            counts += new

    def estimate(self) -> tuple[np.ndarray, np.ndarray]:
        """``(ratio, doubt)``; doubt is the variance in units of one trial's variance."""
        trials = self._trials + self._expected
        return (self._trials * self._prior + self._hits) / trials, 1 / trials


class Acceptance:
    """Acceptance estimates for cycles of at most ``max_drafts`` drafts, with exponential forgetting.

    Args:
        fan_outs: of the one_pass plans that may run.
    """

    def __init__(self, max_drafts: int, fan_outs: Iterable[int]):
        self.max_drafts, self.fan_outs = max_drafts, [0, *sorted({*fan_outs} - {0})]  # rows; row 0 is two_pass
        shape = len(self.fan_outs), max_drafts
        self._hits, self._trials = np.zeros(shape), np.zeros(shape)  # drafts accepted, drafts tried
        self._group = np.minimum(np.arange(max_drafts), 2)  # group of each position: first, second, later
        self._in_group = np.eye(3)[self._group]
        self._others = 1.0 - np.eye(shape[0] - 1)
        prior = np.array([prior_quality(f) for f in self.fan_outs[1:]]).reshape(-1, 3)
        self._level, self._shape = Ratio(np.ones(3), LEVEL_TRIALS), Ratio(prior, SHAPE_TRIALS)
        self._begun, self._tokens = 0.0, PRIOR_LENGTH  # sequences, and tokens of all of them

    @ignoring_underflow
    def observe(self, plan: CyclePlan, cycles: list[list[Outcome]]) -> None:
        """Learn from consecutive cycles of ``plan``; ``cycles`` has the outcomes of each cycle's sequences, at least
        one.
        """
        outcomes = [out for outs in cycles for out in outs]
        idle = (1 - 1 / IDLE_MEMORY) ** len(cycles)
        self._begun = idle * (self._begun + sum(out.fresh for out in outcomes))
        self._tokens = idle * (self._tokens + sum(out.num_tokens for out in outcomes))
        if plan == AR:
            self._hits *= idle
            self._trials *= idle
            return
        verified, accepted, cut, fresh = np.array(outcomes, dtype=int).T
        drafts = verified if plan.mode == "two_pass" else np.where(fresh, 0, plan.block_len - 1)
        hits, trials = (self._by_position(np.minimum(n, drafts)) for n in (accepted, accepted + 1 - cut))
        renewed = trials / (MEMORY * len(accepted) / len(cycles))  # rarely reached positions remember longer
        row = self.fan_outs.index(plan.fan_out)
        for counts, new in ((self._hits, hits), (self._trials, trials)):
            counts *= idle * (1 - renewed)
            counts[row] += new
        self._compare(renewed, len(cycles))

    def _by_position(self, drafts: np.ndarray) -> np.ndarray:
        """For every position i, how many of ``drafts`` are greater than i."""
        return len(drafts) - np.bincount(drafts, minlength=self.max_drafts).cumsum()[: self.max_drafts]

    def _compare(self, renewed: np.ndarray, cycles: int) -> None:
        """Update level and shape from the share of the counts that is new."""
        shape = self._shape.estimate()[0][:, self._group]
        hits, trials = self._hits[1:], self._trials[1:]
        like_level = trials * shape  # trials normalised for shape, so that hits = level * these

        def compare(ratio: Ratio, hits, trials, base_hits, base_trials) -> None:
            share = renewed / np.maximum(trials + base_trials, TINY)
            got, expected = share * hits * base_trials, share * base_hits * trials
            ratio.observe(product(got, self._in_group), product(expected, self._in_group), cycles)

        compare(self._shape, hits, trials, product(self._others, hits), product(self._others, like_level))
        compare(self._level, hits.sum(0), like_level.sum(0), self._hits[0], self._trials[0])

    @ignoring_underflow
    def accepted(self, optimism: float = 0.0, running: CyclePlan = AR) -> dict[int, list[float]]:
        """By fan_out: the expected accepted drafts if 0 ... max_drafts are offered. Arguments: see :meth:`tokens`."""
        (level, level_doubt), (shape, shape_doubt) = (
            tuple(x[..., self._group] for x in ratio.estimate()) for ratio in (self._level, self._shape)
        )
        quality = np.concatenate([np.ones((1, self.max_drafts)), np.minimum(1.0, level * shape)])
        hope = np.ones_like(quality)
        if optimism:
            hope += optimism * self._error(quality, level_doubt, shape_doubt, running)
        own_hits, own_trials = self._hits[1:], self._trials[1:]

        def worth(trials, doubt):  # of a row's own trials; variances add up
            return trials / (1 + trials * doubt)

        # Trials that each one_pass row contributes to a fan_out of shape 1, discounted by the doubt of the row's shape.
        # The common level cancels.
        told = worth(own_trials, shape_doubt)
        told_hits = told * own_hits / np.maximum(own_trials * shape, TINY)
        two = worth(self._trials[0], level_doubt)
        two_hits = two * level * self._hits[0] / np.maximum(self._trials[0], TINY)
        others, others_hits = product(self._others, told), product(self._others, told_hits)
        heard = np.concatenate([[told.sum(0)], others + two])
        heard_hits = np.concatenate([[told_hits.sum(0) / level], (others_hits + two_hits) * shape])
        borrowed = worth(heard, np.concatenate([[level_doubt], shape_doubt]))
        rate = np.minimum(1.0, hope * heard_hits / np.maximum(heard, TINY))
        hits = (self._hits + borrowed * rate).tolist()
        trials = (self._trials + borrowed).tolist()
        quality = np.minimum(1.0, hope * quality)
        step = (quality[:, 1:] / quality[:, :-1]).tolist()
        first = (PRIOR_HAZARD * quality[:, 0]).tolist()
        rows = zip(self.fan_outs, hits, trials, first, step, strict=True)
        return {f: self._chain(*row, optimism, running.block_len - 1) for f, *row in rows}

    def _error(self, quality, level_doubt, shape_doubt, running: CyclePlan) -> np.ndarray:
        """Relative standard error of each row's hazards with respect to the running plan's."""
        of, odds, error = self.fan_outs.index(running.fan_out), 1 / quality[1:] - 1, np.zeros_like(quality)
        error[1:] = np.sqrt(odds * (shape_doubt + level_doubt))
        error[0] = error[of or -1]  # two_pass's quality is certain; what sets the two apart is one_pass's
        if running.mode == "one_pass":  # the level sets two_pass apart from it, but not the other fan_outs
            error[1:] = np.sqrt(odds * (shape_doubt + shape_doubt[of - 1]))
        if running.mode != "ar":
            error[of] = 0.0
        return error

    @staticmethod
    def _chain(hits, trials, prior: float, step, optimism: float, seen: int) -> list[float]:
        """Running sums of survival; positions from ``seen`` on are estimated with optimism."""
        weight, totals, survival = PRIOR_TRIALS, [0.0], 1.0
        for i, (hit, tried, ratio) in enumerate(zip(hits, trials, [*step, 1.0], strict=True)):
            certain = weight + tried
            hazard = (weight * prior + hit) / certain
            hoped = hazard = hazard if hazard < 1.0 else 1.0
            if optimism and i >= seen:
                hoped = hazard + optimism * math.sqrt(hazard * (1 - hazard) / certain)
            survival *= hoped if hoped < 1.0 else 1.0
            totals.append(totals[-1] + survival)
            prior, weight = hazard * ratio, CHAIN_TRIALS
            prior = prior if prior < 1.0 else 1.0
        return totals

    def tokens(self, plans: list[CyclePlan], optimism: float = 0.0, running: CyclePlan = AR) -> dict[CyclePlan, float]:
        """Expected tokens of one sequence's cycle: the accepted drafts and the token that verification itself yields.

        A sequence's first one_pass cycle yields that token alone, and the last cycle of any plan no more than is left.
        ``optimism`` raises estimates by that many standard errors, but only those that set a plan apart from the
        ``running`` one, as an error in what both depend on favours neither.
        """
        accepted, length = self.accepted(optimism, running), max(1.0, self._tokens / max(self._begun, TINY))
        squares = {f: _squares(row) for f, row in accepted.items()}
        return {
            p: length
            / _cycles(accepted[p.fan_out], squares[p.fan_out], p.block_len, length, fills=p.mode == "one_pass")
            for p in plans
        }


def _squares(accepted: list[float]) -> list[float]:
    """E[tokens^2] - 1 of a cycle with 0, 1, ... drafts offered."""
    totals, total = [0.0], 0.0
    for i in range(1, len(accepted)):
        total += (2 * i + 1) * (accepted[i] - accepted[i - 1])
        totals.append(total)
    return totals


def _cycles(accepted: list[float], squares: list[float], block: int, length: float, fills: bool) -> float:
    """Expected cycles of a sequence of ``length`` tokens in blocks of ``block``. ``accepted`` and ``squares`` are for
    0, 1, 2 ... offered drafts, at least as many as a block has. ``fills``: the sequence's first cycle yields one token.

    Exact for sequences of up to EXACT tokens that two cycles may yield; otherwise by renewal theory's overshoot.
    """
    mean, left = 1.0 + accepted[block - 1], length - fills
    if left > min(2 * block, EXACT):
        return fills + (left + ((1.0 + squares[block - 1]) / mean - 1.0) / 2) / mean
    at_least = np.diff(accepted[:block], prepend=-1.0)  # chance that a cycle yields at least 1, 2, ... tokens
    chance = (at_least - np.append(at_least[1:], 0.0))[::-1]
    cycles = np.zeros(block + math.ceil(left) + 1)  # by tokens, after as many zeros as a cycle may yield tokens
    for n in range(block, len(cycles)):
        cycles[n] = 1.0 + chance @ cycles[n - block : n]
    return fills + float(np.interp(left + block - 1, np.arange(len(cycles)), cycles))


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a @ b`` without the BLAS, which aborts the process if there is no memory for its buffer."""
    return np.einsum("...j,jk->...k", a, b)


def prior_quality(fan_out: int) -> tuple[float, ...]:
    """``PRIOR_QUALITY`` of the largest listed fan_out that is no larger than ``fan_out``."""
    return PRIOR_QUALITY[max(f for f in PRIOR_QUALITY if f <= fan_out)]
