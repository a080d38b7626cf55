"""Compiled Triton kernels: rms_norm, embed and dual_attn in bf16 and fp32, and sum_words."""

import os

import pytest
import torch

pytest.importorskip("triton")
from orthrus_rt.triton_kernels import embed, pdl, rms_norm, sum_words
from tests.attention_pass import (
    SPOIL,
    Heads,
    assert_close,
    check_a_nan_key_spoils_those_who_see_it_alone,
    check_nan_outlives_the_splits,
    check_weights_are_rounded_for_their_products_alone,
)
from tests.rms_norm_cases import check_rms_norm
from tests.rows import ar, diff
from tests.triton_pass import TritonPass

PDL = os.environ.get("PTX_ARCH") == "90a"
DTYPES = [torch.bfloat16, torch.float32]
HEADS = [Heads(8, 2, 128), Heads(4, 2, 128), Heads(9, 3, 64)]
PASSES = {
    "decode": [ar(0, 300, 1), ar(1, 63, 1), ar(2, 64, 1), ar(3, 0, 1), ar(4, 127, 1)],
    "one_pass": [ar(0, 150, 32), diff(0, 151, 32), diff(0, 182, 32), ar(1, 40, 32), diff(1, 41, 32, invalid=30)],
    "long_block": [diff(0, 70, 100), diff(1, 10, 3), diff(2, 0, 16)],
    "prefill": [ar(0, 0, 150), ar(1, 129, 77)],
    "full_table": [ar(0, 127, 1)],  # there is no entry after that of its last page
    "padding": [ar(0, 10, 4, invalid=4), ar(1, 200, 4), diff(2, 10, 4, invalid=4)],
}


@pytest.fixture(autouse=True)
def with_pdl(monkeypatch):
    options = {"PDL": True, "launch_pdl": True} if PDL else {"PDL": False}
    monkeypatch.setattr(pdl, "launch_options", lambda device: options)


def on_cpu(groups, heads=HEADS[2], dtype=torch.bfloat16):
    return TritonPass(heads, groups, dtype=dtype, device="cpu")


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_dual_attn(name, heads):
    case = on_cpu(PASSES[name], heads)
    got = case.run()
    assert_close(got, case.expected())
    assert not got[case.rows.position < 0].any()


def test_dual_attn_in_fp32():
    case = on_cpu(PASSES["one_pass"], Heads(4, 2, 32), torch.float32)
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=1e-5, atol=1e-5)


def test_dual_attn_rounds_weights_for_their_products_alone():
    check_weights_are_rounded_for_their_products_alone(lambda groups: on_cpu(groups, Heads(1, 1, 64)))


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_dual_attn_rows_do_not_depend_on_company(heads):
    groups = [ar(0, 200, 16), ar(1, 70, 32), ar(2, 190, 1), ar(3, 5, 70), diff(0, 201, 16), diff(1, 75, 32)]
    together = on_cpu(groups, heads)
    want = together.by_group(together.run())
    backwards = on_cpu(groups[::-1], heads)
    got = backwards.by_group(backwards.run())
    for g in groups:
        assert torch.equal(got[g], want[g])
        assert torch.equal(on_cpu([g], heads).run(), want[g])
    for i in (0, 7, 15):
        assert torch.equal(on_cpu([ar(0, 200 + i, 1)], heads).run()[0], want[groups[0]][i])


def test_a_nan_key():
    check_a_nan_key_spoils_those_who_see_it_alone(on_cpu)


@pytest.mark.parametrize("spoil", SPOIL)
def test_nan_outlives(spoil):
    check_nan_outlives_the_splits(on_cpu, spoil)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [16, 100, 576, 1000, 2048, 4096])
def test_rms_norm(hidden, dtype):
    check_rms_norm(rms_norm.rms_norm, hidden, dtype)
    torch.manual_seed(hidden)
    x, weight = (torch.randn(9, hidden) * 3).to(dtype), torch.randn(hidden)
    got = torch.full_like(x, torch.nan)
    rms_norm.rms_norm(x, weight, 1e-6, got)
    index = torch.tensor([8, 0, 0, 3], dtype=torch.int32)
    picked, one = torch.empty(4, hidden, dtype=dtype), torch.empty(1, hidden, dtype=dtype)
    rms_norm.rms_norm(x, weight, 1e-6, picked, index)
    rms_norm.rms_norm(x, weight, 1e-6, one, index[3:].clone())
    assert torch.equal(picked, got[index.long()]) and torch.equal(one[0], got[3])
    rms_norm.rms_norm(x, weight, 1e-6, x)
    assert torch.equal(x, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [16, 100, 576, 2050])
def test_embed(hidden, dtype):
    table = torch.randn(11, hidden).to(dtype)
    token = torch.tensor([10, 0, 3, 3, 7], dtype=torch.int32)
    out = torch.full((5, hidden), torch.nan, dtype=dtype)
    embed.embed(token, table, out)
    assert torch.equal(out, table[token.long()])


@pytest.mark.parametrize("n", [1, 65_536, 200_000])
def test_sum_words(n):
    x = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32)
    out = torch.full((sum_words.num_sums(n),), -7, dtype=torch.int32)
    sum_words.sum_words(x, out)
    assert out.tolist() == [int(part.sum(dtype=torch.int32)) for part in x.split(65_536)]
