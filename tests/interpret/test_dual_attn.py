"""The portable dual_attn under the interpreter, against float64; caches are NaN wherever no row reads."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from orthrus_rt.rows import Layout, empty_rows
from orthrus_rt.triton_kernels import dual_attn
from tests.attention_pass import (
    SPOIL,
    Group,
    Heads,
    check_a_nan_key_spoils_those_who_see_it_alone,
    check_nan_outlives_the_splits,
    check_scores_of_minus_infinity_have_no_weight,
    check_weights_are_rounded_for_their_products_alone,
)
from tests.triton_pass import TritonPass

HEADS = Heads(6, 2, 16)
GROUPS = [
    Group("ar", 0, 130, 3),
    Group("ar", 1, 0, 1),
    Group("ar", 2, 63, 2, invalid=1),
    Group("ar", 3, 5, 2, invalid=2),
    Group("diff", 0, 130, 4),
    Group("diff", 4, 0, 3),
    Group("diff", 1, 64, 5, invalid=2),
    Group("diff", 3, 10, 2, invalid=2),
]


def on_cpu(groups, heads=HEADS, dtype=torch.float32, **how):
    return TritonPass(heads, groups, dtype=dtype, device="cpu", **how)  # the interpreter computes bf16 wrongly


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", [HEADS, Heads(2, 2, 32), Heads(8, 1, 16), Heads(64, 1, 16)], ids=str)
def test_against_float64(heads, dtype):
    case = on_cpu(GROUPS, heads, dtype)
    got = case.run()
    tolerance = 1e-5 if dtype is torch.float32 else 4e-3
    torch.testing.assert_close(got.double(), case.expected(), rtol=tolerance, atol=tolerance)
    assert not got[case.rows.position < 0].any()


def test_groups_larger_than_a_tile():
    case = on_cpu([Group("ar", 0, 30, 50), Group("diff", 1, 70, 80, invalid=7)])
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def products_in_order(monkeypatch):
    """The interpreter multiplies matrices with numpy, whose BLAS may round a row by its position among others."""

    def matmul(a, b, dtype=None):
        return (a[..., None] * b[..., None, :, :]).sum(-2, dtype=dtype)

    monkeypatch.setattr(np, "matmul", matmul)


def test_rows_do_not_depend_on_company(products_in_order):
    together = on_cpu(GROUPS)
    want = together.by_group(together.run())
    backwards = on_cpu(GROUPS[::-1])
    got = backwards.by_group(backwards.run())
    for g in GROUPS:
        assert torch.equal(got[g], want[g])
        assert torch.equal(on_cpu([g]).run(), want[g])
    for i in range(3):  # a row of a verification equals the row of AR decoding
        alone = on_cpu([Group("ar", 0, 130 + i, 1)]).run()
        assert torch.equal(alone[0], want[GROUPS[0]][i])


def test_a_nan_key_spoils_those_who_see_it_alone(products_in_order):
    check_a_nan_key_spoils_those_who_see_it_alone(on_cpu)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # from numpy, for a tile in which a row sees only NaN
@pytest.mark.parametrize("spoil", SPOIL)
def test_nan_outlives_what_else_a_row_sees(spoil):
    check_nan_outlives_the_splits(on_cpu, spoil)


def test_scores_of_minus_infinity_have_no_weight():
    check_scores_of_minus_infinity_have_no_weight(on_cpu)


def test_weights_are_rounded_for_their_products_alone():
    check_weights_are_rounded_for_their_products_alone(lambda groups: on_cpu(groups, Heads(1, 1, 16), torch.float16))


def test_64_bit_offsets():
    """Pages beyond 2^31 elements; untouched ones take no memory."""
    groups, heads = [Group("ar", 0, 70, 2), Group("diff", 0, 70, 2)], Heads(1, 1, 16)
    far = on_cpu(groups, heads, torch.float16, first_page=(1 << 31) // (64 * 16) + 1)
    assert far.k_pages.numel() > 2**31
    assert torch.equal(far.run(), on_cpu(groups, heads, torch.float16).run())


def test_nothing_to_do():
    assert on_cpu([Group("ar", 0, 0, 0)]).run().shape == (0, 6, 16)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (Heads(2, 1, 24), "dual_attn: head_dim must be a power of two >= 16 for triton, got 24"),
        (Heads(2, 1, 8), "dual_attn: head_dim must be a power of two >= 16 for triton, got 8"),
        (Heads(65, 1, 16), "dual_attn: num_heads_q / num_heads_kv must be <= 64, got 65"),
    ],
    ids=str,
)
def test_refuses(heads, message):
    q = torch.zeros(1, heads.q, heads.dim)
    pages = torch.zeros(1, heads.kv, 64, heads.dim)
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        dual_attn.dual_attn(q, pages, pages, table, None, None, empty_rows(Layout(1, 1), "cpu"), 1.0, q)
