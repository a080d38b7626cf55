"""How many tokens a cycle yields: running estimates of draft acceptance, for every plan at once.

Two things are told apart, because they change at different speeds:

- *hazards*: ``h_i``, the chance that two_pass accepts draft ``i`` once it accepted drafts 1 ... i-1 (Kaplan and
  Meier's product estimator: a cycle that accepted all ``m`` of its drafts says nothing of position m+1). They belong to
  the text and are forgotten fast.
- what one_pass keeps of them: its drafts were made before their anchor was known, which costs *quality* (its hazards
  over two_pass's, at the first position and behind it), and a cycle may have none at all: the share *offered*, per
  fan_out. These belong to the model and are forgotten slowly.

So both modes learn from the text that either decodes.
"""

from __future__ import annotations

import functools
import math

from orthrus_rt.cycle_plan import CyclePlan

MEMORY = 128  # cycles that a hazard looks back on while it is being observed
SLOW_MEMORY = 1024  # the same of quality and offered; and of everything while it is not observed
PRIOR_HAZARD, PRIOR_TRIALS = 0.7, 4.0  # of the first draft
CHAIN_TRIALS = 8.0  # weight of the position before as a later position's prior
CERTAIN_TRIALS = 16.0  # trials of two_pass that make its hazards comparable; most that one_pass's count as for it
# On the embedded model's code and chat prompts: quality of first and later drafts; cycles with drafts, by fan_out.
PRIOR_QUALITY, QUALITY_TRIALS = (0.75, 0.95), 32.0
PRIOR_OFFERED, OFFERED_TRIALS = {1: 0.5, 2: 0.70, 4: 0.80, 6: 0.88, 8: 0.94, 12: 0.97}, 8.0

Outcome = tuple[int, int]  # (num_verified, num_accepted) of one sequence's cycle


class Acceptance:
    """Acceptance estimates for cycles of at most ``max_drafts`` drafts, forgetting exponentially."""

    def __init__(self, max_drafts: int):
        self._hits = [0.0] * max_drafts
        self._trials = [0.0] * max_drafts
        self._direct_hits = [0.0] * max_drafts  # of two_pass alone
        self._direct = [0.0] * max_drafts
        self._quality = [[0.0, 0.0], [0.0, 0.0]]  # hits of one_pass, hits that two_pass's hazards foretold
        self._offered: dict[int, list[float]] = {}  # fan_out: sequence-cycles with drafts, sequence-cycles

    def observe(self, plan: CyclePlan, outcomes: list[Outcome]) -> None:
        """One cycle of every sequence under ``plan``."""
        slow = 1 - 1 / SLOW_MEMORY
        for counts in (self._hits, self._trials, self._direct_hits, self._direct):
            counts[:] = [slow * c for c in counts]
        if plan.mode == "ar":
            return
        hits, trials = [0] * len(self._hits), [0] * len(self._hits)
        for verified, accepted in outcomes:
            for i in range(min(accepted + 1, verified)):
                trials[i] += 1
                hits[i] += i < accepted
        indirect = plan.mode == "one_pass"
        if indirect:
            self._observe_one_pass(plan, outcomes, hits, trials)
            hits = [h / self.quality(i) for i, h in enumerate(hits)]
        for i, new in enumerate(trials):
            keep = 1 - new / (MEMORY * len(outcomes))  # rarely reached positions look back further
            self._hits[i] = keep * self._hits[i] + hits[i]
            self._trials[i] = keep * self._trials[i] + new
            self._direct_hits[i] = keep * self._direct_hits[i] + (0 if indirect else hits[i])
            self._direct[i] = keep * self._direct[i] + (0 if indirect else new)

    def _observe_one_pass(self, plan: CyclePlan, outcomes: list[Outcome], hits: list[int], trials: list[int]) -> None:
        slow = 1 - 1 / SLOW_MEMORY
        self._quality = [[slow * c for c in counts] for counts in self._quality]
        for i, direct in enumerate(self._direct):
            if direct > 0:  # compared as far as two_pass ran on the same text: hazards inferred through it say nothing
                weight = direct / (direct + CERTAIN_TRIALS)
                self._quality[i > 0][0] += weight * hits[i]
                self._quality[i > 0][1] += weight * trials[i] * self._direct_hits[i] / direct
        drafts, cycles = self._offered.get(plan.fan_out, (0.0, 0.0))
        new = sum(verified > 0 for verified, _ in outcomes)
        self._offered[plan.fan_out] = [slow * drafts + new, slow * cycles + len(outcomes)]

    def hazards(self) -> list[float]:
        """``h_1 ... h_max`` of two_pass."""
        values, prior, weight = [], PRIOR_HAZARD, PRIOR_TRIALS
        for hits, trials in zip(self._hits, self._trials, strict=True):
            prior = min(1.0, (weight * prior + hits) / (weight + trials))
            values.append(prior)
            weight = CHAIN_TRIALS
        return values

    def quality(self, position: int, optimism: float = 0.0) -> float:
        """Hazard of one_pass over that of two_pass, for the draft at ``position`` (0-based)."""
        hits, expected = self._quality[position > 0]
        value = (QUALITY_TRIALS * PRIOR_QUALITY[position > 0] + hits) / (QUALITY_TRIALS + expected)
        return max(0.1, min(1.0, value + optimism * 0.5 / math.sqrt(QUALITY_TRIALS + expected)))

    def offered(self, fan_out: int, optimism: float = 0.0) -> float:
        """Share of one_pass cycles that have drafts to verify."""
        drafts, cycles = self._offered.get(fan_out, (0.0, 0.0))
        weight = OFFERED_TRIALS + cycles
        share = (OFFERED_TRIALS * prior_offered(fan_out) + drafts) / weight
        return min(1.0, share + optimism * math.sqrt(share * (1 - share) / weight))

    def tokens(self, plans: list[CyclePlan], optimism: float = 0.0) -> dict[CyclePlan, float]:
        """Expected tokens of one sequence's cycle: accepted drafts and the one that verification itself yields.

        With ``optimism``, every estimate is taken that many standard errors higher.
        """
        accepted = {"ar": [0.0], "two_pass": [0.0], "one_pass": [0.0]}
        survival = {"two_pass": 1.0, "one_pass": 1.0}
        first, later = self.quality(0, optimism), self.quality(1, optimism)
        for i, hazard in enumerate(self.hazards()):
            spread = optimism * math.sqrt(hazard * (1 - hazard))
            direct, trials = self._direct[i], CHAIN_TRIALS + self._trials[i]
            certain = CHAIN_TRIALS + direct + min(CERTAIN_TRIALS, self._trials[i] - direct)
            survival["two_pass"] *= min(1.0, hazard + spread / math.sqrt(certain))
            survival["one_pass"] *= min(1.0, (later if i else first) * (hazard + spread / math.sqrt(trials)))
            for mode, alive in survival.items():
                accepted[mode].append(accepted[mode][-1] + alive)
        offered = {p.fan_out: self.offered(p.fan_out, optimism) for p in plans if p.mode == "one_pass"}
        return {p: 1.0 + offered.get(p.fan_out, 1.0) * accepted[p.mode][p.block_len - 1] for p in plans}


@functools.cache
def prior_offered(fan_out: int) -> float:
    """``PRIOR_OFFERED``, linear between its entries and constant beyond them."""
    known = sorted(PRIOR_OFFERED)
    low = max((f for f in known if f <= fan_out), default=known[0])
    high = min((f for f in known if f >= fan_out), default=known[-1])
    share = (fan_out - low) / (high - low) if high > low else 0.0
    return PRIOR_OFFERED[low] + (PRIOR_OFFERED[high] - PRIOR_OFFERED[low]) * share
