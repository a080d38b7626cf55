"""A decode cycle as a fixed sequence of passes over static buffers: built once, run (or replayed) many times.

A cycle stages its first rows from the slots' state, then alternates forward and consensus; the consensus of one
pass stages the next. Nothing in it depends on the values in the state, so a CUDA graph (or, on the CPU, a
recorded tape of native calls) replays the whole cycle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from orthrus_rt import dispatch, nvtx, ops
from orthrus_rt import state as st
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.memory import naming_the_knobs
from orthrus_rt.model import Activations, Model, Workspace, forward
from orthrus_rt.plan import Rows, empty_rows
from orthrus_rt.state import SlotSampling, SlotState

MODES = ("ar", "two_pass")
COUPLED = 0  # purpose of the noise that both views share


@dataclass
class Pass:
    """One forward of a cycle and what becomes of its choices.

    Attributes:
        kind: NEXT_DRAFT, NEXT_VERIFY or NEXT_AR: how its rows are staged.
        step: STEP_DRAFT or STEP_VERIFY: what its choices are.
        rows: static; staged by the consensus before it.
        per_slot: choices per slot. logit_rows: int32, the rows they belong to, slot by slot.
        partials: ``(value, id)``, the choices' partial maxima, of logits or of scores.
        logits: fp32 ``[len(logit_rows), vocab_size]`` that every pass shares; None where none are materialised.
    """

    kind: int
    step: int
    rows: Rows
    per_slot: int
    logit_rows: torch.Tensor
    partials: tuple[torch.Tensor, torch.Tensor]
    logits: torch.Tensor | None


def _pass(model: Model, kind: int, slots: int, block_len: int, activations: Activations | None) -> Pass:
    """A pass whose choices are scored from logits in ``activations``, or if None by the head's own partial maxima."""
    draft = kind == st.NEXT_DRAFT
    rows_each = 1 if kind == st.NEXT_AR else block_len
    groups = (0, 0, slots, rows_each) if draft else (slots, rows_each, 0, 0)
    rows = empty_rows(*groups, model.device)
    per_slot = rows_each - 1 if draft else rows_each  # a block's last row predicts beyond the block
    picked = rows.group_start[:-1, None] + torch.arange(per_slot, dtype=torch.int32, device=model.device)
    scored = activations is not None
    num_partials = st.num_score_tiles(model.config.vocab_size) if scored else model.lm_head.num_partials
    return Pass(
        kind=kind,
        step=st.STEP_DRAFT if draft else st.STEP_VERIFY,
        rows=rows,
        per_slot=per_slot,
        logit_rows=picked.flatten().contiguous(),
        partials=st.empty_partials(picked.numel(), num_partials, model.device),
        logits=activations.logits(picked.numel()) if scored else None,
    )


@functools.cache
def _shared_pool():
    """One memory pool for every graph: only one replays at a time."""
    return torch.cuda.graph_pool_handle()


class Cycle:
    """The decode cycle of one mode and block length over the slots of ``state``.

    ``two_pass`` is draft then verify, ``ar`` a verification without drafts: modes differ in their rows alone.

    Args:
        sampling: None for greedy slots alone: choices come from partial maxima, no logits are materialised. Else the
            slots' sampling parameters.
        activations, workspace: shared with every other cycle; large enough for ``num_slots * block_len`` rows.
    """

    def __init__(
        self, model: Model, kv: PagedKvCache, state: SlotState, mode: str, *, sampling, activations, workspace,
        max_seq_len,
    ):  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.model, self.kv, self.state, self.mode = model, kv, state, mode
        self.sampling: SlotSampling | None = sampling
        self.activations: Activations = activations
        self.workspace: Workspace = workspace
        self.max_seq_len = max_seq_len
        kinds = [st.NEXT_AR] if mode == "ar" else [st.NEXT_DRAFT, st.NEXT_VERIFY]
        scored = None if sampling is None else activations
        self.passes = [_pass(model, kind, state.num_slots, state.block_len, scored) for kind in kinds]
        self._replay: Callable[[], None] | None = None
        self.graph_bytes = 0

    @nvtx.ranged(lambda self, p: "draft pass" if p.step == st.STEP_DRAFT else "verify pass")
    def forward(self, p: Pass) -> None:
        """Push pass ``p`` to its logits, or where none are materialised to its partial maxima."""
        epilogue, out = ("argmax", p.partials) if p.logits is None else ("logits", p.logits)
        forward(
            self.model, self.kv, p.rows, self.activations, self.workspace,
            logit_rows=p.logit_rows, epilogue=epilogue, out=out, max_seq_len=self.max_seq_len,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Of the passes' static buffers."""
        held = (t for p in self.passes for t in (*vars(p.rows).values(), p.logit_rows, *p.partials))
        return sum(t.nbytes for t in held if isinstance(t, torch.Tensor))

    def stage_first(self) -> None:
        """Stage the first pass's rows from the state as it is, and count for penalties what it has emitted."""
        if self.sampling is not None and self.sampling.edits is not None:
            ops.count_tokens(self.state, self.sampling.edits)
        self._consensus(st.STEP_STAGE, (None, None), self.passes[0])

    def sample(self, p: Pass) -> None:
        """Coupled choices from the logits of pass ``p``, into its partials."""
        seqlens = self.state.cache_seqlens
        ops.process_logits(p.logits, p.rows, p.logit_rows, self.sampling, seqlens, COUPLED, p.partials)

    def take(self, p: Pass, partials) -> None:
        """Take the choices of pass ``p`` and stage the pass after it, if there is one."""
        following = self.passes.index(p) + 1
        self._consensus(p.step, partials, self.passes[following] if following < len(self.passes) else None)

    def _consensus(self, step: int, partials, staged: Pass | None) -> None:
        kind, rows = (staged.kind, staged.rows) if staged else (st.NEXT_NONE, None)
        ops.consensus(self.state, partials, step, kind, rows, self.model.config.mask_token_id)

    def run_eager(self) -> None:
        """One cycle of every running slot, op by op."""
        self.stage_first()
        for p in self.passes:
            self.forward(p)
            if p.logits is not None:
                self.sample(p)
            self.take(p, p.partials)

    @nvtx.ranged(lambda self: f"{self.mode} cycle")
    def run(self) -> None:
        """One cycle of every running slot: a replay where this device can record one.

        The first call runs eagerly (which also warms the kernels up) and then records.
        """
        if self._replay is None:
            with naming_the_knobs(f"recording the {self.mode} cycle of {self.state.num_slots} slots"):
                self.run_eager()
                self._replay = self._record()
        else:
            self._replay()

    def _record(self) -> Callable[[], None]:
        # Recording runs nothing: the state stays as the eager cycle left it.
        unused = {"process_logits", "count_tokens"}
        if self.sampling is not None:
            unused = {"count_tokens"} if self.sampling.edits is None else set()
        used = (op for op in dispatch.OPS if op not in unused)
        chosen = {dispatch.select(op, self.model.device, self.model.dtype) for op in used}
        if "reference" in chosen:  # it reads values on the host, which no recording can
            return self.run_eager
        if self.model.device.type == "cpu":
            tape = dispatch.native().cpu.Tape()
            with tape.record():
                self.run_eager()
            return tape.replay
        before = torch.cuda.memory_reserved(self.model.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_shared_pool()):
            self.run_eager()
        self.graph_bytes = torch.cuda.memory_reserved(self.model.device) - before
        return graph.replay
