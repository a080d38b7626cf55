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


Chunk = tuple[list[int], int, int]  # token_ids, start, slot: these tokens at positions start, start + 1, ... of slot


def lay_out(chunks: list[Chunk], fields: np.ndarray, group_start: np.ndarray) -> None:
    """Write AR rows of prompt chunks, one group each, into int32 arrays for as many rows and groups or more.

    ``fields`` is token, position, seq and prefix_len, ``[4, num_rows]``; ``group_start`` ``[num_groups + 1]``. Rows
    beyond the chunks' are invalid and make up the last group, which has to be there then; groups between are empty.
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


def prefill_rows(chunks: list[Chunk], device) -> Rows:
    """AR rows of prompt chunks, one group each. A slot occurs once at most."""
    n = sum(len(tokens) for tokens, _, _ in chunks)
    host = np.zeros((4, -(-n // 4) * 4), dtype=np.int32)  # as in empty_rows
    group_start = np.zeros(len(chunks) + 1, dtype=np.int32)
    lay_out(chunks, host[:, :n], group_start)
    token, position, seq, prefix_len = upload(host, torch.int32, device)[:, :n]
    return Rows(
        token=token,
        position=position,
        seq=seq,
        prefix_len=prefix_len,
        group_start=upload(group_start, torch.int32, device),
        num_rows_ar=n,
        num_groups_ar=len(chunks),
        max_group_rows=max((len(tokens) for tokens, _, _ in chunks), default=0),
    )
