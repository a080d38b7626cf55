"""Row plans: every forward pass is a list of rows, and a mode is only a way to choose them (cycle_plan.py).

A row is one token to run through the network. The mask of a row is the same predicate everywhere: ``kv <
prefix_len[row]`` over its sequence's pages, or "same block" over the diffusion scratch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from orthrus_rt.uploads import upload


@dataclass
class Rows:
    """The rows of one pass, on the engine's device.

    Rows ``[0, num_rows_ar)`` belong to the AR view, the rest to the diffusion view. A *group* is a
    run of consecutive rows that share a sequence and, for diffusion rows, a block.

    Attributes:
        token: int32 ``[num_rows]``, the token ids.
        position: int32 ``[num_rows]``, absolute positions; -1 marks an invalid (padding) row.
        seq: int32 ``[num_rows]``, the slot whose pages the row reads and writes.
        prefix_len: int32 ``[num_rows]``, cache entries ``0 ... prefix_len-1`` are visible.
        group_start: int32 ``[num_groups + 1]``, first row of each group.
        num_rows_ar, num_groups_ar: how many rows and groups are AR (they come first).
        max_group_rows: no group has more rows than this.
        blocks_per_seq: so many consecutive diffusion groups, of ``max_group_rows`` rows each, share a sequence, so that
            attention may read its cache once for all of them; 1 if unknown.
        parts: runs of rows that attention takes in separate calls, so that the tallest group (a prompt's) does not set
            the tile height of all; empty for a single call.
    """

    token: torch.Tensor
    position: torch.Tensor
    seq: torch.Tensor
    prefix_len: torch.Tensor
    group_start: torch.Tensor
    num_rows_ar: int
    num_groups_ar: int
    max_group_rows: int
    parts: tuple[Rows, ...] = ()
    blocks_per_seq: int = 1

    @property
    def num_rows(self) -> int:
        return self.token.shape[0]

    @property
    def num_rows_diff(self) -> int:
        return self.num_rows - self.num_rows_ar

    @property
    def num_groups(self) -> int:
        return self.group_start.shape[0] - 1


class Layout(NamedTuple):
    """AR groups of ``rows_ar`` rows each, then diffusion blocks of ``rows_diff``, ``blocks_per_seq`` of a sequence."""

    groups_ar: int = 0
    rows_ar: int = 0
    groups_diff: int = 0
    rows_diff: int = 0
    blocks_per_seq: int = 1

    @property
    def num_rows(self) -> int:
        return self.groups_ar * self.rows_ar + self.groups_diff * self.rows_diff

    @property
    def num_groups(self) -> int:
        return self.groups_ar + self.groups_diff

    def starts(self) -> list[int]:
        """``group_start``."""
        sizes = [self.rows_ar] * self.groups_ar + [self.rows_diff] * self.groups_diff
        return [0, *itertools.accumulate(sizes)]


def padded(length: int) -> int:
    """Round up to a multiple of 4, so that consecutive int32 arrays each begin at a multiple of 16 bytes: Triton
    compiles a kernel again for pointers that do not.
    """
    return -(-length // 4) * 4


def fixed_rows(layout: Layout, fields: torch.Tensor) -> Rows:
    """Rows of a fixed layout over ``fields``: token, position, seq and prefix_len, int32 ``[4, num_rows]``."""
    return Rows(
        *fields,
        group_start=upload(layout.starts(), torch.int32, fields.device),
        num_rows_ar=layout.groups_ar * layout.rows_ar,
        num_groups_ar=layout.groups_ar,
        max_group_rows=max(layout.rows_ar if layout.groups_ar else 0, layout.rows_diff if layout.groups_diff else 0),
        blocks_per_seq=layout.blocks_per_seq,
    )


def empty_rows(layout: Layout, device) -> Rows:
    """Rows of a fixed layout, all invalid."""
    n = layout.num_rows
    fields = torch.zeros(4, padded(n), dtype=torch.int32, device=device)[:, :n]
    fields[1] = -1
    return fixed_rows(layout, fields)


Chunk = tuple[list[int], int, int]  # token_ids, start, slot: these tokens at positions start, start + 1, ... of slot


def lay_out(chunks: list[Chunk], fields: np.ndarray, group_start: np.ndarray) -> None:
    """Write AR rows of prompt chunks, one group each, into int32 arrays with room for at least as many rows and groups.

    ``fields`` is token, position, seq and prefix_len, ``[4, num_rows]``; ``group_start`` ``[num_groups + 1]``. Rows
    beyond the chunks are invalid and form the last group, which must then exist; groups in between are empty.
    """
    fields[:] = [[0], [-1], [0], [0]]
    end = 0
    for i, (tokens, start, slot) in enumerate(chunks):
        here, end = slice(end, end + len(tokens)), end + len(tokens)
        fields[0, here], fields[2, here] = tokens, slot
        fields[1, here] = np.arange(start, start + len(tokens))
        fields[3, here] = fields[1, here] + 1
        group_start[i + 1] = end
    group_start[0], group_start[len(chunks) + 1 :] = 0, end
    group_start[-1] = fields.shape[1]
