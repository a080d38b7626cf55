"""Weights in 12 bits give the bits of plain ones, with any exponents and wherever the exceptions are; those in 8 bits,
like drafts over those in 12, the bits of plain ones whose last four bits are fixed.
"""

import numpy as np
import pytest
import torch

from orthrus_rt import checkpoint, dispatch, ops, weights
from tests.native_cpu import poison, randn, threads

if (native := dispatch.extension()) is None:
    pytest.skip("the native module is not built", allow_module_level=True)

# Strips, the last one padded, of 65 units: coded blocks of 44 steps in AVX2 and 22 in AVX-512, plain ones of 66.
SHAPE = 200, 260
ROWS = (*range(1, 14), 25, 60, 120)
CODING = "avx2", "avx512", "avx512_bf16"
HEAD = 192  # bytes before each strip's leading part


@pytest.fixture
def packed(monkeypatch):
    """``packed(bits, weight)`` packs a weight, coded in 12 or 8 bits or plain, whatever the processor is."""

    def pack(bits, weight, **kwargs):
        monkeypatch.setattr(native.cpu, "takes_coded_weights", lambda: bits < 16)
        out = weights.pack(weight, impl="cpu", bits=bits, **kwargs)
        assert out.bits == bits and out.coded == (bits < 16)
        return out

    return pack


@pytest.fixture(params=CODING)
def decoding(request):
    """Runs the test on a variant that takes coded weights."""
    before = native.cpu.isa()
    try:
        native.cpu.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield
    native.cpu.set_isa(before)


def decoded(packed):
    """Bits ``[strips, steps, 32 outputs, 2 inputs]`` of a coded weight, decoded as in csrc/cpu/coded_weight.h."""
    num_strips, num_steps = -(-packed.out_features // 32), packed.in_features // 2
    buffer = packed.data.view(torch.uint8).numpy()
    strips = buffer[: num_strips * (HEAD + 64 * num_steps)].reshape(num_strips, -1)
    trailing = buffer[strips.size :][: num_strips * 32 * num_steps].reshape(num_strips, -1, 1, 64)
    tables, leading = strips[:, :64].reshape(num_strips, 4, 16), strips[:, HEAD:].reshape(num_strips, -1, 2, 64)
    assert (tables == tables[:, :1]).all()
    to_trailing = strips[:, 128:136].copy().view(np.int64)[:, 0]
    assert (to_trailing == strips.size - np.arange(num_strips) * (HEAD + 32 * num_steps)).all()
    upper = tables[np.arange(num_strips)[:, None, None, None], 0, leading & 15].astype(np.uint16)
    bits = upper << 8 | leading ^ np.concatenate((trailing & 15, trailing >> 4), axis=2)
    # Eight elements of the first 16 outputs alternate with eight of the last 16, four times.
    bits = bits.reshape(num_strips, num_steps, 4, 2, 8).swapaxes(2, 3).reshape(num_strips, num_steps, 64)
    for s, strip in enumerate(strips):
        at = s * len(strip) + int(strip[136:144].view(np.int64)[0])
        while (step := int(buffer[at : at + 4].view(np.int32)[0])) != 2**31 - 1:
            element, value = buffer[at + 4 : at + 8].view(np.uint16)
            bits[s, step, element] = value
            at += 8
    return bits.reshape(num_strips, num_steps, 32, 2)


def with_exponents(shape, exponents, seed=0):
    """Random signs and mantissas, with exponents chosen at random from ``exponents``."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(0, 2**16, shape, generator=generator, dtype=torch.int32) & 0x807F
    which = torch.randint(0, len(exponents), shape, generator=generator)
    bits = rest | (torch.tensor(exponents, dtype=torch.int32)[which] << 7)
    return bits.to(torch.int16).view(torch.bfloat16)


def some_exceptions():
    """Exceptions in the first step, in the last, at the edges of blocks, several in one step, single ones, and strips
    without any; NaN, infinities and zeros. All other elements have 16 upper bytes.
    """
    weight = with_exponents(SHAPE, range(112, 128), seed=1)
    weight[5:9, :2] = weight[130, -1] = weight[131, -2:] = 2.0**-60
    for strip, step in enumerate((43, 44, 87, 88)):
        weight[32 * strip + 9, 2 * step] = 2.0**-70
    weight[3, 40:48] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e38, -1e-38, 2.0**-100])
    weight[40, 77] = -(2.0**50)
    return weight


def a_lone_exception():
    """An exception in a unit whose other elements all have the commonest upper byte."""
    weight = torch.ones(SHAPE, dtype=torch.bfloat16)
    weight[:, 0] = torch.tensor([2.0 ** (2 * (i % 32) - 60) for i in range(SHAPE[0])])
    weight[70, 77] = -(2.0**100)
    return weight


WEIGHTS = {
    "random": lambda: randn(*SHAPE, seed=1),
    "exceptions": some_exceptions,
    "a lone exception": a_lone_exception,
    "16 upper bytes, spread out": lambda: with_exponents(SHAPE, [e for i in range(80, 144, 8) for e in (i, i + 1)]),
    "the least and the largest": lambda: with_exponents(SHAPE, (0, 1, 2, 120, 126, 127, 128, 253, 254)),
    "all zero": lambda: torch.zeros(SHAPE, dtype=torch.bfloat16),
}


def everything(x, weight, gates, exact=True):
    """Outputs of the epilogues logits, argmax and silu_mul, as integers, so that NaN equals itself."""
    n, (out_features, _) = x.shape[0], SHAPE
    logits = poison(n, out_features, dtype=torch.float32)
    ops.row_linear(x, weight, logits, epilogue="logits", exact=exact)
    best = torch.empty(n, 1), torch.empty(n, 1, dtype=torch.int32)
    ops.row_linear(x, weight, best, epilogue="argmax", exact=exact)
    gated = poison(n, out_features // 2)
    ops.row_linear(x, gates, gated, epilogue="silu_mul", exact=exact)
    return logits.view(torch.int32), best[0].view(torch.int32), best[1], gated.view(torch.int16)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_bit_comes_back(packed, kind):
    weight = WEIGHTS[kind]()
    plain, coded = (packed(bits, weight) for bits in (16, 12))
    assert np.array_equal(decoded(coded), plain.data.view(torch.uint16).numpy())


@pytest.mark.parametrize("kind", WEIGHTS)
def test_8_bits_are_the_leading_parts(packed, kind):
    weight, num_strips = WEIGHTS[kind](), -(-SHAPE[0] // 32)
    whole, short = (packed(bits, weight).data.view(torch.uint8).numpy() for bits in (12, 8))
    size = num_strips * (HEAD + 32 * SHAPE[1])
    want, got = (part[:size].reshape(num_strips, -1).copy() for part in (whole, short))
    (to_trailing, to_exceptions), offsets = (p[:, 128:144].copy().view(np.int64).T for p in (got, want))
    assert (to_trailing == 0).all() and (offsets[1] - to_exceptions == num_strips * 16 * SHAPE[1]).all()
    want[:, 128:144] = got[:, 128:144]
    assert np.array_equal(want, got) and np.array_equal(whole[size + num_strips * 16 * SHAPE[1] :], short[size:])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_products_are_those_of_plain_weights(decoding, packed, kind):
    weight = WEIGHTS[kind]()
    how = [(packed(bits, weight), packed(bits, weight, gate_up=True)) for bits in (16, 12)]
    for n in ROWS:
        x = randn(n, SHAPE[1], seed=n)
        plain, coded = (everything(x, *weights) for weights in how)
        assert all(torch.equal(a, b) for a, b in zip(plain, coded, strict=True)), n


def drafted(weight):
    """The value that a pass which only drafts uses for each element."""
    bits = weight.view(torch.int16)
    kept = bits & 0x7F00
    return (bits & -16 | 8 * ((kept != 0) & (kept != 0x7F00)).to(bits.dtype)).view(torch.bfloat16)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_drafts_do_without_four_bits(decoding, packed, kind):
    weight = WEIGHTS[kind]()
    coded, short = ((packed(bits, weight), packed(bits, weight, gate_up=True)) for bits in (12, 8))
    plain = packed(16, drafted(weight)), packed(16, drafted(weight), gate_up=True)
    for n in ROWS:
        x = randn(n, SHAPE[1], seed=n)
        expected = everything(x, *plain)
        for which in (coded, short):
            got = everything(x, *which, exact=False)
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), (n, which[0].bits)


@pytest.mark.parametrize("residual", (None, randn(9, SHAPE[0], seed=5)), ids=("none", "residual"))
def test_drafts_of_the_diffusion_view(decoding, packed, residual):
    """As in a draft pass, no row is of the AR view. Trailing bits are changed, and only an exact pass reads them."""
    weight, x, out, expected = randn(*SHAPE, seed=1), randn(9, SHAPE[1], seed=3), *(poison(9, SHAPE[0]) for _ in "ab")
    diff, short, ar = packed(12, weight), packed(8, weight), packed(12, randn(*SHAPE, seed=2))
    num_strips, num_steps = -(-SHAPE[0] // 32), SHAPE[1] // 2
    first = num_strips * (HEAD + 64 * num_steps)
    diff.data.view(torch.uint8)[first : first + num_strips * 32 * num_steps] ^= 0x5A
    rest = dict(residual=residual, epilogue="none" if residual is None else "residual")
    ops.row_linear(x, packed(16, drafted(weight)), expected, **rest)
    for view in (diff, short):
        ops.row_linear(x, ar, out, weight_diff=view, num_rows_ar=0, exact=False, **rest)
        assert torch.equal(out, expected)
    ops.row_linear(x, ar, out, weight_diff=diff, num_rows_ar=0, **rest)
    assert not torch.equal(out, expected)


def test_drafts_keep_zero_and_infinity(decoding, packed):
    """If zero became a subnormal number, some processors would multiply slowly. (AVX-512 BF16 takes those for zero.)"""
    weight = randn(32, 576, seed=1)
    weight[:, ::2] = 0.0
    weight[3, 4], weight[5, 6] = torch.inf, -torch.inf
    x, out = torch.zeros(2, 576, dtype=torch.bfloat16), poison(2, 32, dtype=torch.float32)
    x[:, ::2] = 2.0**126
    ops.row_linear(x, packed(12, weight), out, epilogue="logits", exact=False)
    assert out[0, 3] == torch.inf and out[0, 5] == -torch.inf
    assert (out[0, :3] == 0).all() and torch.equal(out[0], out[1])


def test_weights_in_8_bits_are_for_drafts(packed):
    weight, x = packed(8, randn(*SHAPE, seed=1)), randn(3, SHAPE[1])
    with pytest.raises(ValueError, match="row_linear: weight must have all its bits unless exact is False, got 8"):
        ops.row_linear(x, weight, poison(3, SHAPE[0]))
    with pytest.raises(ValueError, match="row_linear: bits must be 12, 8 or 16, got 13"):
        weights.pack(randn(64, 64), impl="cpu", bits=13)


def test_plain_weights_have_all_bits(decoding, packed):
    weight, x = packed(16, randn(*SHAPE, seed=1)), randn(3, SHAPE[1])
    exact, got = (poison(3, SHAPE[0]) for _ in range(2))
    ops.row_linear(x, weight, exact)
    ops.row_linear(x, weight, got, exact=False)
    assert torch.equal(exact, got)


@pytest.mark.parametrize(("n", "rows_ar", "count"), [(190, 80, 1), (190, 80, 3), (70, 30, 3), (20, 12, 2), (2, 1, 1)])
def test_both_views_rows(decoding, packed, n, rows_ar, count):
    """Also with one view coded and one plain; with few tiles, which each decode, and many, which share one decoding."""
    weight, x, outs = (randn(*SHAPE, seed=1), some_exceptions()), randn(n, SHAPE[1], seed=3), []
    for bits in ((16, 16), (12, 12), (12, 16), (16, 12)):
        ar, diff = (packed(b, w) for b, w in zip(bits, weight, strict=True))
        outs.append(poison(n, SHAPE[0]))
        with threads(count):
            ops.row_linear(x, ar, outs[-1], weight_diff=diff, num_rows_ar=rows_ar)
    assert all(torch.equal(out.view(torch.int16), outs[0].view(torch.int16)) for out in outs)


@pytest.mark.parametrize(
    ("n", "rows_ar", "count"), [(190, 80, 1), (190, 80, 3), (190, 0, 2), (20, 12, 2), (9, 0, 1), (9, 9, 1), (4, 1, 1)]
)
def test_the_diffusion_view_in_8_bits_beside_exact_rows(decoding, packed, n, rows_ar, count):
    """As in a pass that verifies and drafts at once: only rows of the diffusion view are inexact."""
    weight, x, outs = (randn(*SHAPE, seed=1), some_exceptions()), randn(n, SHAPE[1], seed=3), []
    for ar, diff in (
        (packed(16, weight[0]), packed(16, drafted(weight[1]))),
        (packed(12, weight[0]), packed(8, weight[1])),
        (packed(16, weight[0]), packed(8, weight[1])),
    ):
        outs.append(poison(n, SHAPE[0]))
        with threads(count):
            ops.row_linear(x, ar, outs[-1], weight_diff=diff, num_rows_ar=rows_ar)
    assert all(torch.equal(out.view(torch.int16), outs[0].view(torch.int16)) for out in outs)


@pytest.mark.parametrize(("bits", "share"), [(12, 0.75), (8, 0.5)])
def test_how_much_smaller_they_are(packed, bits, share):
    weight = randn(640, 576, seed=1, scale=0.02)
    plain, coded = packed(16, weight), packed(bits, weight)
    assert plain.nbytes == weight.nbytes
    # 20 strips, each with a head and the entry that ends its exceptions.
    assert 0 <= coded.nbytes - (share * weight.nbytes + 20 * (HEAD + 8)) < 0.001 * weight.nbytes


@pytest.mark.full
@pytest.mark.usefixtures("wheel")
def test_the_embedded_model_has_few_exceptions(packed):
    """5 in 100,000 elements are exceptions."""
    exceptions, elements, tensors = 0, 0, checkpoint.load("smollm2-135m").tensors
    for name in tensors:
        if (weight := tensors[name]).dim() == 2:
            plain = packed(16, weight.bfloat16()).data
            num_strips, num_steps = plain.shape[:2]
            encoder = native.cpu.WeightEncoder(plain.data_ptr(), num_strips, num_steps, 12)
            exceptions += (encoder.nbytes - num_strips * (HEAD + 96 * num_steps)) // 8 - num_strips
            elements += weight.numel()
    assert 5e-5 < exceptions / elements < 6e-5


@pytest.mark.parametrize(
    "weight",
    [
        randn(64, 34, seed=1),  # an odd number of steps
        randn(64, 35, seed=1),
        randn(64, 32, seed=1).float(),
        with_exponents((64, 64), range(256)),  # would be larger if coded
        with_exponents((64, 576), [*[120] * 350, *range(100, 115), *range(40, 50)]),  # 3 in 100 would be exceptions
    ],
    ids=lambda w: f"{w.shape[1]} {w.dtype}",
)
def test_what_stays_plain(monkeypatch, weight):
    monkeypatch.setattr(native.cpu, "takes_coded_weights", lambda: True)
    for bits in (12, 8):
        packed = weights.pack(weight, impl="cpu", bits=bits)
        assert not packed.coded and packed.bits == 8 * weight.element_size()


def test_for_whom_they_are_coded(isa):
    assert weights.pack(randn(64, 64), impl="cpu").coded == (isa in CODING)


def test_other_variants_refuse_them(isa, packed):
    coded, x = packed(12, randn(64, 64)), randn(2, 64)
    if isa in CODING:
        return ops.row_linear(x, coded, poison(2, 64))
    with pytest.raises(ValueError, match=f"row_linear: weights must be packed for {isa}"):
        ops.row_linear(x, coded, poison(2, 64))
    with pytest.raises(ValueError, match=f"row_linear: weights must be packed for {isa}"):
        ops.row_linear(
            x, weights.PackedWeight(randn(64 * 64), 64, 64, "cpu"), poison(2, 64), weight_diff=coded, num_rows_ar=1
        )
