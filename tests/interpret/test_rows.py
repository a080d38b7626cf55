"""rms_norm, embed and sum_words under the interpreter, against the oracle."""

import pytest
import torch

pytest.importorskip("triton")
import triton

from orthrus_rt import reference
from orthrus_rt.triton_kernels import embed, rms_norm, sum_words
from tests import rms_norm_cases, sparse

DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [16, 100, 576, 2048])
def test_rms_norm(hidden, dtype):
    rms_norm_cases.check_rms_norm(rms_norm.rms_norm, hidden, dtype)


def test_rms_norm_64_bit_offsets():
    rms_norm_cases.check_64_bit_offsets(rms_norm.rms_norm, torch.float16)


def test_rms_norm_picks_rows_and_a_row_does_not_depend_on_company():
    x, weight = torch.randn(9, 200), torch.randn(200)
    index = torch.tensor([8, 0, 0, 3], dtype=torch.int32)
    whole, picked, one = torch.empty_like(x), torch.empty(4, 200), torch.empty(1, 200)
    rms_norm.rms_norm(x, weight, 1e-5, whole)
    rms_norm.rms_norm(x, weight, 1e-5, picked, index)
    rms_norm.rms_norm(x, weight, 1e-5, one, index[3:])
    assert torch.equal(picked, whole[index.long()])
    assert torch.equal(one[0], whole[3])


def test_rms_norm_in_place():
    x, weight, want = torch.randn(5, 128), torch.randn(128), torch.empty(5, 128)
    reference.rms_norm(x, weight, 1e-6, want)
    rms_norm.rms_norm(x, weight, 1e-6, x)
    torch.testing.assert_close(x, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [16, 100, 2050])
def test_embed(hidden, dtype):
    table = torch.randn(11, hidden).to(dtype)
    token = torch.tensor([10, 0, 3, 3], dtype=torch.int32)
    out = torch.full((5, hidden), torch.nan, dtype=dtype)
    embed.embed(token, table, out[:4])
    assert torch.equal(out[:4], table[token.long()])
    assert out[4].isnan().all()


def test_embed_64_bit_offsets():
    sparse.check_embed(embed.embed, torch.float16)


def test_nothing_to_do():
    rms_norm.rms_norm(torch.empty(0, 64), torch.ones(64), 1e-6, torch.empty(0, 64))
    embed.embed(torch.empty(0, dtype=torch.int32), torch.ones(3, 64), torch.empty(0, 64))


@pytest.mark.parametrize("n", [1, 65_536, 200_000])
def test_sum_words(n):
    """Includes sums that wrap around, which interpreters before Triton 3.9 refuse. The words end in mid-tensor."""
    wraps = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    most = 2**31 if wraps else 2**14
    x = torch.randint(-most, most, (n + 1,), dtype=torch.int32)[:n]
    out = torch.empty(sum_words.num_sums(n), dtype=torch.int32)
    sum_words.sum_words(x, out)
    assert out.tolist() == [int(part.sum(dtype=torch.int32)) for part in x.split(65_536)]
