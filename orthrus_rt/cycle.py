"""A decode cycle: a fixed sequence of passes over static buffers, built once and run (or replayed) many times.

A cycle stages its first rows from the slots' state, then alternates forward and consensus; the consensus of one
pass stages the next. Nothing in it depends on the values in the state, so a CUDA graph (or, on the CPU, a
recorded tape of native calls) replays the whole cycle.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from orthrus_rt import dispatch, nvtx, ops
from orthrus_rt import state as st
from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.model import Activations, Model, Workspace, forward
from orthrus_rt.prefill import PrefillShape, PromptRows
from orthrus_rt.recording import Recorded, replay, taped
from orthrus_rt.rows import Layout, Rows, empty_rows
from orthrus_rt.state import SlotSampling, SlotState
from orthrus_rt.uploads import upload

COUPLED = 0  # purpose of the noise that both views share


@dataclass(eq=False)
class Pass:
    """One forward of a cycle, and how its choices are used.

    Attributes:
        kind: NEXT_DRAFT, NEXT_VERIFY, NEXT_AR or NEXT_ONE_PASS: says how its rows are staged.
        step: STEP_DRAFT, STEP_VERIFY or STEP_VERIFY_AND_DRAFT: says what its choices are.
        rows: all of its rows, in static buffers.
        own: the rows that the preceding consensus stages.
        prompt_rows: the rows of prompts, which come first; None if there are none.
        per_slot: choices per slot.
        logit_rows: int32, the rows that choose a token: slot by slot, then those of prompts.
        out: ``(value, id)``, partial maxima of their logits or scores; all passes share the memory.
        partials: the part of ``out`` that belongs to the slots.
        logits: fp32 ``[len(logit_rows), vocab_size]``, also shared; None if no logits are materialised.
    """

    kind: int
    step: int
    rows: Rows
    own: Rows
    prompt_rows: PromptRows | None
    per_slot: int
    logit_rows: torch.Tensor
    out: tuple[torch.Tensor, torch.Tensor]
    partials: tuple[torch.Tensor, torch.Tensor]
    logits: torch.Tensor | None


def _pass(
    kind: int, model: Model, slots: int, plan: CyclePlan, activations: Activations, scored: bool,
    shape: PrefillShape | None,
) -> Pass:  # fmt: skip
    """Build a pass. Its choices are ``scored`` from logits, or else are the head's own partial maxima. ``shape`` is the
    shape of the prompts in it, if any.
    """
    drafts = kind == st.NEXT_DRAFT
    length = plan.draft_rows(model.config.block_len) if drafts else plan.block_len
    ar_groups, blocks = (0, 1) if drafts else (slots, plan.fan_out)
    layout = Layout(ar_groups, length, slots * blocks, length, max(blocks, 1))
    # Slot by slot: its AR rows, then its blocks.
    row = np.arange(layout.num_rows, dtype=np.int32)
    ar, diffusion = np.split(row, [ar_groups * length])
    diffusion = diffusion.reshape(slots, blocks, length)
    if drafts:
        diffusion = diffusion[..., : plan.block_len - 1]  # the last row of a whole block predicts beyond it
    picked = np.concatenate([ar.reshape(slots, -1), diffusion.reshape(slots, -1)], 1)
    if shape is None:
        prompt_rows, logit_rows = None, upload(picked.flatten(), torch.int32, model.device)
        rows = own = empty_rows(layout, model.device)
    else:
        prompt_rows = PromptRows(shape, model.device, layout, picked.flatten())
        rows, own, logit_rows = prompt_rows.rows, prompt_rows.own, prompt_rows.logit_rows
    n = logit_rows.shape[0]
    out = activations.partials(n, "scores" if scored else "logits")
    return Pass(
        kind=kind,
        step={st.NEXT_DRAFT: st.STEP_DRAFT, st.NEXT_ONE_PASS: st.STEP_VERIFY_AND_DRAFT}.get(kind, st.STEP_VERIFY),
        rows=rows,
        own=own,
        prompt_rows=prompt_rows,
        per_slot=picked.shape[1],
        logit_rows=logit_rows,
        out=out,
        partials=tuple(t[: picked.size] for t in out),
        logits=activations.logits(n) if scored else None,
    )


KINDS = {"ar": [st.NEXT_AR], "two_pass": [st.NEXT_DRAFT, st.NEXT_VERIFY], "one_pass": [st.NEXT_ONE_PASS]}
PASS_NAMES = {st.STEP_DRAFT: "draft pass", st.STEP_VERIFY: "verify pass", st.STEP_VERIFY_AND_DRAFT: "one pass"}


class Cycle(Recorded):
    """The decode cycle of one plan over the slots of ``state``.

    ``two_pass`` drafts, then verifies; ``ar`` verifies without drafts; ``one_pass`` does both at once. Modes differ in
    their rows alone, and the next cycle may be of any plan.

    Args:
        state: of all slots.
        num_slots: how many of them run, counted from the first.
        sampling: None if all slots are greedy: choices come from partial maxima and no logits are materialised.
            Otherwise the slots' sampling parameters.
        activations, workspace: shared with every other cycle; large enough for the plan's rows.
        shape: of the prompts whose rows its last pass includes, if any; then load ``prompt_rows`` before every run.
        plain: with prompts, the same cycle without them; all its passes but the last are shared.
    """

    def __init__(
        self, model: Model, kv: PagedKvCache, state: SlotState, num_slots: int, plan: CyclePlan, *, sampling,
        activations, workspace, shape: PrefillShape | None, plain: Cycle | None,
    ):  # fmt: skip
        self.model, self.kv, self.plan = model, kv, plan
        self.state, self._cache_seqlens = state.view(slice(0, num_slots)), state.cache_seqlens
        self.sampling: SlotSampling | None = sampling
        self.activations: Activations = activations
        self.workspace: Workspace = workspace
        common = model, num_slots, plan, activations, sampling is not None
        *before, last = KINDS[plan.mode]
        if plain is None:
            self.passes, self._tapes = [_pass(kind, *common, None) for kind in before], {}
        else:
            self.passes, self._tapes = plain.passes[:-1], plain.tapes
        self.passes.append(_pass(last, *common, shape))
        self.prompt_rows = self.passes[-1].prompt_rows
        with_prompts = "" if shape is None else f" with {shape.rows} rows of prompts"
        self.what = f"{plan.mode} cycle of {num_slots} slots{with_prompts}"

    @property
    def first_choices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial maxima of the prompts' rows that choose a token."""
        last = self.passes[-1]
        return tuple(t[last.partials[0].shape[0] :] for t in last.out)

    @nvtx.ranged(lambda self, p: PASS_NAMES[p.step])
    def forward(self, p: Pass) -> None:
        """Run pass ``p`` up to its logits, or up to its partial maxima if no logits are materialised."""
        if p in self._tapes:
            return replay(self._tapes[p])
        epilogue, out = ("argmax", p.out) if p.logits is None else ("logits", p.logits)
        forward(
            self.model, self.kv, p.rows, self.activations, self.workspace,
            logit_rows=p.logit_rows, epilogue=epilogue, out=out, exact=p.step != st.STEP_DRAFT,
        )  # fmt: skip

    @functools.cached_property
    def tapes(self) -> dict[Pass, object]:
        """Tapes of all passes but the last, on the CPU; a cycle with prompts, taped for a single run, reuses them."""
        return self._taped(self.passes[:-1])

    def _taped(self, passes: list[Pass]) -> dict[Pass, object]:
        if self.model.device.type != "cpu" or not self.can_record:
            return {}
        return {p: taped(functools.partial(self.forward, p)) for p in passes}

    def replay_forwards(self) -> None:
        """Replay forwards from here on, if this device can: a cycle run pass by pass then needs no Python per layer."""
        self._tapes = self._tapes or self.tapes | self._taped(self.passes[-1:])

    @property
    def nbytes(self) -> int:
        """Memory of the rows of its own passes."""
        passes = self.passes if self.prompt_rows is None else self.passes[-1:]
        held = (t for p in passes for t in (*vars(p.rows).values(), p.logit_rows))
        return sum(t.nbytes for t in held if isinstance(t, torch.Tensor))

    def stage_first(self) -> None:
        """Stage the first pass's rows from the current state, and count the emitted tokens for penalties."""
        if self.sampling is not None and self.sampling.edits is not None:
            ops.count_tokens(self.state, self.sampling.edits)
        first = self.passes[0]
        self._consensus(st.STEP_STAGE, (None, None), first, first.own.max_group_rows)

    def sample(self, p: Pass) -> None:
        """Write coupled choices from the logits of pass ``p`` into its partials."""
        # The lengths of all slots, as a prompt may be in any of them.
        ops.process_logits(p.logits, p.rows, p.logit_rows, self.sampling, self._cache_seqlens, COUPLED, p.out)

    def take(self, p: Pass, partials) -> None:
        """Take the choices of pass ``p`` and stage the pass after it, if there is one."""
        following = self.passes.index(p) + 1
        staged = self.passes[following] if following < len(self.passes) else None
        self._consensus(p.step, partials, staged, self.plan.block_len)

    def _consensus(self, step: int, partials, staged: Pass | None, block_len: int) -> None:
        kind, rows = (staged.kind, staged.own) if staged else (st.NEXT_NONE, None)
        ops.consensus(
            self.state, partials, step, kind, rows, self.model.config.mask_token_id, block_len, self.plan.fan_out
        )

    def run_eager(self) -> None:
        """Run one cycle of every running slot, op by op."""
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
        """Run one cycle of every running slot, as a replay where this device can record one. The first call runs op by
        op (which also warms the kernels up) and then records. A cycle with prompts is recorded on its second call, if
        there is one.
        """
        if self.prompt_rows is not None:
            return self.run_again()
        if self.settled:
            return self.run_settled()
        self.run_eager()
        self.record()
