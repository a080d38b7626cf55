"""The float32 CUDA kernels as host C++: against float64, and row-invariance to the bit."""

import ctypes
import functools

import pytest
import torch

from orthrus_rt import native, weights
from tests import sparse
from tests.attention_pass import (
    SPOIL,
    Heads,
    Pass,
    check_a_nan_key_spoils_those_who_see_it_alone,
    check_nan_outlives_the_splits,
    check_scores_of_minus_infinity_have_no_weight,
)
from tests.cpu.cuda_host import library
from tests.cpu.cuda_host.device import as_ctypes
from tests.cpu.test_cuda_on_host import INVALID, check_qkv_commit
from tests.cpu.test_dual_attn_on_host import PASSES
from tests.rows import ar, diff

pytestmark = pytest.mark.usefixtures("host")
F32Pass = functools.partial(Pass, device="cpu", dtype=torch.float32)


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(x, weight, epilogue="none", *, residual=None, diff=None, num_rows_ar=None):
    weight, diff = (w if w is None else weights.pack(w, gate_up=epilogue == "silu_mul") for w in (weight, diff))
    n, rows = weight.out_features, x.shape[0]
    width = {"silu_mul": n // 2, "argmax": weight.num_partials}.get(epilogue, n)
    out = torch.full((rows, width), torch.nan)
    if epilogue == "argmax":
        out = out, torch.full((rows, width), -7, dtype=torch.int32)
    kwargs = dict(weight_diff=diff, num_rows_ar=num_rows_ar, residual=residual, epilogue=epilogue)
    native.row_linear(x, weight, out, **kwargs)
    return out


@pytest.mark.usefixtures("both_orders")
@pytest.mark.parametrize("shape", [(1, 1), (37, 70), (128, 32), (300, 33)], ids=str)
def test_row_linear(shape):
    x, weight = tensor(19, shape[1], seed=1), tensor(*shape, seed=2)
    exact = x.double() @ weight.double().T
    bound = (x.double().abs() @ weight.double().abs().T) * (shape[1] + 4) * 2.0**-24
    got = linear(x, weight)
    assert ((got.double() - exact).abs() <= bound).all()
    assert torch.equal(linear(x, weight, "logits"), got)
    residual = tensor(19, shape[0], seed=3)
    assert torch.equal(linear(x, weight, "residual", residual=residual), got + residual)


@pytest.mark.parametrize("width", [1, 64, 100])
def test_row_linear_silu_mul(width):
    x, weight = tensor(19, 40, seed=1), tensor(2 * width, 40, seed=2)
    gate, up = linear(x, weight).double().chunk(2, 1)
    torch.testing.assert_close(linear(x, weight, "silu_mul").double(), gate * gate.sigmoid() * up, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("vocab", [3, 128, 300])
def test_row_linear_argmax(vocab):
    """Of tied maxima the lowest id wins, NaN never does, and a tile of nothing but NaN gives -inf and its first id."""
    x, weight = tensor(20, 16, seed=1), tensor(vocab, 16, seed=2)
    weight[vocab // 2 :] = weight[: vocab - vocab // 2].clone()
    x[3] = 0
    logits = linear(x, weight)
    value, index = linear(x, weight, "argmax")
    for t, part in enumerate(logits.split(128, 1)):
        assert torch.equal(value[:, t], part.amax(1))
        assert torch.equal(index[:, t].long(), 128 * t + (part == part.amax(1, keepdim=True)).int().argmax(1))
    weight[1], weight[128:] = torch.nan, torch.nan
    value, index = linear(x, weight, "argmax")
    rest = linear(x, weight).nan_to_num(-torch.inf)[:, :128]
    assert torch.equal(index[:, 0].long(), (rest == rest.amax(1, keepdim=True)).int().argmax(1))
    assert (value[:, 1:] == -torch.inf).all()
    assert torch.equal(index[:, 1:], 128 * torch.arange(1, value.shape[1]).int().expand(20, -1))


@pytest.mark.parametrize(("name", "values"), [("num_rows_ar", (-1, 20)), ("num_partials", (1, 4))])
def test_row_linear_refuses(name, values, monkeypatch):
    errors = []

    def launch(op, params, device):
        params = as_ctypes(params)
        for value in values:
            setattr(params, name, value)
            errors.append(library().row_linear_f32(ctypes.byref(params)))

    monkeypatch.setattr(native, "_launch", launch)
    linear(tensor(19, 16), tensor(300, 16), "argmax")
    assert errors == [INVALID, INVALID]


def test_row_linear_of_nothing_and_of_too_much(monkeypatch):
    """No rows, no outputs or more tiles than a grid has blocks: nothing is launched."""
    errors = []

    def launch(op, params, device):
        params = as_ctypes(params)
        for params.num_rows, params.out_features in ((0, 5), (19, 0), (1 << 30, 1 << 16)):
            params.num_rows_ar = params.num_rows
            errors.append(library().row_linear_f32(ctypes.byref(params)))

    monkeypatch.setattr(native, "_launch", launch)
    out = linear(tensor(19, 16), tensor(5, 16))
    assert errors == [0, 0, INVALID]
    assert bool(out.isnan().all())


def test_row_linear_rows_do_not_depend_on_company():
    weight, diff = tensor(150, 70, seed=1), tensor(150, 70, seed=2)
    x = tensor(45, 70, seed=3)
    want, want_diff = linear(x, weight), linear(x, diff)
    assert torch.equal(linear(x[17:18], weight)[0], want[17])
    assert torch.equal(linear(x, weight, num_rows_ar=7), want)
    for split in (0, 1, 16, 20, 45):
        got = linear(x, weight, diff=diff, num_rows_ar=split)
        assert torch.equal(got[:split], want[:split])
        assert torch.equal(got[split:], want_diff[split:])
        residual = tensor(45, 150, seed=4)
        added = linear(x, weight, "residual", residual=residual, diff=diff, num_rows_ar=split)
        assert torch.equal(added, got + residual)


@pytest.mark.parametrize(("rows", "epilogue"), [(1, "none"), (2100, "residual")])
def test_row_linear_64_bit_offsets(rows, epilogue, monkeypatch):
    monkeypatch.setattr(ctypes.c_bool.in_dll(library(), "last_cluster_only"), "value", True)
    sparse.check_row_linear(native.row_linear, weights.pack, rows, epilogue, torch.float32)


@pytest.mark.usefixtures("both_orders")
@pytest.mark.parametrize("heads", [Heads(3, 1, 64), Heads(4, 2, 128)], ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_dual_attn(name, heads):
    case = F32Pass(heads, PASSES[name])
    out = case.run()
    torch.testing.assert_close(out.double(), case.expected(), rtol=1e-5, atol=1e-6)
    assert not out[case.rows.position < 0].any()


def test_dual_attn_a_nan_key_spoils_those_who_see_it_alone():
    check_a_nan_key_spoils_those_who_see_it_alone(lambda groups: F32Pass(Heads(3, 1, 64), groups))


@pytest.mark.parametrize("spoil", SPOIL)
def test_dual_attn_nan_outlives_what_else_a_row_sees(spoil):
    check_nan_outlives_the_splits(lambda groups: F32Pass(Heads(3, 1, 64), groups), spoil)


def test_dual_attn_scores_of_minus_infinity_have_no_weight():
    check_scores_of_minus_infinity_have_no_weight(lambda groups: F32Pass(Heads(3, 1, 64), groups))


def test_dual_attn_rows_do_not_depend_on_company():
    heads, groups = Heads(3, 1, 64), [g for name in ("one_pass", "tall", "decode") for g in PASSES[name]]
    groups = list({(g.view, g.seq): g for g in groups}.values())
    together = F32Pass(heads, groups)
    want = together.by_group(together.run())
    backwards = F32Pass(heads, groups[::-1])
    got = backwards.by_group(backwards.run())
    for g in groups:
        assert torch.equal(got[g], want[g])
        assert torch.equal(F32Pass(heads, [g]).run(), want[g])
    verified = F32Pass(heads, [ar(0, 130, 6)]).run()
    for i in range(6):  # a verified row equals the row of AR decoding
        assert torch.equal(F32Pass(heads, [ar(0, 130 + i, 1)]).run()[0], verified[i])


def test_dual_attn_64_bit_offsets():
    """Pages beyond 2^31 elements; what is not touched takes no memory."""
    groups = [ar(0, 70, 2), diff(0, 70, 2)]
    far = F32Pass(Heads(1, 1, 64), groups, first_page=(1 << 31) // (64 * 64) + 1)
    assert far.k_pages.numel() > 2**31
    assert torch.equal(far.run(), F32Pass(Heads(1, 1, 64), groups).run())


@pytest.mark.usefixtures("both_orders")
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("heads", [(3, 1, 64), (4, 2, 128), (27, 2, 64)])
def test_qkv_commit(heads, norms):
    check_qkv_commit(heads, norms, torch.float32)
