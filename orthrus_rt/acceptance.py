"""How many tokens a cycle yields: running estimates of draft acceptance, for every plan at once.

A *hazard* ``h_i`` is the chance that draft ``i`` is accepted once drafts 1 ... i-1 were (Kaplan and Meier's product
estimator: a cycle that accepted all ``m`` of its drafts says nothing of position m+1). two_pass and one_pass have
hazards of their own: they belong to the text and are forgotten fast. What relates them belongs to the model and is
forgotten slowly:

- *quality*: one_pass's hazards over two_pass's, at the first position and behind it (Mantel and Haenszel's ratio, over
  positions and over what both modes saw of the same text); its drafts were made before their anchor was known. Through
  it, what one mode learns of the text serves the other.
- *offered*: the share of one_pass cycles that have drafts at all, per fan_out.
"""

from __future__ import annotations

import functools
import math

from orthrus_rt.cycle_plan import AR, CyclePlan

MEMORY = 128  # drafting cycles that a hazard looks back on
IDLE_MEMORY = 1024  # cycles after which hazards that nothing is drafted for fade
SLOW_MEMORY = 4096  # drafting cycles that quality and offered look back on
FADE_EVERY = 16  # cycles without drafts: estimates that hardly change are not worth computing for each
PRIOR_HAZARD, PRIOR_TRIALS = 0.7, 4.0  # of the first draft
CHAIN_TRIALS = 8.0  # weight of the position before as a later position's prior
# On the embedded model's code and chat prompts: quality of first and later drafts; cycles with drafts, by fan_out.
PRIOR_QUALITY, QUALITY_TRIALS = (0.75, 0.95), 32.0
PRIOR_OFFERED, OFFERED_TRIALS = {1: 0.5, 2: 0.70, 4: 0.80, 6: 0.88, 8: 0.94, 12: 0.97}, 8.0

Outcome = tuple[int, int]  # (num_verified, num_accepted) of one sequence's cycle


class Counts:
    """Drafts accepted, and drafts tried, by position."""

    def __init__(self, num_drafts: int):
        self.hits = [0.0] * num_drafts
        self.trials = [0.0] * num_drafts

    def fade(self, keep: list[float]) -> None:
        self.hits = [k * c for k, c in zip(keep, self.hits, strict=True)]
        self.trials = [k * c for k, c in zip(keep, self.trials, strict=True)]


class Acceptance:
    """Acceptance estimates for cycles of at most ``max_drafts`` drafts, forgetting exponentially."""

    def __init__(self, max_drafts: int):
        self.max_drafts = max_drafts
        self._seen = {"two_pass": Counts(max_drafts), "one_pass": Counts(max_drafts)}
        self._quality = [[0.0, 0.0], [0.0, 0.0]]  # hits of one_pass and of two_pass, of equal weight
        self._offered: dict[int, list[float]] = {}  # fan_out: sequence-cycles with drafts, sequence-cycles
        self._unfaded = 0  # cycles whose fading is still due
        self._known: dict[tuple, dict[CyclePlan, float]] = {}  # answers of tokens() since the counts changed

    def observe(self, plan: CyclePlan, outcomes: list[Outcome]) -> None:
        """One cycle of every sequence under ``plan``."""
        self._unfaded += 1
        if plan.mode == "ar" and self._unfaded < FADE_EVERY:
            return
        self._known.clear()
        idle = [(1 - 1 / IDLE_MEMORY) ** self._unfaded] * self.max_drafts
        self._unfaded = 0
        for counts in self._seen.values():
            counts.fade(idle)
        if plan.mode == "ar":
            return
        new = Counts(self.max_drafts)
        for verified, accepted in outcomes:
            for i in range(min(accepted + 1, verified)):
                new.trials[i] += 1
                new.hits[i] += i < accepted
        renewed = [n / (MEMORY * len(outcomes)) for n in new.trials]  # rarely reached positions look back further
        for counts in self._seen.values():
            counts.fade([1 - share for share in renewed])
        seen = self._seen[plan.mode]
        seen.hits = [a + b for a, b in zip(seen.hits, new.hits, strict=True)]
        seen.trials = [a + b for a, b in zip(seen.trials, new.trials, strict=True)]
        self._compare(renewed)
        if plan.mode == "one_pass":
            keep = 1 - 1 / SLOW_MEMORY
            drafts, cycles = self._offered.get(plan.fan_out, (0.0, 0.0))
            with_drafts = sum(verified > 0 for verified, _ in outcomes)
            self._offered[plan.fan_out] = [keep * drafts + with_drafts, keep * cycles + len(outcomes)]

    def _compare(self, renewed: list[float]) -> None:
        """Let the share of the counts that is new tell about quality."""
        one, two, slow = self._seen["one_pass"], self._seen["two_pass"], 1 - 1 / SLOW_MEMORY
        self._quality = [[slow * c for c in counts] for counts in self._quality]
        for i, share in enumerate(renewed):
            both = one.trials[i] + two.trials[i]
            if both > 0:
                self._quality[i > 0][0] += share * one.hits[i] * two.trials[i] / both
                self._quality[i > 0][1] += share * two.hits[i] * one.trials[i] / both

    def quality(self, position: int, optimism: float = 0.0) -> float:
        """Hazard of one_pass over that of two_pass, for the draft at ``position`` (0-based)."""
        hits, expected = self._quality[position > 0]
        known = QUALITY_TRIALS + expected
        share = min(1.0, (QUALITY_TRIALS * PRIOR_QUALITY[position > 0] + hits) / known)
        return max(0.1, min(1.0, share + optimism * math.sqrt(share * (1 - share) / known)))

    def accepted(self, mode: str, optimism: float = 0.0, running: CyclePlan = AR) -> list[float]:
        """Expected accepted drafts of 0 ... max_drafts offered ones; see :meth:`tokens`."""
        own, other = self._seen[mode], self._seen["one_pass" if mode == "two_pass" else "two_pass"]
        related = 0.0 if mode == running.mode else optimism if mode == "one_pass" else -optimism
        quality = [self.quality(i, related) for i in range(2)]
        prior, weight = PRIOR_HAZARD * (quality[0] if mode == "one_pass" else 1.0), PRIOR_TRIALS
        totals, survival = [0.0], 1.0
        for i, (hits, trials) in enumerate(zip(own.hits, own.trials, strict=True)):
            borrowed = self._worth(i, other.trials[i])
            if borrowed:
                ratio = quality[i > 0] if mode == "one_pass" else 1 / quality[i > 0]
                hits += borrowed * min(1.0, ratio * other.hits[i] / other.trials[i])
            certain = weight + trials + borrowed
            hazard = min(1.0, (weight * prior + hits) / certain)
            unseen = i >= running.block_len - 1
            survival *= min(1.0, hazard + unseen * optimism * math.sqrt(hazard * (1 - hazard) / certain))
            totals.append(totals[-1] + survival)
            prior, weight = hazard, CHAIN_TRIALS
            if not i and mode == "one_pass":
                prior = min(1.0, hazard * quality[1] / quality[0])
        return totals

    def _worth(self, position: int, trials: float) -> float:
        """Own trials that as many of the other mode are worth: the variances of its hazard and of quality add up."""
        known = QUALITY_TRIALS + self._quality[position > 0][1]
        return trials * known / (trials + known)

    def offered(self, fan_out: int, optimism: float = 0.0) -> float:
        """Share of one_pass cycles that have drafts to verify."""
        drafts, cycles = self._offered.get(fan_out, (0.0, 0.0))
        weight = OFFERED_TRIALS + cycles
        share = (OFFERED_TRIALS * prior_offered(fan_out) + drafts) / weight
        return min(1.0, share + optimism * math.sqrt(share * (1 - share) / weight))

    def tokens(self, plans: list[CyclePlan], optimism: float = 0.0, running: CyclePlan = AR) -> dict[CyclePlan, float]:
        """Expected tokens of one sequence's cycle: accepted drafts and the one that verification itself yields.

        With ``optimism``, estimates are taken that many standard errors higher, but those alone that set a plan apart
        from the ``running`` one: an error in what both depend on favours neither.
        """
        key = (*plans, optimism, running)
        if key in self._known:
            return self._known[key]
        accepted = {mode: self.accepted(mode, optimism, running) for mode in self._seen} | {"ar": [0.0]}
        fan_outs = {p.fan_out for p in plans if p.mode == "one_pass"}
        offered = {f: self.offered(f, 0.0 if f == running.fan_out else optimism) for f in fan_outs}
        self._known[key] = {p: 1.0 + offered.get(p.fan_out, 1.0) * accepted[p.mode][p.block_len - 1] for p in plans}
        return self._known[key]


@functools.cache
def prior_offered(fan_out: int) -> float:
    """``PRIOR_OFFERED``, linear between its entries and constant beyond them."""
    known = sorted(PRIOR_OFFERED)
    low = max((f for f in known if f <= fan_out), default=known[0])
    high = min((f for f in known if f >= fan_out), default=known[-1])
    share = (fan_out - low) / (high - low) if high > low else 0.0
    return PRIOR_OFFERED[low] + (PRIOR_OFFERED[high] - PRIOR_OFFERED[low]) * share
