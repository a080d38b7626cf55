"""Cycles in which some requests choose by the published rejection rule, which runs on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from orthrus_rt import nvtx
from orthrus_rt import state as st
from orthrus_rt.cycle import Cycle, Pass
from orthrus_rt.memory import naming_the_knobs
from orthrus_rt.reference import first_argmax
from orthrus_rt.request import Request
from orthrus_rt.state import SlotState


@nvtx.ranged("rejection cycle")
def run_by_rejection(cycle: Cycle, requests: list[Request]) -> None:
    """One cycle, op by op; whoever of ``requests`` samples by rejection chooses here, the others as ever."""
    cycle.stage_first()
    for p in cycle.passes:
        cycle.forward(p)
        by_slot = p.logits.view(cycle.state.num_slots, p.per_slot, -1)
        kept = {r: by_slot[r.slot].clone() for r in requests if r.rejection}
        cycle.sample(p)
        value, index = p.partials
        # Whether a row has a choice at all does not depend on the rule, so the best score says it for both.
        best, ids = value.amax(1, keepdim=True), index.gather(1, first_argmax(value)[:, None])
        for request, mine in kept.items():
            choices = _choices(cycle.state, p, request, mine)
            first = request.slot * p.per_slot
            ids[first : first + len(choices), 0] = choices.to(ids.device)
        cycle.take(p, (best, ids))


def _choices(state: SlotState, p: Pass, request: Request, logits: torch.Tensor) -> torch.Tensor:
    slot = request.slot
    position = int(state.cache_seqlens[slot]) + 1
    if p.step == st.STEP_DRAFT:
        with _failures_of(request):
            return request.rejection.draft(logits, position)
    drafts = state.block_tokens[slot, 1 : 1 + int(state.num_drafts[slot])].tolist()
    return verify(request, logits, drafts, position)


def verify(request: Request, logits: torch.Tensor, drafts: list[int], position: int) -> torch.Tensor:
    """The request's choices by rejection: see :meth:`orthrus_rt.sampling.RejectionSampler.verify`."""
    with _failures_of(request):
        choices = request.rejection.verify(logits, drafts, position)
        request.rejection.forget_drafts()
        return choices


@contextlib.contextmanager
def _failures_of(request: Request) -> Iterator[None]:
    """An error in here carries the request as ``error.request``."""
    try:
        with naming_the_knobs("sampling by rejection"):
            yield
    except torch.OutOfMemoryError as error:
        error.request = request
        raise
