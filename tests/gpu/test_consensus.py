"""CUDA consensus against its oracle on random states."""

import pytest
import torch

from orthrus_rt import ops, reference
from orthrus_rt import state as st
from tests import consensus_states as cs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("block_len", [1, 2, 16, 32])
@pytest.mark.parametrize("num_partials", [1, 37, 150])
def test_against_oracle(block_len, num_partials):
    for seed, (step, rows_per_slot, next_pass) in enumerate(cs.steps(block_len) * 3):
        slots = (1, 19, 256)[seed % 3]
        generator = torch.Generator().manual_seed(seed)
        state = cs.random_state(generator, slots, block_len)
        if rows_per_slot == 1 and block_len > 1:
            state.num_drafts.zero_()
        value, ids = cs.random_partials(generator, slots * rows_per_slot, num_partials)
        rows = cs.staged_rows(slots, block_len, next_pass)
        got_state, got_rows = cs.clone(state, "cuda"), cs.clone(rows, "cuda")
        partials = (None if num_partials == 1 else value.cuda(), ids.cuda())
        ops.consensus(got_state, partials, step, next_pass, got_rows, cs.MASK, block_len)
        torch.cuda.synchronize()
        plain = (None if num_partials == 1 else value, ids)
        reference.consensus(state, plain, step, next_pass, rows, cs.MASK, block_len)
        cs.assert_same(got_state, state)
        cs.assert_same(got_rows, rows)


@pytest.mark.parametrize("block_len", [2, 16, 32])
@pytest.mark.parametrize("fan_out", [1, 6, 46])
def test_one_pass_against_oracle(block_len, fan_out):
    for seed, (step, rows_per_slot, next_pass) in enumerate(cs.one_pass_steps(block_len, fan_out) * 3):
        slots = (1, 5, 33)[seed % 3]
        generator = torch.Generator().manual_seed(seed)
        state = cs.random_state(generator, slots, block_len, fan_out=fan_out)
        partials = cs.random_partials(generator, slots * rows_per_slot, (2, 37, 1187)[seed % 3], ties=False)
        if step == st.STEP_STAGE:
            partials = (None, None)
        rows = cs.staged_rows(slots, block_len, next_pass, fan_out)
        got_state, got_rows = cs.clone(state, "cuda"), cs.clone(rows, "cuda")
        on_device = tuple(x if x is None else x.cuda() for x in partials)
        ops.consensus(got_state, on_device, step, next_pass, got_rows, cs.MASK, block_len, fan_out)
        torch.cuda.synchronize()
        reference.consensus(state, partials, step, next_pass, rows, cs.MASK, block_len, fan_out)
        cs.assert_same(got_state, state)
        cs.assert_same(got_rows, rows)


def test_no_slots():
    state = cs.random_state(torch.Generator(), 0, 4)
    ids = torch.zeros(0, 1, dtype=torch.int32, device="cuda")
    ops.consensus(cs.clone(state, "cuda"), (None, ids), 1, 0, None, cs.MASK, 4)


def test_graph_replay():
    """Two verifications in a row under one graph equal two eager ones."""
    generator = torch.Generator().manual_seed(5)
    state = cs.random_state(generator, 9, 8)
    value, ids = (x.cuda() for x in cs.random_partials(generator, 72, 20))
    rows = cs.staged_rows(9, 8, 1)
    eager, eager_rows = cs.clone(state, "cuda"), cs.clone(rows, "cuda")
    for _ in range(2):
        ops.consensus(eager, (value, ids), 1, 1, eager_rows, cs.MASK, 8)
    replayed, replayed_rows = cs.clone(state, "cuda"), cs.clone(rows, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):
            ops.consensus(replayed, (value, ids), 1, 1, replayed_rows, cs.MASK, 8)
    graph.replay()
    cs.assert_same(replayed, eager)
    cs.assert_same(replayed_rows, eager_rows)
