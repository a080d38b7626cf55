"""row_linear on the CPU: the float64 product, its epilogues, and the same bits for any number of rows."""

import pytest
import torch

from orthrus_rt import ops, weights
from tests.native_cpu import assert_rounded, poison, randn, threads

SHAPES = [(1, 1), (16, 2), (33, 7), (96, 64), (200, 130), (1100, 33)]  # out_features, in_features
ROWS = (1, 2, 3, 11, 12, 13, 25, 33, 34, 49, 128)


def product(x, w):
    """float64 logits, and the rounding error that fp32 accumulation in any order may leave."""
    exact = x.double() @ w.double().T
    return exact, (x.double().abs() @ w.double().abs().T) * (x.shape[1] + 4) * 2.0**-24


def logits(x, packed, **kwargs):
    out = poison(x.shape[0], packed.out_features, dtype=torch.float32)
    ops.row_linear(x, packed, out, epilogue="logits", **kwargs)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_and_epilogues(isa, element, shape):
    w = randn(*shape, seed=1)
    packed = weights.pack(w, impl="cpu")
    for n in ROWS:
        x = randn(n, shape[1], seed=n)
        exact, bound = product(x, w)
        got = logits(x, packed)
        assert bool(((got.double() - exact).abs() <= bound).all())
        plain = poison(n, shape[0])
        ops.row_linear(x, packed, plain)
        assert torch.equal(plain, got.to(element))
        residual = randn(n, shape[0], seed=2)
        inplace = residual.clone()
        ops.row_linear(x, packed, inplace, residual=inplace, epilogue="residual")
        assert torch.equal(inplace, (got + residual.float()).to(element))


@pytest.mark.parametrize("width", [1, 16, 33, 100])
def test_silu_mul(isa, element, width):
    w = randn(2 * width, 48, seed=3)
    packed = weights.pack(w, gate_up=True, impl="cpu")
    gate_only, up_only = weights.pack(w[:width], impl="cpu"), weights.pack(w[width:], impl="cpu")
    x = randn(13, 48, seed=4)
    got = poison(13, width)
    ops.row_linear(x, packed, got, epilogue="silu_mul")
    gate, up = logits(x, gate_only).double(), logits(x, up_only).double()
    assert_rounded(got, gate / (1 + torch.exp(-gate)) * up, slack=1e-6)


@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("shape", [(64, 32), (66, 31), (34, 30), (66, 132)], ids=str)
def test_where_a_weight_lies_changes_nothing(element, shape, gate_up):
    """Rows of a larger matrix, or elements that begin in the middle of a word."""
    large = randn(shape[0] + 2, shape[1] + 1, seed=5)
    among_others, behind_one = large[1:-1, 1:], large.flatten()[1:][: shape[0] * shape[1]].view(shape)
    for weight in (among_others, behind_one):
        packed, clean = (weights.pack(w, gate_up=gate_up, impl="cpu") for w in (weight, weight.clone()))
        assert packed.coded == clean.coded and torch.equal(packed.data.view(torch.uint8), clean.data.view(torch.uint8))


def test_silu_mul_extremes(isa, element):
    """Gates far out on both sides: x or 0, without an overflow on the way; a NaN stays NaN."""
    w = torch.zeros(2, 2, dtype=element)
    w[0, 0] = w[1, 1] = 1.0
    packed = weights.pack(w, gate_up=True, impl="cpu")
    x = torch.tensor([[200.0, 2], [-200.0, 2], [-85.0, 1], [torch.nan, 1], [0.0, 3]]).to(element)
    got = poison(5, 1)
    ops.row_linear(x, packed, got, epilogue="silu_mul")
    assert got[0] == 400 and abs(float(got[1])) < 1e-30 and abs(float(got[2])) < 1e-30
    assert bool(got[3].isnan()) and got[4] == 0


@pytest.mark.parametrize("up", [1.0, 1e6])
def test_silu_mul_of_gates_whose_exp_overflows(isa, element, up):
    """Quotients below 1.1e-36 may become 0, as in CUDA; their sign is kept."""
    packed = weights.pack(torch.eye(2).to(element), gate_up=True, impl="cpu")
    gates = torch.tensor([-88.0, -88.5, -100.0, -1e30, -3e38])
    x = torch.stack([gates, torch.full_like(gates, up)], 1).to(element)
    got = poison(len(gates), 1)
    ops.row_linear(x, packed, got, epilogue="silu_mul")
    gate, scale = x.double().unbind(1)
    exact = gate / (1 + torch.exp(-gate)) * scale
    assert bool(((got[:, 0].double() - exact).abs() <= 1.1e-36 * scale).all()) and bool(got.signbit().all())


@pytest.mark.parametrize("vocab", [3, 512, 513, 1500])
def test_argmax_is_the_argmax_of_the_logits(isa, element, vocab):
    w = randn(vocab, 32, seed=5)
    w[vocab // 2 :] = w[: vocab - vocab // 2].clone()  # every maximum is tied with a later id
    packed = weights.pack(w, impl="cpu")
    assert packed.num_partials == -(-vocab // 512)
    for n in (1, 16, 40):
        x = randn(n, 32, seed=n)
        x[n // 2] = 0  # all logits tied
        value = poison(n, packed.num_partials, dtype=torch.float32)
        index = torch.full((n, packed.num_partials), -7, dtype=torch.int32)
        ops.row_linear(x, packed, (value, index), epilogue="argmax")
        full = logits(x, packed)
        for r in range(n):
            for t, part in enumerate(full[r].split(512)):
                assert value[r, t] == part.max()
                assert index[r, t] == t * 512 + int((part == part.max()).nonzero()[0])


def test_argmax_of_nan(isa, element):
    """NaN never wins; a tile of nothing but NaN yields -inf and a valid id."""
    w = torch.zeros(600, 2, dtype=element)
    w[:, 0] = 1
    w[5, 1], w[512:, 1] = torch.nan, torch.nan
    packed = weights.pack(w, impl="cpu")
    value, index = torch.zeros(1, 2), torch.zeros(1, 2).int()
    ops.row_linear(torch.tensor([[-3.0, 1.0]]).to(element), packed, (value, index), epilogue="argmax")
    assert value.tolist() == [[-3.0, -torch.inf]] and index.tolist() == [[0, 512]]


@pytest.mark.parametrize(("best", "wild"), [(5, 21), (21, 5), (0, 16), (31, 15), (15, 14), (16, 17)])
def test_argmax_beside_nan(isa, element, best, wild):
    """The result does not depend on the lanes of a strip that hold them."""
    w = torch.ones(32, 2, dtype=element)
    w[best, 0], w[wild, 1] = 2, torch.nan
    value, index = torch.zeros(1, 1), torch.zeros(1, 1).int()
    x = torch.tensor([[3.0, 1.0]]).to(element)
    ops.row_linear(x, weights.pack(w, impl="cpu"), (value, index), epilogue="argmax")
    assert (value.item(), index.item()) == (7.0, best)


def test_argmax_on_many_threads(isa, element):
    """Each partial maximum is computed by one thread."""
    packed, x = weights.pack(randn(5000, 32, seed=5), impl="cpu"), randn(3, 32, seed=6)
    full = torch.nn.functional.pad(logits(x, packed), (0, 120), value=-torch.inf).view(3, 10, 512)
    for _ in range(20):
        best = poison(3, 10, dtype=torch.float32), torch.full((3, 10), -7, dtype=torch.int32)
        with threads(4):
            ops.row_linear(x, packed, best, epilogue="argmax")
        assert torch.equal(best[0], full.amax(2))
        assert torch.equal(best[1], full.argmax(2).int() + 512 * torch.arange(10).int())


def test_two_views_in_one_launch(isa, element):
    w, w_diff = randn(70, 34, seed=6), randn(70, 34, seed=7)
    packed, packed_diff = weights.pack(w, impl="cpu"), weights.pack(w_diff, impl="cpu")
    x = randn(20, 34, seed=8)
    for split in (0, 1, 7, 20):
        got = logits(x, packed, weight_diff=packed_diff, num_rows_ar=split)
        assert torch.equal(got[:split], logits(x[:split], packed))
        assert torch.equal(got[split:], logits(x[split:], packed_diff))
        assert torch.equal(logits(x, packed, num_rows_ar=split), logits(x, packed))  # without a second view


@pytest.mark.parametrize("in_features", [31, 32, 33, 63])
def test_nan_of_a_weight_stays_with_its_outputs(isa, element, in_features):
    """Where a strip ends, the next one begins."""
    w, x = randn(96, in_features, seed=17), randn(40, in_features, seed=18)
    clean = logits(x, weights.pack(w, impl="cpu"))
    w[32:64] = torch.nan
    dirty = logits(x, weights.pack(w, impl="cpu"))
    assert torch.equal(dirty[:, :32], clean[:, :32]) and torch.equal(dirty[:, 64:], clean[:, 64:])
    assert bool(dirty[:, 32:64].isnan().all())


@pytest.mark.parametrize("shape", [(96, 64), (576, 1536), (513, 31), (2500, 97), (70, 2500)], ids=str)
def test_row_invariance(isa, element, shape, request):
    """A row's bits: alone, among 16 and among many rows (one of them NaN), in any order, on any number of threads."""
    num_rows = 1000 if request.config.getoption("--full") else 300
    packed = weights.pack(randn(*shape, seed=9, scale=0.1), impl="cpu")
    x = randn(num_rows, shape[1], seed=10)
    x[3] = torch.nan
    everything = logits(x, packed)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(logits(x, packed).nan_to_num(7.0), everything.nan_to_num(7.0))
            assert torch.equal(logits(x[order], packed).nan_to_num(7.0), everything[order].nan_to_num(7.0))
            for n in (1, 5, 16, 40, 128):
                assert torch.equal(logits(x[40 : 40 + n], packed), everything[40 : 40 + n])


@pytest.mark.parametrize("width", [2050, 2051])
def test_many_rows_in_every_epilogue(isa, element, width):
    """More rows than fit in a cache, with NaN rows between them, in place and with two views: what 10 of them give."""
    w, n, split, few = randn(70, width, seed=11, scale=0.1), 700, 330, slice(325, 335)
    packed, gates = weights.pack(w, impl="cpu"), weights.pack(w, gate_up=True, impl="cpu")
    diff = weights.pack(randn(70, width, seed=12, scale=0.1), impl="cpu")
    x, residual = randn(n, width, seed=13), randn(n, 70, seed=14)
    x[::2] = torch.nan

    def run(part, rows_ar):
        count = x[part].shape[0]
        added, silu, views = residual[part].clone(), poison(count, 35), poison(count, 70)
        best = torch.empty(count, 1), torch.empty(count, 1, dtype=torch.int32)
        ops.row_linear(x[part], packed, added, residual=added, epilogue="residual")
        ops.row_linear(x[part], gates, silu, epilogue="silu_mul")
        ops.row_linear(x[part], packed, best, epilogue="argmax")
        ops.row_linear(x[part], packed, views, weight_diff=diff, num_rows_ar=rows_ar)
        return added, silu, *best, views

    for whole, alone in zip(run(slice(0, n), split), run(few, 5), strict=True):
        assert torch.equal(whole[few][::2], alone[::2]) and not bool(whole[1::2].isnan().any())


@pytest.mark.parametrize("in_features", [255, 258, 600, 2051])
def test_bf16_gives_what_the_same_numbers_give_in_float32(isa, in_features):
    """On instruction sets without an instruction for pairs: products of bf16 are exact, and inputs are summed in order,
    however a strip is cut.
    """
    if isa.endswith("bf16"):
        pytest.skip(f"{isa} rounds pairs of products in its own way")
    w, x = randn(70, in_features, seed=15), randn(130, in_features, seed=16)
    packed, wide = weights.pack(w, impl="cpu"), weights.pack(w.float(), impl="cpu")
    nothing = weights.pack(torch.zeros(1, in_features + 1, dtype=torch.bfloat16), impl="cpu")
    for n in (1, 2, 3, 4, 6, 7, 13, 128, 130):
        logits(torch.full((130, in_features + 1), torch.nan).bfloat16(), nothing)  # leaves NaN wherever rows are kept
        assert torch.equal(logits(x[:n], packed), logits(x[:n].float(), wide))


def test_no_rows(isa, element):
    packed = weights.pack(randn(40, 8), impl="cpu")
    assert logits(randn(0, 8), packed).shape == (0, 40)
