"""``mode="auto"`` in an engine: the policy, its candidates on this runner, and the timing of cycles for it.

Costs come from :meth:`Auto.warmup`, which measures them once per device, number of threads, model and version, and
keeps them in the user's cache folder. Later engines start with them, and later warm-ups check whether they still hold.
Where none are kept, costs come from the cycles that run. A fresh policy then begins with a few AR cycles to learn what
they cost, so the first request never waits for measurements.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch

from orthrus_rt import dispatch
from orthrus_rt.cache_folder import NoCacheFolder, cache_root
from orthrus_rt.config import ModelConfig
from orthrus_rt.cycle import Cycle
from orthrus_rt.cycle_plan import AR, CyclePlan, batch_buckets, default_draft_len
from orthrus_rt.dry_run import dry_cycles, most_context
from orthrus_rt.info import device_facts
from orthrus_rt.model import Model
from orthrus_rt.pages import PAGE_SIZE
from orthrus_rt.pass_costs import PassCosts, cache_file
from orthrus_rt.policy import Policy, candidate_plans
from orthrus_rt.progress import progress_bar
from orthrus_rt.recording import MOST_WARM_UPS
from orthrus_rt.sizes import Sizes
from orthrus_rt.stopwatch import Stopwatch
from orthrus_rt.timing import SLEEP_CYCLES
from orthrus_rt.versions import installed

MAX_ROWS = 512  # of a one_pass candidate: with more, arithmetic is the bound, and one read of the weights saves little
# So many more rows are assumed to double a pass's cost, until it is measured. If this is too high, a fresh engine
# begins with one_pass where two_pass is faster; if it is too low, it does not draft at all.
RIDGE_ROWS = {"cpu": 14, "amx": 32, "cuda": 256}
CONTEXT = 256  # committed tokens of a sequence in a warm-up
REPEATS = 5
log = logging.getLogger("orthrus_rt")


class Auto:
    """Picks the plan of every cycle among those within ``plan``, whose mode is ``auto``.

    Args:
        plan: its block_len is the longest that may run; its fan_out the only one, or 0 for several.
        num_slots: the engine's largest batch.
        device: where cycles run.
        identity: returns everything else that determines the present cost of a cycle, see :func:`cost_identity`.

    Attributes:
        known: costs come from a warm-up, run here or kept from an earlier one.
    """

    def __init__(self, plan: CyclePlan, num_slots: int, device: torch.device, identity: Callable[[], str]):
        self.plan, self._device, self._num_slots, self._identity = plan, device, num_slots, identity
        self._key, self._buckets = "", batch_buckets(num_slots)
        self._begin()

    def _begin(self) -> None:
        """Start anew with the costs kept for the present identity, unless that is the one already in use."""
        plans = candidate_plans(self.plan.block_len, self.plan.fan_out)
        key = f"{self._identity()} | {self._num_slots} slots | {' '.join(p.label for p in plans)}"
        if key == self._key:
            return
        has_amx = self._device.type == "cpu" and device_facts(self._device)["isa"] == "amx_bf16"
        costs = PassCosts(RIDGE_ROWS["amx" if has_amx else self._device.type])
        self._key, self._file, self.known = key, None, False
        try:
            self._file = cache_file(cache_root(), key)
            self.known = costs.load(self._file, key)
        except NoCacheFolder as error:
            log.info("the times of a warm-up are not kept: %s", error)
        clock = time.perf_counter if self._device.type == "cpu" else None  # a GPU runs the previous cycle meanwhile
        self.policy = Policy(plans, self._num_slots, costs, max_rows=MAX_ROWS, clock=clock)

    def shapes(self) -> list[tuple[CyclePlan, int]]:
        """``(plan, slots)`` of every cycle that may run."""
        return [(plan, bucket) for bucket in self._buckets for plan in self.policy.plans_of(bucket)]

    def choose(self, requests) -> tuple[CyclePlan, Policy | None]:
        """The plan of the next cycle of ``requests``, and the policy if the policy chose it.

        ``acceptance="rejection"`` works in two_pass alone, so with such a request there is no choice.
        """
        if any(r.rejection for r in requests):
            self.policy.current = None  # the policy does not know of this cycle: one_pass's drafts are gone
            drafts = default_draft_len("two_pass", self.plan.block_len - 1, self._device.type == "cpu")
            return CyclePlan("two_pass", drafts + 1), None
        greedy = not any(r.params.scored for r in requests)
        return self.policy.choose(1 + max(r.slot for r in requests), greedy), self.policy

    def warmup(self, engine, progress: bool = False) -> list[tuple[CyclePlan, int]]:
        """Record and time the greedy cycles of every bucket, without those that could not pay at any acceptance.

        They are timed with all slots running and CONTEXT committed tokens each, or as many as the engine has room for.
        Costs that were kept are corrected by one more measurement per cycle. In buckets without room for one committed
        token per slot, all cycles are recorded and none is timed.

        Returns:
            ``(plan, slots)`` of the recorded cycles.
        """
        self._begin()  # torch's number of threads may have changed
        with progress_bar(progress, total=len(self.shapes()), desc="warm-up", unit="cycle") as bar:
            warmed = [self._warm(engine, slots, bar) for slots in self._buckets]
        recorded = [(plan, slots) for slots, (_, plans) in zip(self._buckets, warmed, strict=True) for plan in plans]
        if any(timed for timed, _ in warmed):
            self.known = True
            cycles = [engine.runner.cycle(*each) for each in recorded]
            if not any(cycle.op_by_op and cycle.can_record for cycle in cycles):  # the next engine may record them all
                self._keep()
        return recorded

    def _keep(self) -> None:
        if self._file is None:
            return
        try:
            self.policy.costs.save(self._file, self._key)
        except OSError as error:
            self._file = None  # warn once
            warnings.warn(f"the times of this warm-up cannot be kept for the next one: {error}", stacklevel=3)

    def _warm(self, engine, slots: int, bar) -> tuple[bool, list[CyclePlan]]:
        """Whether the bucket of ``slots`` was timed, and the plans recorded."""
        costs, plans = self.policy.costs, self.policy.plans_of(slots)
        room = engine.kv.num_free_pages // slots * PAGE_SIZE - engine.config.block_len
        context = min(CONTEXT, room, most_context(engine, plans))
        if context < 1:
            for plan in plans:
                engine.runner.cycle(plan, slots).warm_up()
                bar.update()
            return False, plans
        plans, worth = sorted(plans, key=lambda p: p.num_passes * p.max_rows), []
        with dry_cycles(engine, plans, slots, context) as start:
            for plan in plans:
                # A cycle with more rows costs no less than the most expensive one measured with fewer.
                at_least = costs.seconds(slots, plan, hopeful=True)
                most = plan.block_len * costs.seconds(slots, AR)
                if plan.mode == "one_pass" and (fresh := CyclePlan("two_pass", plan.block_len)) in worth:
                    most = min(most, costs.seconds(slots, fresh))  # its drafts are accepted more often
                if at_least <= most:
                    for _ in range(MOST_WARM_UPS):  # record it, and on CUDA load it onto the device
                        if not (cycle := start(plan)).steady:
                            cycle.run()
                    worth.append(plan)
                    if not self.known:  # twice, lest a burst of other work exclude a plan that could pay
                        costs.set(slots, plan, min(self._seconds(start(plan)) for _ in range(2)))
                bar.update()
            # Interleaved, so that a burst of other work on the machine affects all plans alike, or few of them.
            repeats = 1 if self.known else REPEATS
            rounds = [[self._seconds(start(plan)) for plan in worth] for _ in range(repeats)]
            for plan, seconds in zip(worth, zip(*rounds, strict=True), strict=True):
                (costs.observe if self.known else costs.set)(slots, plan, statistics.median(seconds))
        return True, worth

    def _seconds(self, cycle: Cycle) -> float:
        """Seconds by the clock that times decoding; as there, the cycle is launched while the device is busy."""
        stopwatch = Stopwatch(self._device)
        if self._device.type == "cuda":
            torch.cuda._sleep(SLEEP_CYCLES)
        with stopwatch.time("cycle") as stretch:
            cycle.run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        stopwatch.settle()
        return stretch.seconds


class Autos(dict[CyclePlan, Auto]):
    """The policies of an engine, one for every plan of mode ``auto`` that was requested."""

    def __init__(self, model: Model, sizes: Sizes):
        self._num_slots, self._device = sizes.max_batch_size, model.device
        context = min(CONTEXT, sizes.max_seq_len, sizes.num_pages // sizes.max_batch_size * PAGE_SIZE)
        self.identity = functools.partial(
            cost_identity, model.config, model.device, model.dtype, model.nbytes(), context
        )

    def shapes(self, plan: CyclePlan) -> list[tuple[CyclePlan, int]]:
        """``(plan, slots)`` of every cycle that may run under ``plan``."""
        if plan.mode != "auto":
            return [(plan, self._num_slots)]
        if plan not in self:
            self[plan] = Auto(plan, self._num_slots, self._device, self.identity)
        return self[plan].shapes()

    def forget_pending(self) -> None:
        """Forget the launched cycles, whose results will not arrive."""
        for auto in self.values():
            auto.policy.forget_pending()


def cost_identity(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, nbytes: dict[str, int], context: int
) -> str:
    """What a cycle's cost depends on besides its plan and batch; ``context``: tokens that a full batch is timed at."""
    c = config
    sizes = (c.name, c.num_layers, c.hidden_size, c.intermediate_size, c.vocab_size, dtype, nbytes)
    ops = (f"{op} {dispatch.select(op, device, dtype)}" for op in dispatch.OPS)
    facts = (installed("orthrus-rt"), *sizes, *device_facts(device).values(), *ops, f"{context} tokens")
    return " | ".join(map(str, facts))
