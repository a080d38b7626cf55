"""The cycles that requests took: a broken drafter does not change the text, it only takes more cycles."""

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
    """A finished request; ``params`` have the seed that was drawn, and no more tokens than there was room for."""

    plan: CyclePlan
    prompt: tuple[int, ...]
    params: SamplingParams
    dtype: str
    cycles: int


@contextlib.contextmanager
def noted(folder: str) -> Iterator[list[Ended]]:
    """The requests with drafts, of any engine for the checkpoint in ``folder``, that finish inside this context.

    Left out are those of mode ``auto``, which decides by times, and those of ``one_pass`` that started again when they
    had tokens already (after a preemption or a fault), as their blocks were lost. It is an error if there are only such
    requests of ``one_pass``.
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
