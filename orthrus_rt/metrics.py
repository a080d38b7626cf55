"""Counters of one engine, as a plain dict and in Prometheus' text form."""

from __future__ import annotations

import bisect
import itertools
import weakref

GAUGES = ("waiting", "running", "pages_free", "pages")
HELP = {
    "tokens": "Tokens generated.",
    "prompt_tokens": "Prompt tokens that came into the cache or were found there.",
    "recomputed_tokens": "Tokens computed once more, after a preemption or a fault.",
    "cached_tokens": "Tokens found in the cache when their request got its slot.",
    "cycles": "Decode cycles.",
    "passes": "Forward passes of the decode cycles.",
    "preemptions": "Requests that gave their pages up for others.",
    "busy_seconds": "Seconds spent in steps.",
    "times": "Device time of passes and cycles.",
    "first_token": "Seconds from a request's arrival to its first token.",
    "per_token": "Seconds per further token, the mean over a request that came to its end.",
    "plans": "Decode cycles by plan.",
    "plan": "The plan that ran last.",
    "drafted": "Drafts that were verified.",
    "accepted": "Drafts accepted by a request's cycle, ar cycles left out.",
    "finished": "Requests that have ended, by reason.",
    "waiting": "Requests that wait for a slot.",
    "running": "Requests in a slot.",
    "pages_free": "Free pages of the cache.",
    "pages": "Pages of the cache.",
}
BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Latencies:
    """A histogram of durations in seconds: how many were up to each of BOUNDS, and beyond."""

    def __init__(self):
        self.counts, self.seconds = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def as_dict(self) -> dict:
        """``count``, the sum in ``seconds``, and ``at_most``: bound in seconds -> how many were up to it."""
        *at_most, count = itertools.accumulate(list(self.counts))  # a copy, as another thread may add meanwhile
        return {"count": count, "seconds": self.seconds, "at_most": dict(zip(BOUNDS, at_most, strict=True))}


class Metrics:
    """Counts what the engine did; reading never disturbs it, and a reference to this does not keep it alive."""

    def __init__(self, engine):
        self._engine, self._block_len = weakref.ref(engine), engine.config.block_len
        self.tokens = self.prompt_tokens = self.recomputed_tokens = self.cached_tokens = 0
        self.cycles = self.passes = self.preemptions = self.drafted = 0
        self.accepted: dict[int, int] = {}
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.busy_seconds = 0.0
        self.times: dict[str, tuple[int, float]] = {}
        self.first_token, self.per_token = Latencies(), Latencies()
        self.plans: dict[str, int] = {}
        self.plan: str | None = None

    def prefilled(self, tokens: int, of_them_new: int) -> None:
        """Count one request's tokens in a prefill pass; new are prompt tokens that were never in the cache before."""
        self.prompt_tokens += of_them_new
        self.recomputed_tokens += tokens - of_them_new

    def found(self, tokens: int, of_them_new: int) -> None:
        """Count one request's tokens whose keys and values were in the cache when it got its slot."""
        self.prompt_tokens += of_them_new
        self.cached_tokens += tokens

    def verified(self, drafted: int, accepted: int) -> None:
        """Count the outcome of one request's drafts in a cycle other than ``ar``."""
        self.drafted += drafted
        self.accepted[accepted] = self.accepted.get(accepted, 0) + 1

    def landed(self, flight) -> None:
        """Count a cycle whose results were read; a flight of first tokens of prompts has no plan and counts nothing."""
        if flight.plan is not None:
            self.cycles += 1
            self.passes += flight.plan.num_passes
            self.plan = flight.plan.label
            self.plans[self.plan] = self.plans.get(self.plan, 0) + 1

    def took(self, kind: str, seconds: float) -> None:
        """Count the device time of one prefill pass or one cycle.

        kind: ``prefill``, ``ar_cycle``, ``two_pass_cycle``, ``one_pass_cycle``, ``mixed_cycle`` (of any mode, with
            prompts in it) or ``recording`` (a run that was also recorded: the first cycle of its plan and batch bucket,
            on CUDA also the second, which uploads the recording to the device, or the second use of a prompt shape).
        """
        count, total = self.times.get(kind, (0, 0.0))
        self.times[kind] = (count + 1, total + seconds)

    def as_dict(self) -> dict:
        """All counters and gauges; safe to call from any thread.

        Returns:
            ``tokens``: generated. ``cycles``, ``passes``: run. ``preemptions``: of requests.
            ``prompt_tokens``: written into the cache or found there.
            ``cached_tokens``: found in the cache when their request got its slot, at first or after a preemption.
            ``recomputed_tokens``: sent through the network again, as a preemption or a fault had cost their pages.
            ``busy_seconds``: host time inside steps.
            ``times``: kind of pass or cycle (see :meth:`took`) -> ``count``, and ``seconds`` on the device.
            ``first_token``, ``per_token``: :meth:`Latencies.as_dict` of the seconds from a request's arrival to its
            first token, and of the seconds per further token of requests that came to their end.
            ``plans``: plan (``ar``, ``two_pass/7``, ``one_pass/15x4``: drafts, fan_out) -> cycles. ``plan``: the last.
            ``drafted``: drafts that were verified. ``accepted``: number of drafts accepted -> how often, counting each
            sequence's cycles, without ``ar`` cycles.
            ``finished``: finish reason -> requests. ``waiting``, ``running``: requests at present.
            ``pages``, ``pages_free``: usable pages of the cache, and free ones at present.
        """
        engine = self._engine()
        scheduler, kv = (engine.scheduler, engine.kv) if engine else (None, None)  # None too once it is closed
        return {
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "recomputed_tokens": self.recomputed_tokens,
            "cached_tokens": self.cached_tokens,
            "cycles": self.cycles,
            "passes": self.passes,
            "preemptions": self.preemptions,
            "busy_seconds": self.busy_seconds,
            "times": {kind: {"count": n, "seconds": s} for kind, (n, s) in sorted(self.times.items())},
            "first_token": self.first_token.as_dict(),
            "per_token": self.per_token.as_dict(),
            "plans": dict(sorted(self.plans.items())),
            "plan": self.plan,
            "drafted": self.drafted,
            "accepted": dict(sorted(self.accepted.items())),
            "finished": dict(self.finished),
            "waiting": len(scheduler.waiting) if scheduler else 0,
            "running": len(scheduler.active) if scheduler else 0,
            "pages_free": kv.num_free_pages if kv else 0,
            "pages": kv.num_pages if kv else 0,
        }

    def as_prometheus(self) -> str:
        """The same in Prometheus' text exposition format.

        Counters: ``orthrus_`` and ``tokens``, ``prompt_tokens``, ``recomputed_tokens``, ``cached_tokens``, ``cycles``,
        ``passes``, ``preemptions``, ``busy_seconds``, ``drafted``, each ``_total``;
        ``orthrus_plan_cycles_total{plan}``; ``orthrus_finished_total{reason}``: stop, length, abort, error. Gauges:
        ``orthrus_waiting``, ``_running``, ``_pages``, ``_pages_free``; ``orthrus_plan_info{plan}``. Histograms:
        ``orthrus_first_token_seconds``, ``orthrus_per_token_seconds``, ``orthrus_accepted_drafts``. Summary:
        ``orthrus_device_seconds{kind}``, kinds as in :meth:`took`.
        """
        lines = []

        def begin(metric: str, kind: str) -> None:
            lines.extend([f"# HELP {metric} {HELP[name]}", f"# TYPE {metric} {kind}"])

        for name, value in self.as_dict().items():
            if name == "accepted":
                begin("orthrus_accepted_drafts", "histogram")
                counts = [value.get(drafts, 0) for drafts in range(self._block_len)]
                at_most = dict(enumerate(itertools.accumulate(counts)))
                total = sum(drafts * n for drafts, n in value.items())
                lines += _histogram("orthrus_accepted_drafts", at_most, sum(counts), total)
            elif name in ("first_token", "per_token"):
                begin(f"orthrus_{name}_seconds", "histogram")
                lines += _histogram(f"orthrus_{name}_seconds", value["at_most"], value["count"], value["seconds"])
            elif name == "times":
                begin("orthrus_device_seconds", "summary")
                for kind, of in value.items():
                    lines.append(f'orthrus_device_seconds_sum{{kind="{kind}"}} {of["seconds"]}')
                    lines.append(f'orthrus_device_seconds_count{{kind="{kind}"}} {of["count"]}')
            elif name == "plans":
                begin("orthrus_plan_cycles_total", "counter")
                lines += [f'orthrus_plan_cycles_total{{plan="{plan}"}} {n}' for plan, n in value.items()]
            elif name == "plan":
                begin("orthrus_plan_info", "gauge")
                lines += [f'orthrus_plan_info{{plan="{value}"}} 1'] if value else []
            elif name == "finished":
                begin("orthrus_finished_total", "counter")
                lines += [f'orthrus_finished_total{{reason="{reason}"}} {n}' for reason, n in value.items()]
            else:
                kind, metric = ("gauge", f"orthrus_{name}") if name in GAUGES else ("counter", f"orthrus_{name}_total")
                begin(metric, kind)
                lines.append(f"{metric} {value}")
        return "\n".join(lines) + "\n"


def _histogram(metric: str, at_most: dict, count: int, total: float) -> list[str]:
    """``at_most``: bound -> how many; the same bounds in every scrape."""
    lines = [f'{metric}_bucket{{le="{bound}"}} {n}' for bound, n in at_most.items()]
    return [*lines, f'{metric}_bucket{{le="+Inf"}} {count}', f"{metric}_sum {total}", f"{metric}_count {count}"]
