"""A decode cycle as a fixed sequence of passes over static buffers: built once, run (or replayed) many times.

A cycle stages its first rows from the slots' state, then alternates forward and consensus; the consensus of one
pass stages the next. Nothing in it depends on the values in the state, so a CUDA graph (or, on the CPU, a
recorded tape of native calls) replays the whole cycle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orthrus_rt import dispatch, nvtx, ops
from orthrus_rt import state as st
from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.model import Activations, Model, Workspace, forward
from orthrus_rt.plan import Rows, empty_rows
from orthrus_rt.recording import Recorded
from orthrus_rt.state import SlotSampling, SlotState

COUPLED = 0  # purpose of the noise that both views share


@dataclass(eq=False)
class Pass:
    """One forward of a cycle and what becomes of its choices.

    Attributes:
        kind: NEXT_DRAFT, NEXT_VERIFY, NEXT_AR or NEXT_ONE_PASS: how its rows are staged.
        step: STEP_DRAFT, STEP_VERIFY or STEP_VERIFY_AND_DRAFT: what its choices are.
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


def _pass(model: Model, kind: int, slots: int, plan: CyclePlan, activations: Activations | None) -> Pass:
    """A pass whose choices are scored from logits in ``activations``, or if None by the head's own partial maxima."""
    length = 1 if kind == st.NEXT_AR else plan.block_len
    blocks = {st.NEXT_DRAFT: 1, st.NEXT_ONE_PASS: plan.fan_out}.get(kind, 0)
    verifies = 0 if kind == st.NEXT_DRAFT else 1
    rows = empty_rows(slots * verifies, length, slots * blocks, length, model.device)
    # Slot by slot, the slot's AR rows and then its blocks.
    row = torch.arange(rows.num_rows, dtype=torch.int32, device=model.device)
    ar = row[: rows.num_rows_ar].view(slots, verifies, length)
    diffusion = row[rows.num_rows_ar :].view(slots, blocks, length)
    if kind == st.NEXT_DRAFT:
        diffusion = diffusion[..., :-1]  # the last row predicts beyond the block
    picked = torch.cat([ar.flatten(1), diffusion.flatten(1)], 1)
    scored = activations is not None
    num_partials = st.num_score_tiles(model.config.vocab_size) if scored else model.lm_head.num_partials
    return Pass(
        kind=kind,
        step={st.NEXT_DRAFT: st.STEP_DRAFT, st.NEXT_ONE_PASS: st.STEP_VERIFY_AND_DRAFT}.get(kind, st.STEP_VERIFY),
        rows=rows,
        per_slot=picked.shape[1],
        logit_rows=picked.flatten().contiguous(),
        partials=st.empty_partials(picked.numel(), num_partials, model.device),
        logits=activations.logits(picked.numel()) if scored else None,
    )


KINDS = {"ar": [st.NEXT_AR], "two_pass": [st.NEXT_DRAFT, st.NEXT_VERIFY], "one_pass": [st.NEXT_ONE_PASS]}
PASS_NAMES = {st.STEP_DRAFT: "draft pass", st.STEP_VERIFY: "verify pass", st.STEP_VERIFY_AND_DRAFT: "one pass"}


class Cycle(Recorded):
    """The decode cycle of one plan over the slots of ``state``.

    ``two_pass`` is draft then verify, ``ar`` a verification without drafts, ``one_pass`` both at once: modes differ in
    their rows alone, and the next cycle may be of any plan.

    Args:
        sampling: None for greedy slots alone: choices come from partial maxima, no logits are materialised. Else the
            slots' sampling parameters.
        activations, workspace: shared with every other cycle; large enough for the plan's rows.
    """

    def __init__(
        self, model: Model, kv: PagedKvCache, state: SlotState, plan: CyclePlan, *, sampling, activations,
        workspace, max_seq_len,
    ):  # fmt: skip
        self.model, self.kv, self.state, self.plan = model, kv, state, plan
        self.sampling: SlotSampling | None = sampling
        self.activations: Activations = activations
        self.workspace: Workspace = workspace
        self.max_seq_len = max_seq_len
        scored = None if sampling is None else activations
        self.passes = [_pass(model, kind, state.num_slots, plan, scored) for kind in KINDS[plan.mode]]
        self.what = f"{plan.mode} cycle of {state.num_slots} slots"

    @nvtx.ranged(lambda self, p: PASS_NAMES[p.step])
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
        ops.consensus(
            self.state, partials, step, kind, rows, self.model.config.mask_token_id, self.plan.block_len,
            self.plan.fan_out,
        )  # fmt: skip

    def run_eager(self) -> None:
        """One cycle of every running slot, op by op."""
        self.stage_first()
        for p in self.passes:
            self.forward(p)
            if p.logits is not None:
                self.sample(p)
            self.take(p, p.partials)

    def used_ops(self) -> list[str]:
        unused = {"process_logits", "count_tokens"}
        if self.sampling is not None:
            unused = {"count_tokens"} if self.sampling.edits is None else set()
        return [op for op in dispatch.OPS if op not in unused]

    @nvtx.ranged(lambda self: f"{self.plan.mode} cycle")
    def run(self) -> None:
        """One cycle of every running slot: a replay where this device can record one. The first call runs op by op
        (which also warms the kernels up) and then records.
        """
        if self._replay is not None:
            return self._replay()
        self.run_eager()
        self.record()
