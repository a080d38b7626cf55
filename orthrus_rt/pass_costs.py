"""Seconds per decode cycle of each (batch bucket, plan): measured, refined by the cycles that run, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from bisect import bisect_left
from pathlib import Path

from orthrus_rt.cycle_plan import AR, MODES, CyclePlan

STALLED = 1.3  # times the next measurement: a first one above this was of a stalled cycle
UNLIKELY = 4.0  # times the expectation: a first measurement is cut to this, lest it stay the only one
CLIP = 2.0  # the largest innovation, in standard deviations: a stalled cycle does not mean a slow plan
LEAST_S, MOST_S = 1e-7, 1e3  # seconds of a cycle that are believed of a kept file
APART = 16  # cycles between measurements that one disturbance of the machine is unlikely to have reached both of
HOPE = 0.3  # standard errors by which a cycle is hoped to be cheaper than it looks
# Variances of logarithms, that is, of relative errors.
MEASUREMENT_NOISE = 0.01
WARMED = 0.0015  # of a time measured in a warm-up, when the machine may have been busy
KNOWN = 0.0002  # the least variance of an entry
ENTRY_PROCESS_NOISE = 2e-6  # per cycle, of an entry whose plan does not run
OTHER_DAY = 0.02  # of the change of the machine's slowness since the entries were measured
SLOWNESS_PROCESS_NOISE = 1e-4  # per cycle
# Share of the slowness, per cycle, that is moved to the own cost of the running plan. Nothing else could separate the
# two while no other plan runs, and asymmetric noise would drive them apart without bound.
SETTLING = 1 / 4096
# Extra process noise where measurements do not fit: this times gain x innovation^2 is added to the variance, so that
# after a jump the next gains are larger.
ADAPTIVE_NOISE = 0.1
MAX_CORRELATION, MIN_COVARIANCE = 0.98, 1e-6  # correlation is capped; smaller covariances are dropped


class PassCosts:
    """Estimates that follow drift and resist outliers.

    A cycle's time is its entry times the machine's slowness (its clock, its load, the length of contexts), which all
    entries share. A Kalman filter follows the logarithms of both. The time of a well-known plan is evidence about the
    machine, and so about the plans that do not run; the time of any other plan is evidence about that plan. If the
    filter mistakes one for the other, their covariance records that it may have, and the next times of a well-known
    plan resolve it. Covariances between entries are left out.

    An unmeasured entry is guessed from the number of rows of its passes: interpolated between measured ones, and beyond
    them in proportion to ``1 + rows / ridge_rows``.

    Args:
        basis: costs of similar cycles, to which unmeasured costs are taken to be proportional.
    """

    def __init__(self, ridge_rows: int = 32, basis: PassCosts | None = None):
        self._ridge_rows, self._basis = ridge_rows, basis
        self._log: dict[tuple[int, CyclePlan], float] = {}
        self._variance: dict[tuple[int, CyclePlan], float] = {}  # without the process noise since the last measurement
        self._covariance: dict[tuple[int, CyclePlan], float] = {}  # with the machine's slowness, where not negligible
        self._seen: dict[tuple[int, CyclePlan], tuple[int, float]] = {}  # clock and slowness when last measured
        self._cycles = 0  # of all kinds, timed or not
        # The first and the last cycle that were timed, of entries that do not begin with a warm-up or a kept time.
        self._stretch: dict[tuple[int, CyclePlan], tuple[int, int]] = {}
        # Entries not confirmed by a second cycle, which may be of a stalled one; the value: whether it was cut to
        # UNLIKELY, or a second one took longer.
        self._once: dict[tuple[int, CyclePlan], bool] = {}
        self._slowness, self._slowness_variance = 0.0, OTHER_DAY
        self._clock = 0
        self._curve: list[tuple[int, float]] | None = None  # see _passes(); None since the entries changed

    def of_like_cycles(self) -> PassCosts:
        """Costs of other cycles, taken to be proportional to these until they are measured."""
        return PassCosts(self._ridge_rows, self)

    def __len__(self) -> int:
        return len(self._log)

    def __contains__(self, key: tuple[int, CyclePlan]) -> bool:
        return key in self._log

    def measured_once(self, bucket: int, plan: CyclePlan) -> bool:
        """Also true after several measurements, as long as none has confirmed that those before it were not of stalled
        cycles.
        """
        return (bucket, plan) in self._once

    def measured_briefly(self, bucket: int, plan: CyclePlan) -> bool:
        """Whether it was never measured, or so briefly that one disturbance of the machine may have been in all times.
        A warm-up's and a kept time are believed.
        """
        first, last = self._stretch.get((bucket, plan), (0, APART))
        return (bucket, plan) not in self._log or last - first < APART

    def seconds(self, bucket: int, plan: CyclePlan, hopeful: bool = False) -> float:
        """Expected seconds of one cycle of ``bucket`` slots under ``plan``.

        ``hopeful``: if nothing similar was measured, suppose that more rows cost nothing; if it was measured once or
        long ago, suppose that the cycle was stalled or measured too high.
        """
        key = bucket, plan
        if key not in self._log:
            return self._guess(bucket, plan, hopeful)
        seconds = math.exp(self._slowness + self._log[key])
        if not hopeful:
            return seconds
        hoped = seconds * (1 - HOPE * math.sqrt(min(WARMED, self._doubt(key)) - KNOWN))
        return min(hoped, self._guess(bucket, plan, True)) if key in self._once else hoped

    def set(self, bucket: int, plan: CyclePlan, seconds: float) -> None:
        """Replace what was known by a measurement from a warm-up or from disk."""
        self._once.pop((bucket, plan), None)
        self._stretch.pop((bucket, plan), None)
        self._set((bucket, plan), seconds, WARMED)

    def _set(self, key: tuple[int, CyclePlan], seconds: float, variance: float) -> None:
        self._curve = None
        self._log[key], self._variance[key] = math.log(seconds) - self._slowness, variance
        self._seen[key] = self._clock, self._slowness
        self._covariance.pop(key, None)

    def observe(self, bucket: int, plan: CyclePlan, seconds: float) -> None:
        """Learn from one real cycle, which took ``seconds``."""
        if not 0 < seconds < math.inf:
            return  # not a valid time
        key = bucket, plan
        self._clock += 1
        self._cycles += 1
        if self._contradicts(key, seconds):
            self._stretch[key] = self._cycles, self._cycles
            if seconds < self.seconds(*key):
                self._once[key] = False
                return self._set(key, seconds, MEASUREMENT_NOISE)
        if key in self._stretch:
            self._stretch[key] = self._stretch[key][0], self._cycles
        if key not in self._log or key in self._once:
            self._confirm(key, seconds)
        if key not in self._once:
            self._correct(key, seconds)

    def pass_by(self, cycles: int) -> None:
        """Count cycles that were not timed."""
        self._cycles += cycles

    def _contradicts(self, key: tuple[int, CyclePlan], seconds: float) -> bool:
        """Whether a measurement is long after the others, which were brief, and does not confirm them."""
        apart = self._cycles - self._stretch.get(key, (0, self._cycles))[1]
        known = self.seconds(*key)
        return apart >= APART and self.measured_briefly(*key) and not known / STALLED < seconds < known * STALLED

    def _confirm(self, key: tuple[int, CyclePlan], seconds: float) -> None:
        """Take a first measurement, or a later one that the first must agree with."""
        if key not in self._log:
            most = UNLIKELY * self.seconds(*key) if self._log else math.inf
            self._once[key], self._stretch[key] = seconds > most, (self._cycles, self._cycles)
            return self._set(key, min(seconds, most), MEASUREMENT_NOISE)
        known = self.seconds(*key)
        if known > STALLED * seconds or (self._once[key] and seconds > known):
            self._once[key] = False
            return self._set(key, seconds, MEASUREMENT_NOISE)
        if seconds > STALLED * known and not self._once[key]:
            self._once[key] = True  # this one may have stalled: the next one decides
            return None
        del self._once[key]

    def _correct(self, key: tuple[int, CyclePlan], seconds: float) -> None:
        """Update the entry and, through the machine's slowness, all others: a Kalman filter's update."""
        self._curve = None
        own, machine = self._doubt(key), self._slowness_variance + SLOWNESS_PROCESS_NOISE
        shared = self._covariance.setdefault(key, 0.0)
        innovation_variance = own + machine + 2 * shared + MEASUREMENT_NOISE
        most = CLIP * math.sqrt(innovation_variance)
        innovation = max(-most, min(most, math.log(seconds) - self._slowness - self._log[key]))
        gain = (machine + shared) / innovation_variance
        self._slowness += gain * innovation
        adaptive_noise = ADAPTIVE_NOISE * gain * innovation**2
        self._slowness_variance = machine - gain**2 * innovation_variance + adaptive_noise
        self._variance[key], self._seen[key] = own, (self._clock, self._slowness)
        for entry, covariance in tuple(self._covariance.items()):
            entry_gain = (covariance + (own if entry == key else 0.0)) / innovation_variance
            self._log[entry] += entry_gain * innovation
            adaptive_noise = ADAPTIVE_NOISE * entry_gain * innovation**2 if entry == key else 0.0
            posterior = self._variance[entry] - entry_gain**2 * innovation_variance + adaptive_noise
            self._variance[entry] = max(KNOWN, posterior)
            most = MAX_CORRELATION * math.sqrt(self._variance[entry] * self._slowness_variance)
            covariance -= gain * entry_gain * innovation_variance
            self._covariance[entry] = max(-most, min(most, covariance))
            if abs(self._covariance[entry]) < MIN_COVARIANCE:
                del self._covariance[entry]
        settled = SETTLING * self._slowness
        self._slowness -= settled
        self._log[key] += settled

    def drift(self, bucket: int, plan: CyclePlan) -> float:
        """By how much, as a logarithm, the machine's speed seems to have changed since the entry was last measured."""
        seen = self._seen.get((bucket, plan))
        return 0.0 if seen is None else abs(self._slowness - seen[1])

    def _doubt(self, key: tuple[int, CyclePlan]) -> float:
        """The entry's present variance."""
        cycles = self._clock - self._seen[key][0]
        return min(4 * MEASUREMENT_NOISE, self._variance[key] + ENTRY_PROCESS_NOISE * cycles)

    def _guess(self, bucket: int, plan: CyclePlan, hopeful: bool) -> float:
        if self._basis and not self._log:
            return self._basis.seconds(bucket, plan, hopeful)
        if self._basis and (bucket, AR) in self._log and (bucket, AR) in self._basis:
            dearer = self.seconds(bucket, AR) / self._basis.seconds(bucket, AR)
            return dearer * self._basis.seconds(bucket, plan, hopeful)
        if (bucket, plan) in self._log:
            known = self._passes(but=(bucket, plan))
        else:
            known = self._curve = self._curve or self._passes()
        return math.exp(self._slowness) * plan.num_passes * self._guess_pass(known, bucket * plan.max_rows, hopeful)

    def _passes(self, but: tuple[int, CyclePlan] | None = None) -> list[tuple[int, float]]:
        """``(rows, seconds)`` of the passes measured, by rows; seconds before the machine's slowness."""
        known = {}
        for (slots, plan), log in self._log.items():
            if (slots, plan) != but:
                known[slots * plan.max_rows] = math.exp(log) / plan.num_passes
        return sorted(known.items())

    def _guess_pass(self, known: list[tuple[int, float]], rows: int, hopeful: bool) -> float:
        """Seconds of a pass of ``rows`` rows, from passes with other numbers of rows."""
        if not known:
            return 1 + rows / self._ridge_rows
        i = bisect_left(known, (rows, 0.0))
        if 0 < i < len(known):
            (low, shorter), (high, longer) = known[i - 1], known[i]
            return shorter + (longer - shorter) * (rows - low) / (high - low)
        end, seconds = known[min(i, len(known) - 1)]
        return seconds * (1.0 if hopeful and rows > end else (self._ridge_rows + rows) / (self._ridge_rows + end))

    def table(self) -> list[list]:
        """``[bucket, mode, block_len, fan_out, seconds]`` of every confirmed entry."""
        return [[key[0], *key[1], self.seconds(*key)] for key in sorted(self._log) if key not in self._once]

    def save(self, path: Path, key: str) -> None:
        """Write the table for ``key``, atomically: a reader sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}{secrets.token_hex(8)}.part")
        try:
            with open(part, "x") as file:
                json.dump({"key": key, "seconds": self.table()}, file)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def load(self, path: Path, key: str) -> bool:
        """Load the entries that :meth:`save` wrote for ``key``; False if the file is missing, stale or incomplete."""
        try:
            content = json.loads(path.read_text())
            if content["key"] != key:
                return False
            rows = [(int(b), CyclePlan(str(m), int(k), int(f)), float(s)) for b, m, k, f, s in content["seconds"]]
        except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
            return False
        if not rows or not all(b >= 1 and plan.mode in MODES and LEAST_S < s < MOST_S for b, plan, s in rows):
            return False
        for bucket, plan, seconds in rows:
            self.set(bucket, plan, seconds)
        return True


def cache_file(folder: Path, key: str) -> Path:
    """Where the costs of ``key`` (device, model, version, whatever changes them) are kept under ``folder``."""
    return folder / f"pass-costs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
