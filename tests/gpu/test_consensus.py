"""CUDA consensus against its oracle on random states."""

import time

import pytest
import torch

from orthrus_rt import ops
from orthrus_rt import state as st
from tests import consensus_states as cs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("block_len", [1, 2, 16, 32])
@pytest.mark.parametrize("num_partials", [1, 37, 150])
def test_against_oracle(block_len, num_partials):
    for seed, case in enumerate(cs.steps(block_len) * 3):
        cs.check(ops.consensus, seed, case, (1, 19, 256)[seed % 3], block_len, num_partials, device="cuda")


@pytest.mark.parametrize("block_len", [2, 16, 32])
@pytest.mark.parametrize("fan_out", [1, 6, 46])
def test_one_pass_against_oracle(block_len, fan_out):
    for seed, case in enumerate(cs.one_pass_steps(block_len, fan_out) * 3):
        slots, num_partials = (1, 5, 33)[seed % 3], (2, 37, 1187)[seed % 3]
        cs.check(ops.consensus, seed, case, slots, block_len, num_partials, fan_out, device="cuda")


def test_no_slots():
    """Nothing is launched: a grid of no blocks would be an error."""
    state = cs.clone(cs.random_state(torch.Generator(), 0, 4), "cuda")
    partials = torch.zeros(0, 1, device="cuda"), torch.zeros(0, 1, dtype=torch.int32, device="cuda")
    ops.consensus(state, partials, st.STEP_VERIFY, st.NEXT_NONE, None, cs.MASK, 4)
    torch.cuda.synchronize()


def test_a_launch_does_not_wait_for_a_copy_under_way():
    """A cycle's results are such a copy, and a prompt's consensus is launched after it. Some driver calls do wait."""
    state = cs.clone(cs.random_state(torch.Generator(), 1, 4), "cuda")
    partials = torch.zeros(4, 1, device="cuda"), torch.zeros(4, 1, dtype=torch.int32, device="cuda")
    results, there = torch.empty(64, dtype=torch.int32, pin_memory=True), torch.zeros(64, dtype=torch.int32).cuda()

    def launch():
        ops.consensus(state, partials, st.STEP_VERIFY, st.NEXT_NONE, None, cs.MASK, 4)

    launch()  # the first launch loads the kernel
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # half a second
    results.copy_(there, non_blocking=True)
    start = time.perf_counter()
    launch()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    assert seconds < 0.1 and time.perf_counter() - start > 0.2


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
