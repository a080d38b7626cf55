"""``mode="auto"``: chooses the CyclePlan that the next cycle of the batch runs.

A plan's predicted time per token is cost(bucket, plan) / expected tokens(plan). The policy runs the plan for which it
is lowest, subject to two accounts of time:

- *safety*. Every cycle is debited its cost and credited with the time that plain AR would have needed for its tokens,
  times ``1 + SAFETY``. A plan may start only if the balance covers the worst outcome (no draft accepted anywhere) of
  its own cycle and of all cycles whose results have not arrived or have not been weighed. Every sequence yields at
  least one token per cycle, so the balance never falls below zero. Whatever the drafter does, and however badly
  acceptance is estimated, the time spent is at most ``1 + SAFETY`` times AR's, plus GRANT cycles once (conservative
  bandits: Wu, Shariff, Lattimore, Szepesvari 2016). The grant lets a fresh engine draft from its first tokens on.
  Without it, the engine would have to save up for each attempt, and luck with the first few would decide whether it
  drafts before the thousandth token. Prefill counts, as AR needs it as well. The cap on the account bounds the loss
  over any stretch, not only since the start: credit from good times is not spent without limit in bad ones.
- *exploration*. Plans that might be better than they look are tried as long as trials have cost less than EXPLORATION
  of all time, measured against the plan in use. (This is optimism in the face of uncertainty. Only uncertainty about
  what sets a plan apart from the one in use counts, not about what both depend on.) A close rival costs little, so its
  trial is long. Credit that no such plan can use yet pays for checks of costs that were measured briefly or never.

Both bounds are in estimated seconds, and hold for real seconds as far as the estimates are right. Choices that the
account cannot pay, as with very short cycles, come on top. At 400 tokens SAFETY and GRANT together allow 3%, which
``mode="auto"`` promises from there on. Later they allow less, which leaves room for errors in the costs. 2% and 4
cycles would allow as much and find text that turns easy sooner, but would leave less to a fresh engine, whose first
drafts may be unlucky. AR cycles are timed when a batch bucket is first used, once more soon after, and again from time
to time while other plans run.

Hysteresis: another plan replaces the one in use once its predicted savings have added up to SWITCH cycles (a one-sided
CUSUM). A large gain thus leads to a switch soon, a small one only if it lasts.

Choosing takes the host longer than anything else about a cycle, most of all where a pass through the weights has swept
its caches. On a CPU nothing else runs meanwhile, and the safety account pays for it, as far as it goes. So a chosen
plan is kept for a *course* of up to COURSE cycles, as long as the account covers their worst outcome, and their results
are weighed together at its end. AR cycles give no information on drafts, so their courses are longer: until the account
covers the plan in use, or another may come into use or be tried.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable

from orthrus_rt.acceptance import Acceptance, Outcome
from orthrus_rt.cycle_plan import AR, CyclePlan, batch_bucket, most_hypotheses
from orthrus_rt.integers import integer
from orthrus_rt.lane import DEADBAND, SAFETY, Account, Course, Lane
from orthrus_rt.pass_costs import PassCosts

GRANT = 8  # AR cycles that may be lost beyond that, once
SAFETY_CAP = 64  # AR cycles of credit kept
EXPLORATION = 0.01  # of all time that may be lost on trying plans
EXPLORATION_CAP = 64  # AR cycles of credit kept
OPTIMISM = 0.7  # standard errors by which a plan may be better than it looks; more while exploration credit is unused
TRIAL_LENGTH = 8  # sequence-cycles, at least
TRIAL_PRICE = 0.5  # share of the exploration credit that a longer trial, or one for a plan's cost alone, may cost
UNTIMED = 1  # cycles of a kind before those that are timed: it is recorded (CUDA leaves out one more)
REST = 64  # cycles between trials, and the longest trial
LONGEST_REST = 256  # cycles between trials of plans that draft, even if AR was tried in between
COURSE, COURSE_SHARE = 8, 8  # cycles of the longest course, at most 1/8 of all cycles before it
AR_COURSE = 64  # cycles of AR's longest, at any time
RECENT = 16  # cycles of a course whose times correct the costs
PIPELINE_FILL = 1  # passes of one_pass before it has drafts


def candidate_plans(block_len: int, fan_out: int = 0) -> list[CyclePlan]:
    """The plans to choose among, with at most ``block_len - 1`` drafts, AR first; ``fan_out`` 0 means several."""
    lens = sorted({min(k, block_len) for k in (4, 8, 16, block_len)})
    # Where rows cost compute, as on a CPU, two_pass is best with between 3 and 7 drafts.
    two_pass = [CyclePlan("two_pass", k) for k in sorted({min(6, block_len), *lens})]
    if fan_out:
        return [AR, *two_pass, *(CyclePlan("one_pass", k, fan_out) for k in lens if fan_out <= most_hypotheses(k - 1))]
    return [AR, *two_pass, *(CyclePlan("one_pass", k, f) for k in lens for f in (2, 4, 8) if f <= k)]


class Policy:
    """Chooses the plan of every cycle and learns from the results.

    Call :meth:`record` once per :meth:`choose`, in the same order; any number of cycles may be in flight in between.

    Args:
        plans: the candidates, which include AR.
        max_batch_size: the largest bucket; smaller ones are powers of two.
        costs: of greedy cycles; shared with the caller, which measures them. Cycles that sample have costs and an
            acceptance of their own.
        max_rows: a one_pass plan with more rows in a pass than this is no candidate in that bucket.
        clock: returns the time, in seconds, if the device has nothing to do while the policy chooses, so that choosing
            is paid for; None if it does not count.
    """

    def __init__(
        self, plans: list[CyclePlan], max_batch_size: int, costs: PassCosts | None = None, *,
        max_rows: float = math.inf, clock: Callable[[], float] | None = None,
    ):  # fmt: skip
        if AR not in plans:
            raise ValueError(f"Policy: plans must hold {AR}, got {plans}")
        self.max_batch_size, self._plans, self._max_rows, self._clock = max_batch_size, list(plans), max_rows, clock
        self.costs = PassCosts() if costs is None else costs
        most_drafts, fan_outs = max(1, max(p.block_len for p in plans) - 1), {p.fan_out for p in plans}
        self.acceptance, sampled = (Acceptance(most_drafts, fan_outs) for _ in range(2))
        self._kinds = {True: (self.costs, self.acceptance), False: (self.costs.of_like_cycles(), sampled)}  # by greedy
        self.safety, self.exploration = Account(), Account()
        self.spent = self.ar_equivalent = 0.0
        self._granted: Lane | None = None  # the lane of the cycles that GRANT is counted in
        self._grant = 0.0  # seconds
        self.plan_counts: Counter[CyclePlan] = Counter()
        self.current: CyclePlan | None = None
        self._lanes: dict[tuple[int, bool], Lane] = {}
        self._course: Course | None = None
        self._pending: deque[Course] = deque()  # of every cycle whose results have not arrived
        self._unread: list[Course] = []  # with results to weigh
        self._reserved = 0.0  # seconds that all these cycles may cost the safety account
        self._choosing = 0.0  # seconds of the last choice, if they count
        self._since_trial = self._since_draft_trial = self._cycles = 0

    def plans_of(self, bucket: int) -> list[CyclePlan]:
        """The candidates in a bucket."""
        return [p for p in self._plans if p.mode != "one_pass" or bucket * p.max_rows <= self._max_rows]

    def _lane(self, batch_size: int, greedy: bool) -> Lane:
        bucket = batch_bucket(batch_size, self.max_batch_size)
        if (bucket, greedy) not in self._lanes:
            self._lanes[bucket, greedy] = Lane(bucket, self.plans_of(bucket), *self._kinds[greedy])
        return self._lanes[bucket, greedy]

    def choose(self, batch_size: int, greedy: bool = True) -> CyclePlan:
        """The plan of the next cycle of ``batch_size`` (>= 1) sequences; ``greedy`` if none of them samples."""
        lane, course = self._lane(batch_size, greedy), self._course
        goes_on = course and course.left and course.lane is lane and course.plan is self.current
        if not (goes_on and (not course.reserved or self._covers(course.reserved))):
            since = self._clock and self._clock()
            self._course = course = self._think(lane, batch_size)
            if self._clock and lane.costs:
                self._pay_for_choosing(course, self._clock() - since)
        course.left -= 1
        lane.trial_left -= course.trial
        self._since_trial = 0 if course.trial else self._since_trial + 1
        self._since_draft_trial = 0 if course.trial and course.plan != AR else self._since_draft_trial + 1
        lane.ran(course.plan)
        self._pending.append(course)
        self._reserved += course.reserved
        self.current = course.plan
        return course.plan

    @property
    def wants_time(self) -> bool:
        """Whether the cycle chosen last should run by itself to be timed, as its cost is a guess or out of date."""
        return self._course.alone

    def _think(self, lane: Lane, batch_size: int) -> Course:
        """Choose the next course."""
        self.settle()
        tokens = lane.acceptance.tokens(lane.plans)
        rates = {p: lane.seconds(p) / tokens[p] for p in lane.plans}
        in_use = lane.hold(rates)
        trial = self._plan_to_try(lane, batch_size, tokens, rates[in_use])
        plan = in_use if trial is None else trial
        if not self._affordable(lane, plan):
            plan, trial, lane.trial = self._fallback(lane, rates), None, None
        if guesses := lane.guesses(plan):
            length = 1
        elif trial is None and plan == AR:
            length = self._ar_course(lane, rates)
        else:
            longest = COURSE if trial is None else min(COURSE, lane.trial_left)
            length = min(longest, 1 + self._cycles // COURSE_SHARE)
        return Course(
            lane, plan, length,
            reserved=max(0.0, lane.worst_loss(plan)),
            trial=trial is not None,
            against=None if trial is None or not lane.costs else rates[in_use],
            fills=plan.mode == "one_pass" and self.current != plan,
            alone=guesses or (trial is not None and (plan == AR or lane.costs.measured_briefly(lane.bucket, plan))),
        )  # fmt: skip

    def _ar_course(self, lane: Lane, rates: dict[CyclePlan, float]) -> int:
        """How many AR cycles to run before choosing again: until another plan may come into use or be tried, or until
        the account covers the one in use, and this choice.
        """
        waits = [AR_COURSE, lane.until_switch(rates)]
        if lane.in_use == AR:
            waits.append(REST - self._since_trial)
        else:
            missing = self._price(lane, lane.in_use) + self._choosing + self._reserved - self.safety.balance
            waits.append(missing / (SAFETY * lane.seconds(AR)))
        return math.ceil(min(wait for wait in waits if wait > 0))

    def _fallback(self, lane: Lane, rates: dict[CyclePlan, float]) -> CyclePlan:
        """What to run while the account does not cover the wanted plan: the current one if covered and better than AR,
        else the best that is, else AR.
        """
        better = [p for p in lane.plans if rates[p] < rates[AR] and self._affordable(lane, p)]
        return self.current if self.current in better else min(better, key=rates.get, default=AR)

    def _plan_to_try(self, lane: Lane, batch_size: int, tokens, rate: float) -> CyclePlan | None:
        """The plan to try in this cycle, if any; ``rate``: seconds per token of the plan in use."""
        if lane.trial is None or not lane.trial_left:
            lane.trial, lane.trial_left = self._next_trial(lane, batch_size, tokens, rate)
        return lane.trial

    def _next_trial(self, lane: Lane, batch_size: int, tokens, rate: float) -> tuple[CyclePlan | None, int]:
        """``(plan, cycles)`` of the trial to begin, if any."""
        if cycles := lane.cycles_to_time_ar(rate):
            return AR, cycles
        # Timing AR is a trial too, and may be due before every REST has passed. Others must get their turn.
        rested = self._since_trial >= REST or self._since_draft_trial >= LONGEST_REST
        if not rested or self.exploration.balance <= 0:
            return None, 0
        idle = self.exploration.balance / (EXPLORATION_CAP * lane.seconds(AR))  # unused credit: estimates too certain?
        optimism = OPTIMISM * max(1.0, 2 * idle)
        hopeful = lane.acceptance.tokens(lane.plans, optimism, lane.in_use)
        hopes = {p: lane.seconds(p, hopeful=True) / hopeful[p] for p in lane.plans}
        least = -(-TRIAL_LENGTH // batch_size)
        for plan in sorted(hopes, key=hopes.get):
            if hopes[plan] >= rate * (1 - DEADBAND):
                break
            if plan == lane.in_use or not self._affordable(lane, plan):
                continue
            if lane.costs.measured_once(lane.bucket, plan):  # one more cycle shows whether that one was stalled
                return plan, 1
            filling = PIPELINE_FILL if plan.mode == "one_pass" else 0
            spare = self.exploration.balance - filling * (lane.seconds(plan) - rate)
            price = lane.seconds(plan) - tokens[plan] * rate
            if least * price <= spare:
                cycles = least if price <= 0 else min(REST, max(least, int(TRIAL_PRICE * spare / price)))
                return plan, cycles + filling
        return self._plan_to_time(lane, hopes, tokens, rate)

    def _plan_to_time(self, lane: Lane, hopes: dict[CyclePlan, float], tokens, rate: float):
        """``(plan, cycles)`` of a trial for its cost alone, if that rests on little: if the machine was disturbed then,
        the plan looks bad, and so do others whose costs are guessed from it.
        """
        for plan in sorted(hopes, key=hopes.get):
            if plan != lane.in_use and lane.costs.measured_briefly(lane.bucket, plan) and self._affordable(lane, plan):
                cycles = 1 if (lane.bucket, plan) in lane.costs else UNTIMED + 2  # and a second to confirm the first
                # Filling the pipeline is paid, but not asked for here: such checks often find that a one_pass is best.
                price = lane.seconds(plan) - tokens[plan] * rate
                if cycles * price <= TRIAL_PRICE * self.exploration.balance:
                    return plan, cycles
        return None, 0

    def _affordable(self, lane: Lane, plan: CyclePlan) -> bool:
        """Whether the safety account covers the worst outcome."""
        return self._covers(self._price(lane, plan))

    def _price(self, lane: Lane, plan: CyclePlan) -> float:
        """Seconds that the safety account must cover: a cycle's worst loss; of a one_pass that starts, that of enough
        passes to see its drafts.
        """
        return lane.worst_loss(plan) * (1 + PIPELINE_FILL if plan.mode == "one_pass" and self.current != plan else 1)

    def _covers(self, seconds: float) -> bool:
        """Whether the safety account covers this even if everything not yet weighed turns out at its worst."""
        return seconds <= self.safety.balance - self._reserved

    def record(self, outcomes: list[Outcome], seconds: float | None = None) -> None:
        """Record the results of the oldest cycle in flight.

        Args:
            outcomes: of each sequence that ran, without those that had already ended when the cycle ran.
            seconds: how long the cycle took, if it was timed by itself and was not the first of its kind.
        """
        course = self._pending.popleft()
        if not course.outcomes:
            self._unread.append(course)
        course.outcomes.append(outcomes)
        if seconds is not None:
            course.seconds.append(seconds)

    def settle(self) -> None:
        """Weigh the recorded cycles at the costs known before them; then correct these costs by their times."""
        timed = []
        for course in self._unread:
            lane, plan, outcomes, seconds = course.lane, course.plan, course.outcomes, course.seconds
            course.outcomes, course.seconds = [], []
            if observed := [of_cycle for of_cycle in outcomes[course.fills :] if of_cycle]:
                lane.acceptance.observe(plan, observed)
            course.fills = False
            if seconds and not lane.costs:  # the first cost known becomes the unit of the accounts
                lane.costs.observe(lane.bucket, plan, seconds.pop(0))
            timed.append((lane, plan, seconds, len(outcomes)))
            self.plan_counts[plan] += len(outcomes)
            self._cycles += len(outcomes)
            if lane.costs:
                self._pay(course, outcomes)
        self._unread.clear()
        self._reserved = sum(course.reserved for course in self._pending)
        for lane, plan, seconds, cycles in timed:
            lane.costs.pass_by(cycles - len(seconds[-RECENT:]))
            for each in seconds[-RECENT:]:
                lane.costs.observe(lane.bucket, plan, each)

    def _pay(self, course: Course, outcomes: list[list[Outcome]]) -> None:
        """Enter cycles of the course into the accounts."""
        cost, ar = course.lane.seconds(course.plan), course.lane.seconds(AR)
        if self._granted is None or (course.lane is self._granted and course.lane.guesses(AR)):
            self._granted = course.lane
            self.safety.add(GRANT * ar - self._grant, SAFETY_CAP * ar)  # the one cycle known before may have stalled
            self._grant = GRANT * ar
        for of_cycle in outcomes:
            tokens = sum(out.num_tokens for out in of_cycle) / len(of_cycle) if of_cycle else 1.0
            self.safety.add((1 + SAFETY) * tokens * ar - cost, SAFETY_CAP * ar)
            lost = 0.0 if course.against is None else cost - tokens * course.against
            self.exploration.add(EXPLORATION * cost - lost, EXPLORATION_CAP * ar)
            self.spent += cost
            self.ar_equivalent += tokens * ar

    def _pay_for_choosing(self, course: Course, seconds: float) -> None:
        """AR would not have needed this time, so it comes out of what may be lost against AR, as far as the next cycle
        leaves something of that. A choice that took longer than an AR cycle was stalled, and counts as one.
        """
        self._choosing = min(seconds, course.lane.seconds(AR))
        self.safety.balance -= max(0.0, min(self._choosing, self.safety.balance - self._reserved - course.reserved))
        self.spent += self._choosing

    def prefilled(self, seconds: float) -> None:
        """Count a prefill of ``seconds``: AR needs it too, so the share of AR's time that may be lost includes it."""
        self.safety.add(SAFETY * seconds, math.inf)  # capped when the next cycle is weighed
        if (course := self._course) and course.plan == AR != course.lane.in_use:
            course.left = 0  # the account may now cover the plan in use
        self.spent += seconds
        self.ar_equivalent += seconds

    def forget_pending(self) -> None:
        """Forget the cycles in flight: they were lost, and no results will arrive."""
        self._pending.clear()
        self.current = None  # this also ends the course

    def explain(self, batch_size: int = 1, greedy: bool = True) -> dict:
        """Explain the choice of plan for ``batch_size`` sequences. The last course may not be weighed yet.

        Returns:
            ``bucket``: the batch size that it is rounded up to. ``in_use``: the wanted plan. ``current``: the plan that
            ran last, which differs from ``in_use`` in a trial or while the safety account does not cover ``in_use``.
            ``candidates``: plan -> ``seconds_per_cycle``, ``tokens_per_cycle`` (of a sequence), ``seconds_per_token``,
            ``cost_measured`` (false: inferred from other plans), ``cycles`` (of all batches). ``accepted``: way of
            drafting -> expected accepted drafts if 0, 1, ... are offered. ``safety_balance_seconds``,
            ``exploration_balance_seconds``: what drafting, and trials, may still cost. ``spent_seconds``: of all
            cycles and prompts, and on a CPU of choosing plans. ``ar_equivalent_seconds``: what AR would have taken.

        Raises:
            ValueError: ``batch_size`` is out of its range, or ``greedy`` is no bool.
        """
        batch_size = integer("batch_size", batch_size)
        if not isinstance(greedy, bool):
            raise ValueError(f"greedy must be True or False, got {greedy!r}")
        if not 1 <= batch_size <= self.max_batch_size:
            raise ValueError(f"batch_size must be within [1, {self.max_batch_size}], got {batch_size}")
        lane = self._lane(batch_size, greedy)
        tokens = lane.acceptance.tokens(lane.plans)
        rows = {
            p.label: {
                "seconds_per_cycle": lane.seconds(p),
                "tokens_per_cycle": tokens[p],
                "seconds_per_token": lane.seconds(p) / tokens[p] / batch_size,
                "cost_measured": (lane.bucket, p) in lane.costs,
                "cycles": self.plan_counts[p],
            }
            for p in lane.plans
        }
        return {
            "bucket": lane.bucket,
            "current": self.current and self.current.label,
            "in_use": lane.in_use and lane.in_use.label,
            "candidates": rows,
            "accepted": {f"one_pass x{f}" if f else "two_pass": x for f, x in lane.acceptance.accepted().items()},
            "safety_balance_seconds": self.safety.balance,
            "exploration_balance_seconds": self.exploration.balance,
            "spent_seconds": self.spent,
            "ar_equivalent_seconds": self.ar_equivalent,
        }
