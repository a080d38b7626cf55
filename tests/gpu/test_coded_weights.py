"""CUDA row_linear with weights in 12 bits: the bits of plain ones, and in drafts, or with weights in 8 bits, those of
plain ones whose last four bits are 1000.
"""

import pytest
import torch

from orthrus_rt import coded_blocks
from orthrus_rt.weights import pack
from tests.gpu.test_row_linear import (  # noqa: F401, tests that run here with coded weights
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
    wide,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["", "sm80"], autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("ORTHRUS_CUDA_ISA", request.param)
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
    monkeypatch.setattr(coded_blocks, "MOST_EXCEPTIONS", 4096)  # any number, so that no weight stays plain
    return request.param


def with_exceptions(n, k):
    """Has exceptions in the first block, and too many for its list in the next, all with rare exponents."""
    plain = tensor(n, k, seed=1)
    plain[1, :10:2] *= 2.0 ** -torch.arange(24, 74, 10, device="cuda")
    plain[2, -60:] *= 2.0 ** -torch.arange(20, 80, device="cuda")
    return plain


def most_exceptions(coded, plain):
    """The largest number of exceptions in a block."""
    num_blocks = -(-plain.shape[0] // 64) * (plain.shape[1] // 64)
    heads = coded.view(torch.int32)[: num_blocks * coded_blocks.BLOCK_BYTES[12] // 4].view(num_blocks, -1)
    return int(heads[:, 2].max())


@pytest.mark.parametrize("kind", ["normal", "wide"])
@pytest.mark.parametrize("shape", SHAPES)
def test_coded_weights_give_the_same_bits(shape, kind, monkeypatch):
    """Also where wgmma takes the weight from registers, not from shared memory."""
    k, n = shape
    if kind == "wide":
        plain, x = wide(n, k, seed=1), wide(300, k, factor=-1.01, seed=2)
    else:
        plain, x = with_exceptions(n, k), tensor(300, k, seed=2)
    coded = pack(plain)
    assert coded.coded and most_exceptions(coded.data, plain) > coded_blocks.LISTED
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "0")
    weight = pack(plain)
    for rows in ROWS:
        assert torch.equal(run(x[:rows], coded, "logits"), run(x[:rows], weight, "logits")), rows


def draft_weight(plain):
    """``plain`` as a pass that only drafts sees it once it is coded."""
    n, k = plain.shape
    blocks = plain.view(n // 64, 64, k // 64, 64).transpose(1, 2)
    order = coded_blocks._order(plain.device)
    code = torch.empty(blocks.shape[0] * blocks.shape[1], 4096, dtype=torch.int32, device="cuda")
    code[:, order] = coded_blocks._Part(blocks, order).code
    bits = blocks.reshape(-1, 4096).view(torch.int16)
    bits = torch.where(code == coded_blocks.NUM_UPPER, bits, bits & ~15 | 8)
    return bits.view(torch.bfloat16).view(blocks.shape).transpose(1, 2).reshape(n, k)


@pytest.mark.parametrize("shape", [(576, 960), (1536, 576), (4096, 6144)])
def test_drafts_do_without_what_trails(shape, monkeypatch):
    k, n = shape
    plain, x = with_exceptions(n, k), tensor(300, k, seed=2)
    coded, num_blocks = pack(plain), k * n // 4096
    blocks = coded.data.view(torch.uint8)[: num_blocks * coded_blocks.BLOCK_BYTES[12]].view(num_blocks, -1)
    blocks[:, -coded_blocks.HALF_BYTES :] = 0xFF
    assert coded.read_bytes(exact=False) == coded.nbytes - num_blocks * coded_blocks.HALF_BYTES
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "0")
    weight = pack(draft_weight(plain))
    for rows in ROWS:
        want = run(x[:rows], weight, "logits")
        assert torch.equal(run(x[:rows], coded, "logits", exact=False), want), rows
        assert torch.equal(run(x[:rows], weight, "logits", exact=False), want), rows


@pytest.mark.parametrize("shape", [(576, 960), (1536, 576), (4096, 6144)])
def test_the_diffusion_view_in_8_bits_beside_exact_rows(shape, monkeypatch):
    """As in a pass that verifies and drafts at once; then without AR rows."""
    k, n = shape
    plain, x = with_exceptions(n, k), tensor(300, k, seed=2)
    other = plain.flip(0)
    coded, short = pack(plain), pack(other, bits=8)
    assert (coded.bits, short.bits) == (12, 8)
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "0")
    weight, drafted = pack(plain), pack(draft_weight(other))
    for rows in ROWS:
        for rows_ar, exact in ((rows // 3, True), (rows, True), (0, True), (0, False)):
            want = run(x[:rows], weight, weight_diff=drafted, num_rows_ar=rows_ar)
            got = run(x[:rows], coded, weight_diff=short, num_rows_ar=rows_ar, exact=exact)
            assert torch.equal(got, want), (rows, rows_ar, exact)


def test_weights_are_coded_as_on_a_cpu():
    plain = with_exceptions(640, 1024)
    blocks = plain.view(10, 64, 16, 64).transpose(1, 2)
    assert most_exceptions(coded_blocks.encode(blocks), plain) > coded_blocks.LISTED
    for bits in (12, 8):
        assert torch.equal(coded_blocks.encode(blocks, bits).cpu(), coded_blocks.encode(blocks.cpu(), bits))
