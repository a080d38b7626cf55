"""Every variant of row_linear with every epilogue, whole and cut; dual_attn with 128 dims and long or odd contexts."""

import functools

import pytest
import torch

from tests.attention_pass import Heads, Pass, assert_close
from tests.cpu import test_row_linear_on_host as rl
from tests.rows import ar, diff

pytestmark = pytest.mark.usefixtures("host")
SHAPES = [(512, 192, 4), (1024, 128, 5), (128, 3200, 7), (256, 3180, 7), (320, 200, 2), (640, 328, 7)]
WIDEST = 200


@functools.cache
def tensors(shape):
    k, n, _ = shape
    weights = [rl.tensor(n, k, scale=k**-0.5, seed=s) for s in (1, 2)]
    weights[0][n // 2] = weights[0][n // 3]
    return *weights, rl.tensor(WIDEST, k, seed=3), rl.tensor(WIDEST, n, seed=4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epilogue", ["none", "residual", "silu_mul", "logits", "argmax"])
@pytest.mark.parametrize("isa", ["sm80", "sm90"])
def test_every_width(shape, epilogue, isa, monkeypatch):
    """The cut sums of decode have the same bits as the whole sums of prefill, also for both views together."""
    monkeypatch.setenv("ORTHRUS_CUDA_ISA", isa)
    _, n, sms = shape
    weight, other, x, residual = tensors(shape)
    if epilogue == "silu_mul" and n % 16:
        pytest.skip("odd widths of an MLP")

    def some(rows, **kwargs):
        res = residual[rows].clone() if epilogue == "residual" else None
        out = rl.run(x[rows].clone(), weight, epilogue, residual=res, sms=sms, **kwargs)
        return out if isinstance(out, tuple) else (out,)

    want = some(slice(WIDEST))
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if epilogue in ("none", "logits"):
        rl.close(want[0], exact, magnitude)
    elif epilogue == "residual":
        rl.close(want[0], exact + residual.double(), magnitude + residual.double().abs())
    elif epilogue == "silu_mul":
        gate, up = exact.chunk(2, dim=1)
        a, b = magnitude.chunk(2, dim=1)
        rl.close(want[0], gate * gate.sigmoid() * up, 4 * (a * up.abs() + b * gate.abs()) + up.abs())
    for first, count in ((3, 1), (7, 5), (0, 16), (4, 33), (1, 65), (9, 97), (2, 120), (20, 144), (30, 161)):
        rows = slice(first, first + count)
        for got, all_rows in zip(some(rows), want, strict=True):
            assert torch.equal(got, all_rows[rows]), count
    both = some(slice(0, 60), diff=other, num_rows_ar=27)
    for got, all_rows in zip(both, want, strict=True):
        assert torch.equal(got[:27], all_rows[:27])


LONG = [ar(0, 1900, 5), ar(1, 777, 1), ar(2, 64, 1), diff(0, 1905, 7), diff(3, 129, 16, invalid=3)]


@pytest.mark.parametrize("heads", [Heads(8, 2, 128), Heads(4, 4, 128), Heads(9, 3, 64), Heads(16, 1, 64)], ids=str)
@pytest.mark.parametrize("groups", [LONG, [ar(0, 3000, 1)], [ar(0, 65, 1), ar(1, 1, 1)], [diff(0, 1000, 3)]])
@pytest.mark.parametrize("isa", ["sm80", "sm90"])
def test_dual_attn(heads, groups, isa, host, monkeypatch):
    monkeypatch.setenv("ORTHRUS_CUDA_ISA", isa)
    case = Pass(heads, groups, "cpu")
    fold, split, workspace = case.run(split=False), torch.empty_like(case.q), case.workspace()
    for host.num_sms in (1000, 9, 2):
        case.call(split.fill_(torch.nan), workspace)
        assert torch.equal(split, fold)
    assert_close(split, case.expected())
    together = case.by_group(split)
    for g in groups:
        assert torch.equal(Pass(heads, [g], "cpu").run(), together[g])
