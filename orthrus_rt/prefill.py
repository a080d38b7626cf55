"""Prefill: prompts' tokens through the AR view.

Where a device records, in passes of few shapes, each replayed from its second use on: launched op by op, the shortest
prompt takes the host milliseconds, in which a GPU waits, and with it all who decode.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from orthrus_rt import dispatch
from orthrus_rt import state as st
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.model import Activations, Model, Workspace, forward
from orthrus_rt.plan import Chunk, Rows, lay_out
from orthrus_rt.recording import Recorded

TILE = 128  # rows of row_linear's tiles in a prefill on sm_90: what pads the last one costs nothing
LEAST = 16  # rows of its narrowest


@dataclass(frozen=True)
class PrefillShape:
    """Rows, their groups (one a prompt, and one of padding), the most rows of a group, prompts that end and so choose a
    token, and whether their logits are materialised.
    """

    rows: int
    groups: int
    tallest: int
    chosen: int
    scored: bool

    def padded(self, max_rows: int, num_slots: int) -> PrefillShape:
        """The next of the few shapes; with a group more, for the padding."""
        rows = max(self.rows, min(round_up(self.rows), max_rows))
        tallest = rows if self.groups == 1 else min(rows, round_up(max(self.tallest, rows - self.rows)))
        chosen = min(round_up(self.chosen), num_slots) if self.chosen else 0
        return PrefillShape(rows, 1 + (1 << (self.groups - 1).bit_length()), tallest, chosen, self.scored)


def round_up(rows: int) -> int:
    """To a power of two, from one tile on to whole tiles.

    >>> [round_up(n) for n in (1, 17, 100, 129, 300)]
    [16, 32, 128, 256, 384]
    """
    return -(-rows // TILE) * TILE if rows > TILE else 1 << (max(rows, LEAST) - 1).bit_length()


class PrefillPass(Recorded):
    """A pass of one shape over static buffers: :meth:`load`, then :meth:`run`.

    Attributes:
        rows: all AR. picked: int32 ``[chosen]``, the rows that choose a token; None if there are none.
        out: ``(value, id)``, of ``chosen`` rows: fp32 logits, shared by all passes (id None), or partial maxima.
    """

    def __init__(
        self, model: Model, kv: PagedKvCache, activations: Activations, workspace: Workspace, max_seq_len: int,
        shape: PrefillShape,
    ):  # fmt: skip
        self.model, self.kv, self.activations, self.workspace = model, kv, activations, workspace
        self.max_seq_len, self.shape = max_seq_len, shape
        self.what, self._warm = f"prefill of {shape.rows} rows", False
        n, width = shape.rows, -(-shape.rows // 4) * 4  # every array begins at a multiple of 16 bytes: see empty_rows
        at = 4 * width + -(-(shape.groups + 1) // 4) * 4
        self._buffer = torch.zeros(at + shape.chosen, dtype=torch.int32, device=model.device)
        self._host = np.zeros(self._buffer.shape, dtype=np.int32)
        token, position, seq, prefix_len = self._buffer[: 4 * width].view(4, width)[:, :n]
        group_start = self._buffer[4 * width :][: shape.groups + 1]
        self.rows = Rows(token, position, seq, prefix_len, group_start, n, shape.groups, shape.tallest)
        self._fields = self._host[: 4 * width].reshape(4, width)[:, :n]
        self._group_start = self._host[4 * width :][: shape.groups + 1]
        self._picked = self._host[at:]
        self.picked = self._buffer[at:] if shape.chosen else None
        if shape.scored:
            self.out = activations.logits(shape.chosen), None
        else:
            self.out = st.empty_partials(shape.chosen, model.lm_head.num_partials, model.device)

    @property
    def nbytes(self) -> int:
        """Of what it has for itself."""
        return self._buffer.nbytes + (0 if self.shape.scored else sum(t.nbytes for t in self.out))

    def load(self, chunks: list[Chunk], picked: list[int]) -> None:
        """The next :meth:`run` is of these; ``picked`` are the rows that choose."""
        lay_out(chunks, self._fields, self._group_start)
        self._picked[: len(picked)] = picked
        self._buffer.copy_(torch.from_numpy(self._host), non_blocking=True)  # pageable: staged before it returns

    def used_ops(self) -> tuple[str, ...]:
        return dispatch.OPS_BEFORE_LOGITS

    def run_eager(self) -> None:
        """From embedding to logits or partial maxima; keys and values land in the cache."""
        epilogue, out = ("logits", self.out[0]) if self.shape.scored else ("argmax", self.out)
        forward(
            self.model, self.kv, self.rows, self.activations, self.workspace, logit_rows=self.picked,
            epilogue=epilogue, out=out, max_seq_len=self.max_seq_len,
        )  # fmt: skip

    @property
    def records(self) -> bool:
        """Whether the next :meth:`run` does."""
        return self._warm and not self.recorded

    def run(self) -> None:
        """A replay from the second time on: not every shape comes again, and the first time warms the kernels up.
        Where passes are not kept there is no second time.
        """
        if self.records:
            self.record()
        (self._replay or self.run_eager)()
        self._warm = True
