"""Simulated acceptance: a drawn trace decides how many drafts each cycle accepts, at no cost to the cycle.

Random weights accept nothing, so their tokens per second would say nothing of a trained model. Consensus reads, beside
the maxima that the passes really compute, ids of ours in place of theirs: equal for draft and verification as far as
the trace says, different after. The cycle's work stays what it is; the ids are written between cycles.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch

from orthrus_rt import state as st
from orthrus_rt.cycle import Cycle

RIGHT, WRONG = 1, 2


def per_position(mean: float, draft_len: int) -> float:
    """The chance that a draft is accepted after all before it were, such that ``mean`` of ``draft_len`` are."""
    if not 0 <= mean <= draft_len:
        raise ValueError(f"accepted drafts per cycle must be within [0, {draft_len}] (draft_len), got {mean}")
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if mean_accepted(p, draft_len) < mean else (low, p)
    return (low + high) / 2


def mean_accepted(p: float, draft_len: int) -> float:
    """Accepted drafts per cycle where each is with the chance ``p``, after all before it were."""
    return sum(p**i for i in range(1, draft_len + 1))


def trace(mean: float, draft_len: int, cycles: int, batch: int) -> torch.Tensor:
    """Accepted drafts, int32 ``[cycles, batch]``: each sequence has the distribution's quantiles in its own order, so
    that whole traces accept ``mean`` up to rounding.
    """
    generator = torch.Generator().manual_seed(0)
    at_least = per_position(mean, draft_len) ** torch.arange(1, draft_len + 1, dtype=torch.float64)
    level = (torch.arange(cycles, dtype=torch.float64) + 0.5) / cycles
    quantiles = (level[:, None] < at_least).sum(1).int()
    return torch.stack([quantiles[torch.randperm(cycles, generator=generator)] for _ in range(batch)], dim=1)


@contextlib.contextmanager
def simulated(accepted: torch.Tensor):
    """Two-pass cycles that engines build in here accept by the rows of ``accepted`` ``[cycles, batch]``, over and over.

    Other modes are left alone: what a one-pass cycle accepts depends on which of its blocks came true.
    """

    class Simulated(Cycle):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.drawn = 0
            self.ids = [torch.full_like(p.partials[1], RIGHT) for p in self.passes]
            draft = self.passes[0]
            if draft.step != st.STEP_DRAFT:
                return
            trace = accepted[:, : self.state.num_slots, None].to(self.model.device)
            position = torch.arange(draft.per_slot, dtype=torch.int32, device=self.model.device)
            self.drafted = torch.where(position < trace, RIGHT, WRONG).int().flatten(1)[:, :, None]

        def take(self, p, partials):
            forced = self.passes[0].step == st.STEP_DRAFT
            super().take(p, (partials[0], self.ids[self.passes.index(p)]) if forced else partials)

        def run(self):
            if self.passes[0].step == st.STEP_DRAFT:
                self.ids[0].copy_(self.drafted[self.drawn % len(self.drafted)].expand_as(self.ids[0]))
            self.drawn += 1
            super().run()

    with mock.patch("orthrus_rt.runner.Cycle", Simulated):
        yield
