"""What the host reads of every slot after a cycle, in one piece of memory so that one copy transfers it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from orthrus_rt import state as st
from orthrus_rt.acceptance import Outcome

SCALARS = ("finish", "num_output", "num_verified", "num_accepted")


class Result(NamedTuple):
    """Result of one slot, as :class:`orthrus_rt.state.SlotState` describes it; ``tokens`` are those new to the host."""

    finish: int
    num_verified: int
    num_accepted: int
    tokens: list[int]

    def outcome(self, fresh: bool = False) -> Outcome:
        """What became of its drafts; ``fresh``: this was the sequence's first cycle."""
        cut = self.finish != st.RUNNING and len(self.tokens) == self.num_accepted
        return Outcome(self.num_verified, self.num_accepted, cut, fresh)


class SlotResults:
    """These fields of SlotState for ``num_slots`` slots, as views of one int32 tensor: ``SCALARS`` and ``output``.

    Args:
        output_capacity: tokens per slot in the ring of emitted tokens.
        pinned: in page-locked host memory.
    """

    def __init__(self, num_slots: int, output_capacity: int, device, *, pinned: bool = False):
        words = num_slots * (len(SCALARS) + output_capacity)
        self.memory = torch.empty(words, dtype=torch.int32, device=device, pin_memory=pinned)
        scalars, output = self.memory.split([num_slots * len(SCALARS), num_slots * output_capacity])
        columns = scalars.view(len(SCALARS), num_slots)
        self.views = dict(zip(SCALARS, columns, strict=True))
        self.views["output"] = output.view(num_slots, output_capacity)
        if self.memory.device.type == "cpu":
            self._scalars = columns.numpy()
            self._rings = [memoryview(ring) for ring in self.views["output"].numpy()]

    def read(self, seen: list[tuple[int, int]]) -> list[Result]:
        """For each ``(slot, num_seen)`` the slot's result, with the tokens that it emitted after its first
        ``num_seen``. For results in host memory only.
        """
        finish, num_output, num_verified, num_accepted = self._scalars.tolist()
        return [
            Result(finish[slot], num_verified[slot], num_accepted[slot], self._emitted(slot, first, num_output[slot]))
            for slot, first in seen
        ]

    def _emitted(self, slot: int, first: int, end: int) -> list[int]:
        ring = self._rings[slot]
        turn, first = divmod(first, len(ring))
        end -= turn * len(ring)
        if end <= len(ring):
            return ring[first:end].tolist()
        return ring[first:].tolist() + ring[: end - len(ring)].tolist()
