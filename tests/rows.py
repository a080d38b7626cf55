"""Builds the rows of a pass from its groups."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from orthrus_rt.rows import Rows


@dataclass(frozen=True)
class Group:
    """``n`` rows of sequence ``seq`` from position ``start``; the last ``invalid`` of them are padding."""

    view: str  # "ar" or "diff"
    seq: int
    start: int
    n: int
    invalid: int = 0

    def columns(self) -> list[tuple[int, int, int]]:
        """Position, seq and prefix_len of each row."""
        positions = range(self.start, self.start + self.n - self.invalid)
        rows = [(p, self.seq, p + 1 if self.view == "ar" else self.start) for p in positions]
        return rows + [(-1, self.seq, 0)] * self.invalid


def ar(seq, start, n, invalid=0) -> Group:
    return Group("ar", seq, start, n, invalid)


def diff(seq, start, n, invalid=0) -> Group:
    return Group("diff", seq, start, n, invalid)


def make_rows(groups: list[Group], device="cpu", blocks_per_seq=1) -> Rows:
    """AR groups must come first, as ``Rows`` requires; every token is 0."""
    columns = torch.tensor([row for g in groups for row in g.columns()], dtype=torch.int32).view(-1, 3)
    position, seq, prefix_len = (column.contiguous().to(device) for column in columns.T)
    num_groups_ar = sum(g.view == "ar" for g in groups)
    assert all(g.view == "ar" for g in groups[:num_groups_ar])
    starts = [0, *itertools.accumulate(g.n for g in groups)]
    return Rows(
        token=torch.zeros_like(seq),
        position=position,
        seq=seq,
        prefix_len=prefix_len,
        group_start=torch.tensor(starts, dtype=torch.int32, device=device),
        num_rows_ar=starts[num_groups_ar],
        num_groups_ar=num_groups_ar,
        max_group_rows=max((g.n for g in groups), default=0),
        blocks_per_seq=blocks_per_seq,
    )
