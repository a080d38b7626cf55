"""A decode cycle as a fixed sequence of passes over static buffers: built once, run (or replayed) many times.

A cycle is a list of :class:`Pass`; running one is a forward, a choice per row and a consensus that stages
the next pass's rows. Nothing in it depends on the values in the state, so a CUDA graph (or, on the CPU, a
recorded tape of native calls) replays the whole cycle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orthrus_rt import dispatch, ops
from orthrus_rt import state as st
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.model import Activations, Model, Workspace, forward
from orthrus_rt.plan import Rows, empty_rows
from orthrus_rt.state import SlotState

MODES = ("ar", "two_pass")


@dataclass
class Pass:
    """One forward of a cycle and what becomes of its choices.

    Attributes:
        rows: the static rows, staged by the consensus before it.
        logit_rows: int32, the rows whose choice is wanted, slot by slot.
        step: STEP_DRAFT or STEP_VERIFY.
        partials: ``(value, id)``, the greedy choices' partial maxima.
        next_pass, rows_next: what this pass's consensus stages.
    """

    rows: Rows
    logit_rows: torch.Tensor
    step: int
    partials: tuple[torch.Tensor, torch.Tensor]
    next_pass: int = st.NEXT_NONE
    rows_next: Rows | None = None


def _pass(model: Model, rows: Rows, per_slot: int, step: int) -> Pass:
    """A pass whose choices are those of the first ``per_slot`` rows of each group."""
    picked = rows.group_start[:-1, None] + torch.arange(per_slot, dtype=torch.int32, device=rows.device)
    shape = (picked.numel(), model.lm_head.num_partials)
    return Pass(
        rows=rows,
        logit_rows=picked.flatten().contiguous(),
        step=step,
        partials=(
            torch.empty(shape, dtype=torch.float32, device=model.device),
            torch.empty(shape, dtype=torch.int32, device=model.device),
        ),
    )


class Cycle:
    """The decode cycle of one mode and block length over all slots of ``state``.

    ``two_pass`` is draft then verify, ``ar`` a verification without drafts: the modes differ in their rows alone.
    """

    def __init__(self, model: Model, kv: PagedKvCache, state: SlotState, mode: str, *, max_seq_len: int):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.model, self.kv, self.state, self.mode = model, kv, state, mode
        self.max_seq_len = max_seq_len
        slots, block_len = state.num_slots, state.block_len
        device = model.device
        if mode == "ar":
            passes = [_pass(model, empty_rows(slots, 1, 0, 0, device), 1, st.STEP_VERIFY)]
            kinds = [st.NEXT_AR]
        else:
            passes = [
                _pass(model, empty_rows(0, 0, slots, block_len, device), block_len - 1, st.STEP_DRAFT),
                _pass(model, empty_rows(slots, block_len, 0, 0, device), block_len, st.STEP_VERIFY),
            ]
            kinds = [st.NEXT_DRAFT, st.NEXT_VERIFY]
        for i, p in enumerate(passes):
            following = (i + 1) % len(passes)
            p.next_pass, p.rows_next = kinds[following], passes[following].rows
        self.passes = passes
        max_rows = max(p.rows.num_rows for p in passes)
        self.activations = Activations(model, max_rows, max(p.rows.num_rows_diff for p in passes))
        self.workspace = Workspace.allocate(model, max_rows=max_rows, max_groups=slots, max_seq_len=max_seq_len)
        self._replay = None

    @property
    def first(self) -> tuple[int, Rows]:
        """What the consensus before this cycle must stage: ``(next_pass, rows_next)``."""
        return self.passes[-1].next_pass, self.passes[-1].rows_next

    def forward(self, p: Pass, epilogue: str, out) -> None:
        forward(
            self.model, self.kv, p.rows, self.activations, self.workspace,
            logit_rows=p.logit_rows, epilogue=epilogue, out=out, max_seq_len=self.max_seq_len,
        )  # fmt: skip

    def consensus(self, p: Pass, partials) -> None:
        ops.consensus(self.state, partials, p.step, p.next_pass, p.rows_next, self.model.config.mask_token_id)

    def run_eager(self) -> None:
        """One greedy cycle of every running slot, op by op."""
        for p in self.passes:
            self.forward(p, "argmax", p.partials)
            self.consensus(p, p.partials)

    def run(self) -> None:
        """One greedy cycle of every running slot: a graph replay where this device can record one.

        The first call runs eagerly (which also warms the kernels up), the second records.
        """
        if self._replay is None:
            self.run_eager()
            self._replay = self._record()
        else:
            self._replay()

    def _record(self):
        if self.model.device.type == "cuda":
            # Recording runs nothing, so the state stays as the eager cycle left it.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.run_eager()
            return graph.replay
        if self._all_native_cpu():
            tape = dispatch.native().cpu.Tape()
            with tape.record():
                self.run_eager()
            return tape.replay
        return self.run_eager

    def _all_native_cpu(self) -> bool:
        used = ("embed", "rms_norm", "row_linear", "qkv_commit", "dual_attn", "consensus")
        return all(dispatch.select(op, self.model.device, self.model.dtype) == "cpu" for op in used)
