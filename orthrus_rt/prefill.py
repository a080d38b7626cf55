"""Prefill: prompts' tokens run through the AR view, in passes of their own or ahead of the rows of a cycle's last pass,
which then reads the weights for both.

On a GPU passes are padded to a few shapes, each replayed from its second use on. Launched op by op, even the shortest
prompt takes the host milliseconds, during which the GPU and all decoding sequences wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from orthrus_rt import dispatch
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.model import Activations, Model, Workspace, forward
from orthrus_rt.recording import Recorded
from orthrus_rt.request import Request
from orthrus_rt.rows import Chunk, Layout, Rows, fixed_rows, lay_out, padded
from orthrus_rt.uploads import copy_up

TILE = 128  # rows of row_linear's tiles in a prefill on sm_90: padding the last tile costs nothing
LEAST = 16  # rows of its narrowest tile
NOTHING = Layout()
# The next tokens of prompts, how many tokens of the prompt precede them, and the request, which holds a slot. The
# tokens already count as prefilled.
PromptChunks = list[tuple[list[int], int, Request]]


@dataclass(frozen=True)
class PrefillShape:
    """Rows; their groups (one per prompt, and one of padding); the most rows of a group; prompts that end and so choose
    a token; and whether their logits are materialised.
    """

    rows: int
    groups: int
    tallest: int
    chosen: int
    scored: bool

    def padded(self, max_rows: int, num_slots: int, in_cycle: bool = False) -> PrefillShape:
        """This shape rounded up to one of the few recorded ones, plus a group for padding rows. Coarser in a cycle, as
        many cycles may take prompts and each reads the head's weights anyway.
        """
        rows = max(self.rows, min(round_up(self.rows), max_rows))
        tallest = rows if in_cycle else min(rows, round_up(max(self.tallest, rows - self.rows)))
        chosen = min(round_up(self.chosen), num_slots, rows) if self.chosen or in_cycle else 0
        return PrefillShape(rows, 1 + (1 << (self.groups - 1).bit_length()), tallest, chosen, self.scored)


def round_up(rows: int) -> int:
    """Round up to a power of two, or beyond one tile to whole tiles.

    >>> [round_up(n) for n in (1, 17, 100, 129, 300)]
    [16, 32, 128, 256, 384]
    """
    return -(-rows // TILE) * TILE if rows > TILE else 1 << (max(rows, LEAST) - 1).bit_length()


class Prompts:
    """The part of some requests' prompts that one pass takes.

    Attributes:
        laid: the rows, see :func:`orthrus_rt.rows.lay_out`.
        ended: requests whose last row is among these.
        choosing: those of them whose next token is not yet known.
        picked: their last rows.
    """

    def __init__(self, chunks: PromptChunks):
        self.laid: list[Chunk] = [(tokens, start, request.slot) for tokens, start, request in chunks]
        self._sizes = [len(tokens) for tokens, _, _ in self.laid]
        last = {r: end - 1 for (_, _, r), end in zip(chunks, accumulate(self._sizes), strict=True) if r.decoding}
        self.ended = list(last)
        self.choosing = [r for r in last if not r.tokens]
        self.picked = [last[r] for r in self.choosing]

    def shape(self, scored: bool) -> PrefillShape:
        return PrefillShape(sum(self._sizes), len(self._sizes), max(self._sizes), len(self.choosing), scored)


class PromptRows:
    """Static rows of a pass: first prompts' rows, of one shape, then a cycle's own, if any.

    Args:
        own: the layout of the cycle's rows.
        own_picked: those of them whose logits are wanted.

    Attributes:
        rows: all rows.
        own: the cycle's rows, to be staged.
        logit_rows: int32, ``own_picked``, then the prompts' rows that choose a token; None if there are none.
    """

    def __init__(self, shape: PrefillShape, device, own: Layout = NOTHING, own_picked: Sequence[int] = ()):
        self.shape = shape
        n, groups = shape.rows + own.num_rows, shape.groups + own.num_groups
        sizes = [4 * padded(n), padded(groups + 1), len(own_picked) + shape.chosen]

        def split(buffer):
            """The rows' fields, where groups start, and the rows whose logits are wanted."""
            fields, group_start, picked = buffer.split(sizes)
            return fields.view(4, -1)[:, :n], group_start[: groups + 1], picked

        self._host = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu")
        self._fields, group_start, picked = (part.numpy() for part in split(self._host))
        self._fields[1] = -1
        self._group_start, self._picked = group_start[: shape.groups + 1], picked[len(own_picked) :]
        group_start[shape.groups :] = shape.rows + np.array(own.starts())
        picked[: len(own_picked)] = shape.rows + np.array(own_picked, dtype=np.int32)

        self._buffer = torch.zeros_like(self._host, device=device)
        fields, group_start, picked = split(self._buffer)
        self.logit_rows = picked if picked.numel() else None
        prompts = Rows(
            *fields[:, : shape.rows], group_start[: shape.groups + 1], shape.rows, shape.groups, shape.tallest
        )
        self.own = fixed_rows(own, fields[:, shape.rows :])
        self.rows = Rows(
            *fields, group_start, shape.rows + self.own.num_rows_ar, shape.groups + own.groups_ar,
            max(shape.tallest, self.own.max_group_rows), (prompts, self.own) if own.num_rows else (),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def load(self, chunks: list[Chunk], picked: list[int]) -> None:
        """Load the rows of the next pass; ``picked`` are those that choose. A cycle's own rows must be staged again."""
        lay_out(chunks, self._fields[:, : self.shape.rows], self._group_start)
        self._picked[: len(picked)] = picked
        copy_up(self._buffer, self._host)


def prefill_rows(chunks: list[Chunk], device) -> Rows:
    """AR rows of prompt chunks, one group each. A slot occurs once at most."""
    sizes = [len(tokens) for tokens, _, _ in chunks]
    prompts = PromptRows(PrefillShape(sum(sizes), len(sizes), max(sizes, default=0), 0, False), device)
    prompts.load(chunks, [])
    return prompts.rows


class PrefillPass(Recorded):
    """A pass of one shape over static buffers.

    Attributes:
        prompt_rows: its rows, which must be loaded before every run.
        out: ``(value, id)`` of ``chosen`` rows: fp32 logits (id None), or partial maxima. All passes share the memory.
    """

    def __init__(
        self, model: Model, kv: PagedKvCache, activations: Activations, workspace: Workspace, shape: PrefillShape
    ):
        self.model, self.kv, self.activations, self.workspace, self.shape = model, kv, activations, workspace, shape
        self.what, self.prompt_rows = f"prefill of {shape.rows} rows", PromptRows(shape, model.device)
        logits = (activations.logits(shape.chosen), None) if shape.scored else None
        self.out = logits or activations.partials(shape.chosen, "logits")

    @property
    def nbytes(self) -> int:
        """Memory that belongs to this pass alone."""
        return self.prompt_rows.nbytes

    def used_ops(self) -> tuple[str, ...]:
        return dispatch.OPS_BEFORE_LOGITS

    def run_eager(self) -> None:
        """Run from the embedding to logits or partial maxima; keys and values are written to the cache."""
        epilogue, out = ("logits", self.out[0]) if self.shape.scored else ("argmax", self.out)
        forward(
            self.model, self.kv, self.prompt_rows.rows, self.activations, self.workspace,
            logit_rows=self.prompt_rows.logit_rows, epilogue=epilogue, out=out,
        )  # fmt: skip

    run = Recorded.run_again
