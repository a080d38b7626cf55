"""The benchmark of consensus times what it claims to: verifications that find their drafts pending."""

import pytest
import torch

from bench.bench_consensus import CALLS, Case


@pytest.mark.parametrize("way", ("call", "eager"))
@pytest.mark.parametrize(("slots", "block_len"), [(1, 16), (5, 32)])
def test_every_timed_call_accepts_half_a_block(way, slots, block_len):
    case = Case(slots, block_len, 6, torch.device("cpu"))
    assert case.wrong_values() == 0
    assert float(case.accepted.float().mean()) == pytest.approx(block_len / 2, abs=0.5)
    grown = []

    def run():
        before = case.state.num_output.clone()
        getattr(case, way)()
        grown.append(case.state.num_output - before)

    assert set(case.times(run, repeats=2)) == {"p50", "p20", "p80"}
    assert len(grown) % CALLS == 0 and len(grown) > 2 * CALLS
    assert all(torch.equal(tokens, case.accepted + 1) for tokens in grown)
