"""What bench_row_linear measures."""

import pytest
import torch

from bench.bench_row_linear import OPS, Chain, in_turn

pytestmark = pytest.mark.native


def test_activations_stay_ordinary_numbers():
    """Also after the many passes of a measurement: products of NaN or zeros may take another time."""
    torch.manual_seed(0)
    chain = Chain("tiny", torch.device("cpu"), 4, diff=False, baseline=True)
    chain.rows(8)
    for run, op in [(chain.run, None), *((chain.run, op) for op in OPS), (chain.run_mm, None)]:
        for _ in range(10):
            in_turn(run, chain.order(op))
        for values in (chain.x, chain.qkv, chain.act):
            assert values.isfinite().all() and values.abs().max() < 100 and (values == 0).float().mean() < 0.01
