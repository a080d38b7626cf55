"""Row plans: every forward pass is a list of rows, and a mode is only a way to list them (cycle_plan.py).

A row is one token to push through the network. The mask of a row is one predicate, everywhere:
``kv < prefix_len[row]`` over its sequence's pages, or "same block" over the diffusion scratch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from orthrus_rt.device import upload


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
    """

    token: torch.Tensor
    position: torch.Tensor
    seq: torch.Tensor
    prefix_len: torch.Tensor
    group_start: torch.Tensor
    num_rows_ar: int
    num_groups_ar: int
    max_group_rows: int

    @property
    def num_rows(self) -> int:
        return self.token.shape[0]

    @property
    def num_rows_diff(self) -> int:
        return self.num_rows - self.num_rows_ar

    @property
    def num_groups(self) -> int:
        return self.group_start.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.token.device


def empty_rows(num_groups_ar: int, rows_ar: int, num_groups_diff: int, rows_diff: int, device) -> Rows:
    """Rows of a fixed layout, all invalid: AR groups of ``rows_ar`` rows, then diffusion blocks of ``rows_diff``."""
    sizes = [rows_ar] * num_groups_ar + [rows_diff] * num_groups_diff
    n = sum(sizes)
    start = [0, *itertools.accumulate(sizes)]
    # Each array begins at a multiple of 16 bytes whatever their length: Triton compiles anew for pointers that do not.
    zeros = torch.zeros(4, -(-n // 4) * 4, dtype=torch.int32, device=device)[:, :n]
    zeros[1] = -1
    return Rows(
        token=zeros[0],
        position=zeros[1],
        seq=zeros[2],
        prefix_len=zeros[3],
        group_start=upload(start, torch.int32, device),
        num_rows_ar=num_groups_ar * rows_ar,
        num_groups_ar=num_groups_ar,
        max_group_rows=max(sizes, default=0),
    )


def prefill_rows(chunks: list[tuple[list[int], int, int]], device) -> Rows:
    """AR rows of prompt chunks, one group each: ``(token_ids, start, slot)`` stands for these tokens at the positions
    ``start, start + 1, ...`` of ``slot``. A slot occurs once at most.
    """
    sizes = [len(tokens) for tokens, _, _ in chunks]
    n = sum(sizes)
    host = np.zeros((4, -(-n // 4) * 4), dtype=np.int32)  # as in empty_rows
    group_start = [0, *itertools.accumulate(sizes)]
    for (tokens, start, slot), first in zip(chunks, group_start[:-1], strict=True):
        here = slice(first, first + len(tokens))
        host[0, here], host[2, here] = tokens, slot
        host[1, here] = np.arange(start, start + len(tokens))
    host[3] = host[1] + 1
    token, position, seq, prefix_len = upload(host, torch.int32, device)[:, :n]
    return Rows(
        token=token,
        position=position,
        seq=seq,
        prefix_len=prefix_len,
        group_start=upload(group_start, torch.int32, device),
        num_rows_ar=n,
        num_groups_ar=len(chunks),
        max_group_rows=max(sizes, default=0),
    )
