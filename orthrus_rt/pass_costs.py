"""Seconds per decode cycle of each (batch bucket, plan): measured, refined by every cycle timed, kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from bisect import bisect_left
from pathlib import Path

from orthrus_rt.cycle_plan import CyclePlan

CLIP = math.log(1.3)  # one measurement moves an estimate no further: a stalled cycle is not a slow plan
SETTLED = 10.0  # measurements that an estimate averages over
DOUBT = 0.1  # relative standard error of one measurement
WARMED = 3.0  # cycles that a warm-up's time is worth: the machine may have been busy then
FORGET = 1 / 128  # per cycle: how fast measurements of an entry that does not run lose their weight
FORGET_DRIFT = 10  # the same per e-fold by which the machine's speed changed meanwhile
COMMON = 0.05  # share of a surprise that is taken to be the machine's (its clock, its load, the context's length)


class PassCosts:
    """Estimates that follow drift and shrug outliers off.

    An unmeasured entry is guessed from the number of rows of its passes, between those that were measured; beyond them,
    a pass is supposed to cost ``1 + rows / ridge_rows``.
    """

    def __init__(self, ridge_rows: int = 32):
        self._ridge_rows = ridge_rows
        self._log: dict[tuple[int, CyclePlan], float] = {}
        self._weight: dict[tuple[int, CyclePlan], float] = {}
        self._seen: dict[tuple[int, CyclePlan], tuple[int, float]] = {}  # clock and scale when last measured
        self._scale = 0.0  # log of the machine's slowness since the entries were measured
        self._clock = 0
        self._curve: list[tuple[int, float]] | None = None  # see _passes(); None since the entries changed

    def blank(self) -> PassCosts:
        """The same kind of estimates, nothing measured."""
        return PassCosts(self._ridge_rows)

    def __len__(self) -> int:
        return len(self._log)

    def __contains__(self, key: tuple[int, CyclePlan]) -> bool:
        return key in self._log

    def seconds(self, bucket: int, plan: CyclePlan, hopeful: bool = False) -> float:
        """Expected seconds of one cycle of ``bucket`` slots under ``plan``.

        ``hopeful``: where nothing like it was measured, suppose that more rows cost nothing; where little was, that it
        may have been a stalled cycle, or measured too high.
        """
        key = bucket, plan
        if key not in self._log:
            return self._guess(bucket, plan, hopeful)
        seconds, weight = math.exp(self._scale + self._log[key]), self._weight[key]
        if not hopeful:
            return seconds
        hoped = seconds * (1 - DOUBT * math.sqrt(1 / weight - 1 / SETTLED))
        return min(hoped, self._guess(bucket, plan, True)) if weight < WARMED else hoped

    def set(self, bucket: int, plan: CyclePlan, seconds: float) -> None:
        """A warm-up's measurement, or a kept one, replacing what was known."""
        self._curve = None
        self._log[bucket, plan] = math.log(seconds) - self._scale
        self._weight[bucket, plan], self._seen[bucket, plan] = WARMED, (self._clock, self._scale)

    def observe(self, bucket: int, plan: CyclePlan, seconds: float) -> None:
        """The seconds that one real cycle took."""
        key = bucket, plan
        self._clock += 1
        stalled = key in self._log and self._weight[key] < WARMED and seconds < math.exp(-CLIP) * self.seconds(*key)
        if key not in self._log or stalled:  # stalled when it was measured the first time
            self.set(bucket, plan, seconds)
            self._weight[key] = 1.0
            return
        forgotten = FORGET * (self._clock - self._seen[key][0]) + FORGET_DRIFT * self.drift(bucket, plan)
        weight = min(self._weight[key] * math.exp(-forgotten), SETTLED - 1) + 1
        self._curve = None
        surprise = max(-CLIP, min(CLIP, math.log(seconds) - self._scale - self._log[key]))
        self._log[key] += (1 / weight - COMMON) * surprise
        self._scale += COMMON * surprise
        self._weight[key], self._seen[key] = weight, (self._clock, self._scale)

    def drift(self, bucket: int, plan: CyclePlan) -> float:
        """Logarithm by which the machine's speed changed, up or down, since the entry was last measured."""
        seen = self._seen.get((bucket, plan))
        return 0.0 if seen is None else abs(self._scale - seen[1])

    def _guess(self, bucket: int, plan: CyclePlan, hopeful: bool) -> float:
        if (bucket, plan) in self._log:
            known = self._passes(but=(bucket, plan))
        else:
            known = self._curve = self._curve or self._passes()
        return math.exp(self._scale) * plan.num_passes * self._guess_pass(known, bucket * plan.max_rows, hopeful)

    def _passes(self, but: tuple[int, CyclePlan] | None = None) -> list[tuple[int, float]]:
        """``(rows, seconds)`` of the passes measured, by rows; seconds before the machine's slowness."""
        known = {}
        for (slots, plan), log in self._log.items():
            if (slots, plan) != but:
                known[slots * plan.max_rows] = math.exp(log) / plan.num_passes
        return sorted(known.items())

    def _guess_pass(self, known: list[tuple[int, float]], rows: int, hopeful: bool) -> float:
        """Seconds of a pass of ``rows`` rows from those of some other numbers of rows."""
        if not known:
            return 1 + rows / self._ridge_rows
        i = bisect_left(known, (rows, 0.0))
        if 0 < i < len(known):
            (low, shorter), (high, longer) = known[i - 1], known[i]
            return shorter + (longer - shorter) * (rows - low) / (high - low)
        end, seconds = known[min(i, len(known) - 1)]
        return seconds * (1.0 if hopeful and rows > end else (self._ridge_rows + rows) / (self._ridge_rows + end))

    def table(self) -> list[list]:
        """``[bucket, mode, block_len, fan_out, seconds]`` of every measured entry."""
        return [[bucket, *plan, self.seconds(bucket, plan)] for bucket, plan in sorted(self._log)]

    def save(self, path: Path, key: str) -> None:
        """Write the table for ``key``, atomically: a reader sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"key": key, "seconds": self.table()}, file)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    def load(self, path: Path, key: str) -> bool:
        """Take the entries that :meth:`save` wrote for ``key``; False if the file is missing, stale or not whole."""
        try:
            content = json.loads(path.read_text())
            if content["key"] != key:
                return False
            rows = [(int(b), CyclePlan(str(m), int(k), int(f)), float(s)) for b, m, k, f, s in content["seconds"]]
        except (OSError, ValueError, TypeError, KeyError):
            return False
        if not rows or any(bucket < 1 or not 0 < seconds < math.inf for bucket, _, seconds in rows):
            return False
        for bucket, plan, seconds in rows:
            self.set(bucket, plan, seconds)
        return True


def cache_file(folder: Path, key: str) -> Path:
    """Where the costs of ``key`` (device, model, version, whatever changes them) are kept under ``folder``."""
    return folder / f"pass-costs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
