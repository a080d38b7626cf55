"""CUDA row_linear over weights in 12 bits: what it does over plain ones, to the bit."""

import pytest
import torch

from orthrus_rt import coded_blocks
from orthrus_rt.weights import pack
from tests.gpu.test_row_linear import (  # noqa: F401, tests that run here over coded weights
    ROWS,
    SHAPES,
    run,
    tensor,
    test_argmax,
    test_both_views,
    test_graph_and_reuse,
    test_layers_that_rewrite_their_input_early,
    test_one_hot_rows_pick_columns_of_the_weight,
    test_oracle,
    test_row_invariance,
    test_silu_mul,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["", "sm80"], autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("ORTHRUS_CUDA_ISA", request.param)
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
    return request.param


def with_exceptions(n, k):
    """One in every block of the first row; in large weights some in one, more than it has room for in another."""
    plain = tensor(n, k, seed=1)
    plain[1, 7::64] *= 2.0**-40
    if k >= 1024:
        plain[3, :6] *= 2.0**-50
        plain[4, 64:104] *= 2.0**-50
    return plain


@pytest.mark.parametrize("shape", SHAPES)
def test_coded_weights_give_the_same_bits(shape, monkeypatch):
    """Also where wgmma finds a weight in registers, not in shared memory."""
    k, n = shape
    plain, x = with_exceptions(n, k), tensor(300, k, seed=2)
    coded = pack(plain)
    assert coded.coded
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "0")
    weight = pack(plain)
    for rows in ROWS:
        assert torch.equal(run(x[:rows], coded), run(x[:rows], weight)), rows


def test_weights_are_coded_as_on_a_cpu():
    plain = with_exceptions(640, 1024)
    blocks = plain.view(10, 64, 16, 64).transpose(1, 2)
    assert torch.equal(coded_blocks.encode(blocks).cpu(), coded_blocks.encode(blocks.cpu()))
