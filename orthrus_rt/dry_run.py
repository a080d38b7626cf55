"""Cycles as in the middle of decoding, without requests: what a profile and a warm-up time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from orthrus_rt import state as st
from orthrus_rt.cycle import Cycle
from orthrus_rt.cycle_plan import CyclePlan, batch_bucket
from orthrus_rt.exclusive import torn_if_cut
from orthrus_rt.kv import OutOfPages

DRAFT_PROB = [0.8, 0.1, 0.05]  # probabilities of a draft and its runners-up


def most_context(engine, plans: list[CyclePlan]) -> int:
    """The most committed tokens that leave a valid position for every row of these plans' cycles."""
    blocks = 2 if any(plan.mode == "one_pass" for plan in plans) else 1  # its drafts begin up to a block ahead
    return engine.max_seq_len - blocks * engine.config.block_len


@contextlib.contextmanager
def dry_cycles(engine, plans: list[CyclePlan], slots: int, context: int) -> Iterator[Callable[[CyclePlan], Cycle]]:
    """Yields ``start(plan)``, which returns the plan's cycle, ready to run for ``slots`` running sequences with
    ``context`` committed tokens each.

    Keys and values are random. Every slot has K-1 drafts that look likely, so that a one-pass cycle is as in the middle
    of decoding: all its rows are valid. The engine's own pages are borrowed and returned; cached prefixes are evicted
    only if blank pages run out. Its buffers are restored. No request may be running, and the caller holds the engine's
    turn. An interrupt in here leaves the engine torn, as in any other call.

    Raises:
        ValueError: the engine has too few slots, pages or positions.
    """
    runner, state, kv = engine.runner, engine.runner.state, engine.kv
    if not 1 <= slots <= runner.num_slots:
        raise ValueError(f"batch must be within [1, {runner.num_slots}] (max_batch_size), got {slots}")
    most = most_context(engine, plans)
    if not 1 <= context <= most:
        positions = engine.max_seq_len - most
        less = {1: "a block", 2: "two blocks"}[positions // engine.config.block_len]
        if most < 1:
            raise ValueError(f"max_seq_len must be above {positions} ({less}), got {engine.max_seq_len}")
        raise ValueError(f"context must be within [1, {most}] (max_seq_len less {less}), got {context}")
    random = torch.Generator(kv.pages.device).manual_seed(0)  # its own: the caller's random numbers are not used up
    runner_up = torch.tensor([2, 3], dtype=torch.int32, device=state.runner_up.device)
    draft_prob = torch.tensor(DRAFT_PROB, dtype=torch.float32, device=state.draft_prob.device)

    def start(plan: CyclePlan) -> Cycle:
        state.cache_seqlens.fill_(context)
        state.limit.fill_(engine.max_seq_len)
        state.stop_ids.fill_(-1)
        state.num_drafts.fill_(plan.block_len - 1)
        state.block_tokens.fill_(1)
        state.runner_up.copy_(runner_up)
        state.draft_prob.copy_(draft_prob)
        state.num_output.zero_()
        state.finish.fill_(st.EMPTY)
        state.finish[:slots] = st.RUNNING
        return runner.cycle(plan, slots)

    with torn_if_cut(engine):
        engine._collect(0)  # cycles in flight belong to requests that have ended: read them first
        runner.make_room([(plan, batch_bucket(slots, runner.num_slots)) for plan in plans])
        before = [tensor.clone() for tensor in vars(state).values()]
        try:
            for slot in range(slots):
                kv.reserve(slot, context + engine.config.block_len)
            for page in set(kv.page_table[:slots].flatten().tolist()):
                kv.pages[:, :, page].normal_(generator=random)
            yield start
        except OutOfPages as error:
            raise ValueError(f"batch {slots} with context {context} does not fit: {error}") from error
        finally:
            for slot in range(slots):
                kv.release(slot)
            for tensor, was in zip(vars(state).values(), before, strict=True):
                tensor.copy_(was)
