"""Consensus against its oracle on random decode states, with every way a cycle can end."""

from __future__ import annotations

import copy
import dataclasses
import functools

import torch

from orthrus_rt import reference
from orthrus_rt import state as st
from orthrus_rt.rows import Layout, empty_rows

MASK = 99


def random_state(generator, slots, block_len, fan_out=0) -> st.SlotState:
    """Slots of every FinishReason, drafts from a tiny vocabulary, limits near and far, rings about to wrap, and stop
    ids in any of the places that the engine has for them.

    The blocks of the state are longer than ``block_len``, and it has room for more than ``fan_out`` hypotheses.
    """

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    ring = max(7, block_len + 1)
    state = st.SlotState.allocate(slots, block_len + 2, ring, 70, "cpu", max_fan_out=fan_out + 1)
    state.cache_seqlens.copy_(draw(0, 50, slots))
    state.limit.copy_(state.cache_seqlens + 1 + draw(0, 2 * block_len, slots))
    state.block_tokens.copy_(draw(0, 3, *state.block_tokens.shape))
    state.num_drafts.copy_(draw(0, block_len, slots))
    state.stop_ids.fill_(-1).scatter_(1, draw(0, 70, slots, 2).long(), draw(-1, 5, slots, 2))
    state.finish.copy_(torch.where(draw(0, 4, slots) > 0, st.RUNNING, draw(-1, 4, slots)))
    state.num_output.copy_(draw(0, 100, slots))
    state.output.copy_(draw(0, 3, *state.output.shape))
    state.runner_up.copy_(draw(0, 3, *state.runner_up.shape))
    likely = torch.rand(*state.draft_prob.shape[:2], st.CANDIDATES + 1, generator=generator) ** 3
    state.draft_prob.copy_((likely / likely.sum(-1, keepdim=True)).sort(-1, descending=True).values[..., :-1])
    accepted = draw(-1, block_len, slots, fan_out + 1).minimum(state.num_drafts[:, None])
    anchor = draw(-1, 3, slots, fan_out + 1)
    state.hypotheses.copy_(torch.stack([accepted, torch.where(accepted < state.num_drafts[:, None], anchor, -1)], -1))
    return state


def random_partials(generator, rows, num_partials, ties=True):
    """Partial maxima of ``rows`` rows: ids ascend from partial to partial, values have many ties or none, some are -inf
    and some NaN. A tenth of the rows holds nothing but -inf or NaN.
    """
    value = torch.randint(0, 6, (rows, num_partials), generator=generator).float()
    if not ties:
        value += torch.rand(value.shape, generator=generator)
    luck = torch.rand(value.shape, generator=generator)
    luck[torch.rand(rows, generator=generator) < 0.1] *= 0.1
    value[luck < 0.1] = -torch.inf
    value[luck < 0.04] = torch.nan
    ids = torch.randint(0, 3, (rows, num_partials), generator=generator, dtype=torch.int32)
    return value, ids + torch.arange(num_partials, dtype=torch.int32) * 3


def steps(block_len):
    """(step, choice rows per slot, next pass): all combinations that ``ar`` and ``two_pass`` use, and more."""
    choices = [(st.STEP_STAGE, 0), (st.STEP_VERIFY, block_len), (st.STEP_VERIFY, 1)]
    choices += [(st.STEP_DRAFT, block_len - 1)] if block_len > 1 else []
    passes = (st.NEXT_NONE, st.NEXT_DRAFT, st.NEXT_VERIFY, st.NEXT_AR)
    return [(*choice, next_pass) for choice in choices for next_pass in passes]


def one_pass_steps(block_len, fan_out):
    """The same for ``one_pass``, and for a change to or from it."""
    rows = block_len * (1 + fan_out)
    verify = [(st.STEP_VERIFY_AND_DRAFT, rows, n) for n in (st.NEXT_NONE, st.NEXT_ONE_PASS, st.NEXT_DRAFT)]
    return [*verify, *((st.STEP_STAGE, 0, n) for n in (st.NEXT_ONE_PASS, st.NEXT_AR))]


def staged_rows(slots, block_len, next_pass, fan_out=0):
    """Rows for ``next_pass`` with poison in every field that must be written; None for NEXT_NONE."""
    if next_pass == st.NEXT_NONE:
        return None
    blocks = slots * fan_out if next_pass == st.NEXT_ONE_PASS else 0
    rows = empty_rows(Layout(slots, 1 if next_pass == st.NEXT_AR else block_len, blocks, block_len), "cpu")
    for name in ("token", "position", "seq", "prefix_len"):
        getattr(rows, name).fill_(-77)
    return rows


def clone(value, device="cpu"):
    """A deep copy of a state or rows on ``device``."""
    if value is None:
        return None
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    moved = {k: v.to(device, copy=True) if isinstance(v, torch.Tensor) else copy.copy(v) for k, v in fields.items()}
    return type(value)(**moved)


def assert_same(got, want):
    """Equality of two states or two rows, field by field."""
    if want is None:
        return
    for f in dataclasses.fields(want):
        a, b = getattr(got, f.name), getattr(want, f.name)
        if f.name == "draft_prob":
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-7, msg=f.name)
        elif isinstance(b, torch.Tensor):
            assert torch.equal(a.cpu(), b.cpu()), f.name


@functools.lru_cache(maxsize=64)  # the cases of one grid point, for all kernels that are tested there
def solved(seed, case, slots, block_len, num_partials, fan_out):
    """``(before, partials, after)``, where ``before`` and ``after`` are pairs of a state and rows, and ``after`` is the
    oracle's result. Callers only read them.
    """
    step, rows_per_slot, next_pass = case
    generator = torch.Generator().manual_seed(seed)
    state = random_state(generator, slots, block_len, fan_out)
    partials = random_partials(generator, slots * rows_per_slot, num_partials, ties=not fan_out)
    if step == st.STEP_STAGE:
        partials = (None, None)
    rows = staged_rows(slots, block_len, next_pass, fan_out)
    before = clone(state), clone(rows)
    reference.consensus(state, partials, step, next_pass, rows, MASK, block_len, fan_out)
    return before, partials, (state, rows)


def check(consensus, seed, case, slots, block_len, num_partials, fan_out=0, device="cpu"):
    """Check that ``consensus`` gives what the oracle gives, in a ``case`` of :func:`steps` or, with ``fan_out``, of
    :func:`one_pass_steps`.
    """
    step, _, next_pass = case
    before, partials, after = solved(seed, case, slots, block_len, num_partials, fan_out)
    state, rows = (clone(value, device) for value in before)
    on_device = tuple(x if x is None else x.to(device, copy=True) for x in partials)
    consensus(state, on_device, step, next_pass, rows, MASK, block_len, fan_out)
    assert_same(state, after[0])
    assert_same(rows, after[1])
