"""Cycles that requests have taken: a broken drafter changes no text, it only takes more of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.request import Request
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
    """Requests with drafts, of any engine for the checkpoint in ``folder``, that finish inside this context.

    Left out are those of mode ``auto``, which decides by times, and those of ``one_pass`` that began anew after some of
    their tokens, because their blocks were lost (a preemption, a fault). It is an error if those are all there are.
    """
    ended, left_out, finish, begin = [], [], Rounds._finish, Request.begin
    interrupted = []

    def noted_begin(request, *args):
        if request.tokens:
            interrupted.append(request)
        return begin(request, *args)

    def noted_finish(engine, request, reason, *error):
        finish(engine, request, reason, *error)
        stats = request.stats
        plan = CyclePlan(stats.mode, stats.block_len, stats.fan_out)
        if (
            reason not in ("stop", "length") or engine.config.name != folder
            or plan != engine._plan or list(stats.plans) != [plan.label] or plan.label == "ar"
        ):  # fmt: skip
            return
        if plan.fan_out and any(one is request for one in interrupted):
            left_out.append(request)
            return
        most, p = request.limit - len(request.prompt), request.params
        least = min(p.min_tokens, most)
        params = dataclasses.replace(p, max_new_tokens=min(p.max_new_tokens, most), min_tokens=least, seed=stats.seed)
        dtype = str(engine.model.dtype).removeprefix("torch.")
        ended.append(Ended(plan, tuple(request.prompt), params, dtype, stats.cycles))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rounds, "_finish", noted_finish)
        patch.setattr(Request, "begin", noted_begin)
        yield ended
    assert ended or not left_out, f"none of {len(left_out)} requests could be compared: all lost their blocks"
