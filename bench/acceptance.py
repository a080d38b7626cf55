"""Simulated acceptance: a random trace decides how many drafts each cycle accepts, at next to no cost.

With random weights no draft is accepted, so their tokens per second would say nothing about a trained model. Consensus
reads the maxima that the passes really compute, but our ids instead of theirs: equal for draft and verification up to
the length that the trace gives, and different after it. The cycle's work is unchanged, as the ids are written between
cycles.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch

from orthrus_rt.cycle import Cycle

RIGHT, WRONG = 1, 2


def per_position(mean: float, draft_len: int) -> float:
    """The chance that a draft is accepted if all before it were, such that ``mean`` of ``draft_len`` are accepted."""
    if not 0 <= mean <= draft_len:
        raise ValueError(f"accepted drafts per cycle must be within [0, {draft_len}] (draft_len), got {mean}")
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if mean_accepted(p, draft_len) < mean else (low, p)
    return (low + high) / 2


def mean_accepted(p: float, draft_len: int) -> float:
    """Accepted drafts per cycle if each is accepted with chance ``p`` after all before it were."""
    return sum(p**i for i in range(1, draft_len + 1))


def trace(mean: float, draft_len: int, cycles: int, batch: int) -> torch.Tensor:
    """Accepted drafts, int32 ``[cycles, batch]``: each sequence takes the distribution's quantiles in its own order, so
    that whole traces accept ``mean`` up to rounding.
    """
    generator = torch.Generator().manual_seed(0)
    at_least = per_position(mean, draft_len) ** torch.arange(1, draft_len + 1, dtype=torch.float64)
    level = (torch.arange(cycles, dtype=torch.float64) + 0.5) / cycles
    quantiles = (level[:, None] < at_least).sum(1).int()
    return torch.stack([quantiles[torch.randperm(cycles, generator=generator)] for _ in range(batch)], dim=1)


def one_pass_trace(mean: float, draft_len: int, hit_rate: float, cycles: int, batch: int) -> torch.Tensor:
    """The same for one_pass. In a share ``hit_rate`` of cycles a block of the cycle before came true, so the cycle has
    drafts and accepts ``mean`` of them; the other cycles accept none.
    """
    hits = round(hit_rate * cycles)
    drawn, accepted = trace(mean, draft_len, hits, batch), torch.zeros(cycles, batch, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    for b in range(batch):
        accepted[torch.randperm(cycles, generator=generator)[:hits], b] = drawn[:, b]
    return accepted


class Simulated(Cycle):
    """Accepts according to the rows of ``accepted`` ``[cycles, batch]``, over and over, if it drafts."""

    accepted: torch.Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drawn = 0
        self.ids = [torch.full_like(p.partials[1], RIGHT) for p in self.passes]
        position = torch.arange(self.plan.block_len, dtype=torch.int32)
        self.accepts = (position < self.accepted[:, : self.state.num_slots, None]).to(self.model.device)
        self.choices = torch.where(self.accepts, RIGHT, WRONG).int()

    def take(self, p, partials):
        super().take(p, partials if self.plan.mode == "ar" else (partials[0], self.ids[self.passes.index(p)]))

    def run(self):
        if self.plan.mode == "ar":
            return super().run()
        now = self.drawn % len(self.accepts)
        # Ids of the draft pass, compared with a RIGHT verification; or of one_pass's verification, compared with RIGHT
        # drafts.
        decide = self.ids[0].view(self.state.num_slots, -1, self.ids[0].shape[1])[:, : self.plan.block_len]
        decide.copy_(self.choices[now, :, : decide.shape[1], None].expand_as(decide))
        if self.plan.mode == "one_pass":  # make what will happen the likeliest, so that there is a block for it
            probs = self.state.draft_prob[:, 1 : self.plan.block_len]
            probs.zero_()
            probs[..., 0] = self.accepts[now, :, : probs.shape[1]]
        self.drawn += 1
        super().run()


@contextlib.contextmanager
def simulated(accepted: torch.Tensor):
    """Cycles that engines build inside are :class:`Simulated`."""
    with mock.patch("orthrus_rt.runner.Cycle", type("Cycle", (Simulated,), {"accepted": accepted})):
        yield
