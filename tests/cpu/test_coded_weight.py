"""Weights in 12 bits: the bits of plain ones, in every variant, with any exponents and wherever the exceptions are."""

import pytest
import torch

from orthrus_rt import dispatch, ops, weights
from tests.native_cpu import poison, randn, threads

if (native := dispatch.native()) is None:
    pytest.skip("the native module is not built", allow_module_level=True)

SHAPE = 200, 132  # strips, the last of them padded, of 33 units
ROWS = (*range(1, 14), 25, 60, 120)


@pytest.fixture
def packed(monkeypatch):
    """``packed(how, weight)``, coded or plain whatever the processor is."""

    def pack(how, weight, **kwargs):
        monkeypatch.setattr(native.cpu, "wants_coded_weights", lambda: how == "coded")
        out = weights.pack(weight, impl="cpu", **kwargs)
        assert out.coded == (how == "coded")
        return out

    return pack


def with_exponents(shape, exponents, seed=0):
    """Random signs and mantissas, exponents by turns."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(0, 2**16, shape, generator=generator, dtype=torch.int32) & 0x807F
    which = torch.randint(0, len(exponents), shape, generator=generator)
    bits = rest | (torch.tensor(exponents, dtype=torch.int32)[which] << 7)
    return bits.to(torch.int16).view(torch.bfloat16)


def some_exceptions():
    """A few in the first step, in the last, several in one, alone; strips without any; NaN, infinities and zeros."""
    weight = randn(*SHAPE, seed=1)
    weight[5:9, :2] = weight[130, -1] = weight[131, 130:] = 2.0**-60
    weight[3, 40:48] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e38, -1e-38, 2.0**-100])
    weight[40, 77] = -(2.0**50)
    return weight


WEIGHTS = {
    "random": lambda: randn(*SHAPE, seed=1),
    "exceptions": some_exceptions,
    "16 exponents, spread out": lambda: with_exponents(SHAPE, range(80, 144, 4)),
    "the least and the largest": lambda: with_exponents(SHAPE, (0, 1, 2, 120, 126, 127, 128, 253, 254)),
    "all zero": lambda: torch.zeros(SHAPE, dtype=torch.bfloat16),
}


def everything(x, weight, gates):
    """Outputs of every kind of epilogue, as bits: NaN equals itself."""
    n, (out_features, _) = x.shape[0], SHAPE
    logits = poison(n, out_features, dtype=torch.float32)
    ops.row_linear(x, weight, logits, epilogue="logits")
    best = torch.empty(n, 1), torch.empty(n, 1, dtype=torch.int32)
    ops.row_linear(x, weight, best, epilogue="argmax")
    gated = poison(n, out_features // 2)
    ops.row_linear(x, gates, gated, epilogue="silu_mul")
    return logits.view(torch.int32), best[0].view(torch.int32), best[1], gated.view(torch.int16)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_bits_of_plain_weights(isa, packed, kind):
    weight = WEIGHTS[kind]()
    how = [(packed(h, weight), packed(h, weight, gate_up=True)) for h in ("plain", "coded")]
    for n in ROWS:
        x = randn(n, SHAPE[1], seed=n)
        coded = everything(x, *how[1])
        if isa == "amx_bf16":  # its tiles take plain weights alone, and add in another order
            native.cpu.set_isa("avx512_bf16")
        plain = everything(x, *how[0])
        native.cpu.set_isa(isa)
        assert all(torch.equal(a, b) for a, b in zip(plain, coded, strict=True)), n


def test_every_element_comes_back(packed):
    """One input at a time picks a column."""
    weight = some_exceptions()
    weight[3, 46:48] = 0.0  # products of denormals are zero
    coded = packed("coded", weight)
    out = poison(SHAPE[1], SHAPE[0], dtype=torch.float32)
    x = torch.eye(SHAPE[1], dtype=torch.bfloat16)
    for i in range(SHAPE[1]):  # alone: in company it is zero times what is not finite
        ops.row_linear(x[i : i + 1], coded, out[i : i + 1], epilogue="logits")
    finite = weight.isfinite().all(1)
    assert finite.sum() == SHAPE[0] - 1 and torch.equal(out.T[finite], weight[finite].float())


@pytest.mark.parametrize(("n", "rows_ar", "count"), [(70, 30, 1), (70, 30, 3), (20, 12, 2)])
def test_both_views_rows(isa, packed, n, rows_ar, count):
    """A coded weight beside a plain one too."""
    weight, x, outs = (randn(*SHAPE, seed=1), some_exceptions()), randn(n, SHAPE[1], seed=3), []
    for hows in (("plain", "plain"), ("coded", "coded"), ("coded", "plain"), ("plain", "coded")):
        ar, diff = (packed(how, w) for how, w in zip(hows, weight, strict=True))
        outs.append(poison(n, SHAPE[0]))
        with threads(count):
            ops.row_linear(x, ar, outs[-1], weight_diff=diff, num_rows_ar=rows_ar)
    assert all(torch.equal(out.view(torch.int16), outs[0].view(torch.int16)) for out in outs)


def test_they_are_a_quarter_smaller(packed):
    weight = randn(640, 576, seed=1, scale=0.02)
    plain, coded = (packed(how, weight) for how in ("plain", "coded"))
    assert plain.nbytes == weight.nbytes
    # 20 strips with a head of two lines and a last exception each.
    assert 0 <= coded.nbytes - (0.75 * weight.nbytes + 20 * (128 + 8)) < 0.001 * weight.nbytes


@pytest.mark.parametrize(
    "weight",
    [
        randn(64, 34, seed=1),  # an odd number of steps
        randn(64, 35, seed=1),
        randn(64, 32, seed=1).float(),
        with_exponents((64, 64), range(256)),  # would be larger
    ],
    ids=lambda w: f"{w.shape[1]} {w.dtype}",
)
def test_what_stays_plain(monkeypatch, weight):
    monkeypatch.setattr(native.cpu, "wants_coded_weights", lambda: True)
    assert not weights.pack(weight, impl="cpu").coded


def test_for_whom_they_are_coded(isa):
    assert weights.pack(randn(64, 64), impl="cpu").coded == (isa == "avx512_bf16")
