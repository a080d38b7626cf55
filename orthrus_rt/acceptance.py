"""How many tokens a cycle yields: running estimates of draft acceptance, for every plan at once.

A *hazard* ``h_i`` is the chance that draft ``i`` is accepted once drafts 1 ... i-1 were (Kaplan and Meier's product
estimator: a cycle that accepted all ``m`` of its drafts says nothing of position m+1). Hazards belong to the text and
are forgotten fast. two_pass has its own, and so has one_pass with every ``fan_out``: on it depends whether drafts stand
behind the true bonus token, behind one unseen, or behind a rejected draft, or are missing, which counts as rejected.

*Quality* relates them: the hazards of a fan_out over those of two_pass, at the first, the second and later positions
(Mantel and Haenszel's ratio, over positions and over what all saw of the same text). It belongs to the model and is
forgotten slowly. Through it, what was learnt of the text with one plan serves the others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np

from orthrus_rt.cycle_plan import AR, CyclePlan

MEMORY = 128  # drafting cycles that a hazard looks back on
IDLE_MEMORY = 1024  # cycles after which hazards that nothing is drafted for fade
SLOW_MEMORY = 4096  # drafting cycles that quality looks back on
FADE_EVERY = 16  # cycles without drafts: estimates that hardly change are not worth computing for each
PRIOR_HAZARD, PRIOR_TRIALS = 0.7, 4.0  # of the first draft
CHAIN_TRIALS = 8.0  # weight of the position before as a later position's prior
# Of the first, the second and later drafts by fan_out: the embedded model on its code and chat prompts.
PRIOR_QUALITY = {
    0: (1.0, 1.0, 1.0), 1: (0.53, 0.78, 0.97), 2: (0.60, 0.80, 0.97), 4: (0.67, 0.87, 0.97), 8: (0.73, 0.90, 0.97),
    12: (0.75, 0.91, 0.97),
}  # fmt: skip
LEVEL_TRIALS, SHAPE_TRIALS = 64.0, 256.0  # that the priors are worth: of what fan_outs share, of what sets each apart
TINY = 1e-9  # of trials: none

Outcome = tuple[int, int]  # (num_verified, num_accepted) of one sequence's cycle


class Acceptance:
    """Acceptance estimates for cycles of at most ``max_drafts`` drafts, forgetting exponentially.

    Args:
        fan_outs: of the plans to come; 0 stands for two_pass. Arrays have a row of each, and a column per position.
    """

    def __init__(self, max_drafts: int, fan_outs: Iterable[int] = ()):
        self.max_drafts, self.fan_outs = max_drafts, sorted({0, *fan_outs})
        shape = len(self.fan_outs), max_drafts
        self._hits, self._trials = np.zeros(shape), np.zeros(shape)  # drafts accepted, drafts tried
        self._prior = np.array([prior_quality(f) for f in self.fan_outs])
        self._quality_hits = np.zeros_like(self._prior)
        self._quality_expected = np.zeros_like(self._prior)  # hits that two_pass would have had
        self._group = np.minimum(np.arange(max_drafts), 2)  # of the positions: first, second, later
        self._in_group = np.eye(3)[self._group]
        self._others = 1.0 - np.eye(len(self.fan_outs))
        self._unfaded = 0  # cycles whose fading is still due
        self._known: dict[tuple, dict[CyclePlan, float]] = {}  # answers of tokens() since the counts changed

    def observe(self, plan: CyclePlan, outcomes: list[Outcome]) -> None:
        """One cycle of every sequence under ``plan``."""
        self._unfaded += 1
        if plan.mode == "ar" and self._unfaded < FADE_EVERY:
            return
        self._known.clear()
        idle = (1 - 1 / IDLE_MEMORY) ** self._unfaded
        self._unfaded = 0
        hits, trials = np.zeros(self.max_drafts), np.zeros(self.max_drafts)
        if plan.mode != "ar":
            for verified, accepted in outcomes:
                drafts = verified if plan.mode == "two_pass" else plan.block_len - 1
                trials[: min(accepted + 1, drafts)] += 1
                hits[:accepted] += 1
        renewed = trials / (MEMORY * max(1, len(outcomes)))  # rarely reached positions look back further
        row = self.fan_outs.index(plan.fan_out)
        for counts, new in ((self._hits, hits), (self._trials, trials)):
            counts *= idle * (1 - renewed)
            counts[row] += new
        if plan.mode != "ar":
            self._compare(renewed)

    def _compare(self, renewed: np.ndarray) -> None:
        """Let the share of the counts that is new tell about quality: each fan_out's against all the others'."""
        hits, trials = self._others @ self._hits, self._others @ (self._trials * self.quality())  # as two_pass's
        share = renewed / np.maximum(self._trials + trials, TINY)
        self._quality_hits *= 1 - 1 / SLOW_MEMORY
        self._quality_hits += (share * self._hits * trials) @ self._in_group
        self._quality_expected *= 1 - 1 / SLOW_MEMORY
        self._quality_expected += (share * hits * self._trials) @ self._in_group

    def quality(self, optimism: float = 0.0, among: bool = False) -> np.ndarray:
        """Hazards of each fan_out over two_pass's, that many standard errors higher than they look.

        ``among``: errors of what sets fan_outs apart from each other; what they have in common is not in doubt.
        """
        prior = SHAPE_TRIALS * self._prior * self._level()
        share = (prior + self._quality_hits) / (SHAPE_TRIALS + self._quality_expected)
        if optimism:
            share = share + optimism * np.sqrt(share * np.maximum(0.0, 1 - share) * self._doubt(among))
        share = np.minimum(1.0, np.maximum(0.1, share))
        share[0] = 1.0
        return share[:, self._group]

    def _level(self) -> np.ndarray:
        """What all fan_outs have in common: their quality over the prior one."""
        expected = (self._prior * self._quality_expected)[1:].sum(0)
        return (LEVEL_TRIALS + self._quality_hits[1:].sum(0)) / (LEVEL_TRIALS + expected)

    def _doubt(self, among: bool) -> np.ndarray:
        """Variance of each fan_out's quality, in units of that of one trial."""
        of_shape = 1 / (SHAPE_TRIALS + self._quality_expected)
        return of_shape if among else of_shape + 1 / (LEVEL_TRIALS + self._quality_expected[1:].sum(0))

    def accepted(self, optimism: float = 0.0, running: CyclePlan = AR) -> dict[int, list[float]]:
        """By fan_out: the expected accepted drafts of 0 ... max_drafts. For the arguments see :meth:`tokens`."""
        own = quality = self.quality()
        if optimism:
            apart = np.array([running.mode == "ar" or f != running.fan_out for f in self.fan_outs])
            own = np.where(apart[:, None], self.quality(optimism, among=running.fan_out > 0), quality)
        hits, trials = self._borrowed(own, quality)
        if optimism and running.fan_out:  # two_pass's quality is certain: it is one_pass's that sets them apart
            hits[0] = self._borrowed(own, self.quality(-optimism))[0][0]
        hits, trials = (self._hits + hits).tolist(), (self._trials + trials).tolist()
        step = (own[:, 1:] / own[:, :-1]).tolist()
        first = (PRIOR_HAZARD * own[:, 0]).tolist()
        rows = zip(hits, trials, first, step, strict=True)
        return {
            f: self._chain(*row, optimism, running.block_len - 1) for f, row in zip(self.fan_outs, rows, strict=True)
        }

    def _borrowed(self, own: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(hits, trials)`` of others, as many as are worth own ones: variances of hazards and qualities add up."""
        doubt = self._doubt(among=False)[:, self._group]
        doubt[0] = 0.0
        share = 1 / (1 + self._trials * doubt)  # of a drafter's trials that tell of two_pass
        hits, trials = self._others @ (share * self._hits / theirs), self._others @ (share * self._trials)
        share = 1 / (1 + trials * doubt)
        return share * np.minimum(trials, own * hits), share * trials

    @staticmethod
    def _chain(hits, trials, prior: float, step, optimism: float, seen: int) -> list[float]:
        """Running sums of survival; positions from ``seen`` on are hoped to be better than they look."""
        weight, totals, survival = PRIOR_TRIALS, [0.0], 1.0
        for i, (hit, tried) in enumerate(zip(hits, trials, strict=True)):
            certain = weight + tried
            hazard = min(1.0, (weight * prior + hit) / certain)
            hope = optimism * math.sqrt(hazard * (1 - hazard) / certain) if optimism and i >= seen else 0.0
            survival *= min(1.0, hazard + hope)
            totals.append(totals[-1] + survival)
            prior, weight = min(1.0, hazard * step[i]) if i < len(step) else hazard, CHAIN_TRIALS
        return totals

    def tokens(self, plans: list[CyclePlan], optimism: float = 0.0, running: CyclePlan = AR) -> dict[CyclePlan, float]:
        """Expected tokens of one sequence's cycle: accepted drafts and the one that verification itself yields.

        With ``optimism``, estimates are taken that many standard errors higher, but those alone that set a plan apart
        from the ``running`` one: an error in what both depend on favours neither.
        """
        key = (*plans, optimism, running)
        if key not in self._known:
            accepted = self.accepted(optimism, running)
            self._known[key] = {p: 1.0 + accepted[p.fan_out][p.block_len - 1] for p in plans}
        return self._known[key]


@functools.cache
def prior_quality(fan_out: int) -> tuple[float, ...]:
    """``PRIOR_QUALITY``, linear between its entries and constant beyond them."""
    low = max(f for f in PRIOR_QUALITY if f <= fan_out)
    high = min((f for f in PRIOR_QUALITY if f >= fan_out), default=low)
    share = (fan_out - low) / (high - low) if high > low else 0.0
    return tuple(a + (b - a) * share for a, b in zip(PRIOR_QUALITY[low], PRIOR_QUALITY[high], strict=True))
