"""Cycles that requests have taken: a broken drafter changes no text, it only takes more of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.rounds import Rounds
from orthrus_rt.sampling import SamplingParams


class Ended(NamedTuple):
    """``params`` with the seed that was drawn, and no more tokens than there was room for."""

    plan: CyclePlan
    prompt: tuple[int, ...]
    params: SamplingParams
    dtype: str
    cycles: int


@contextlib.contextmanager
def noted(folder: str) -> Iterator[list[Ended]]:
    """Requests that drafts were made for, of any engine for the checkpoint in ``folder``, that meanwhile come to
    their end; in mode ``auto`` none, which decides by times, and of ``one_pass`` none of an engine that had to compute
    anything anew, as blocks were lost with it.
    """
    ended, finish = [], Rounds._finish

    def noted_finish(engine, request, reason, *error):
        finish(engine, request, reason, *error)
        stats, metrics = request.stats, engine.metrics
        plan = CyclePlan(stats.mode, stats.block_len, stats.fan_out)
        anew = metrics.preemptions or metrics.recomputed_tokens
        if (
            reason in ("stop", "length") and plan == engine._plan and list(stats.plans) == [plan.label] != ["ar"]
            and engine.config.name == folder and not (anew and plan.fan_out)
        ):  # fmt: skip
            most, p = request.limit - len(request.prompt), request.params
            least = min(p.min_tokens, most)
            params = dataclasses.replace(
                p, max_new_tokens=min(p.max_new_tokens, most), min_tokens=least, seed=stats.seed
            )
            dtype = str(engine.model.dtype).removeprefix("torch.")
            ended.append(Ended(plan, tuple(request.prompt), params, dtype, stats.cycles))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rounds, "_finish", noted_finish)
        yield ended
