"""CUDA row_linear: against float64, and bit for bit where the contract says that bits do not change."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orthrus_rt import dispatch, ops
from orthrus_rt.weights import pack
from tests import large_logits

pytestmark = pytest.mark.gpu

# in_features, out_features: whole tiles, cut tiles of one and of two blocks, outputs that fill no block.
SHAPES = [
    (64, 64),
    (576, 960),
    (1536, 576),
    (128, 37),
    (256, 1001),
    (2048, 2048),
    (4096, 6144),
    (9728, 2560),
    (640, 9000),
]
ROWS = [1, 2, 15, 16, 17, 33, 64, 80, 100, 128, 160, 161, 300]


@pytest.fixture(params=["", "sm80"], autouse=True)
def isa(request, monkeypatch):
    """Both instruction variants, with the same packed weights."""
    monkeypatch.setenv("ORTHRUS_CUDA_ISA", request.param)
    return request.param


def tensor(*shape, scale=1.0, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * scale).bfloat16()


def wide(rows, k, factor=1.0, seed=0):
    """Exponents span 41 values, and neighbours differ by ``factor``. Where products of x and the weight nearly cancel,
    this shows how a tensor core aligns and truncates the terms of a sum.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    exponents = torch.randint(-20, 21, (rows, k), generator=generator, device="cuda")
    values = tensor(rows, k, seed=seed) * 2.0**exponents
    values[:, 1::2] = values[:, ::2] * factor
    return values.bfloat16()


def workspace(max_rows, in_features, out_features):
    size = dispatch.extension().cuda.row_linear_workspace(max_rows, in_features, out_features)
    return torch.zeros(max(size, 16), dtype=torch.uint8, device="cuda")


def run(x, weight, epilogue="none", *, residual=None, space=None, **views):
    """Runs the op into a NaN-filled output between guards, which must not change."""
    if space is None:
        space = workspace(x.shape[0], weight.in_features, weight.out_features)
    width = weight.out_features // 2 if epilogue == "silu_mul" else weight.out_features
    if epilogue == "argmax":
        width = weight.num_partials
    dtype = torch.float32 if epilogue in ("logits", "argmax") else torch.bfloat16
    guarded = torch.full((x.shape[0] + 16, width), torch.nan, dtype=dtype, device="cuda")
    out = guarded[8:-8]
    if epilogue == "argmax":
        out = (out, torch.full(out.shape, -7, dtype=torch.int32, device="cuda"))
    ops.row_linear(x, weight, out, epilogue=epilogue, residual=residual, workspace=space, **views)
    torch.cuda.synchronize()
    assert guarded[:8].isnan().all()
    assert guarded[-8:].isnan().all()
    return out


def close(got, exact, magnitude):
    """Products whose absolute values sum to ``magnitude``, added in fp32, then rounded once to got's dtype.

    Tensor cores cut the sum's low bits off at every step of 16 products, 2^-23 of it each time.
    """
    rounding = 2.0**-8 if got.dtype == torch.bfloat16 else 0.0
    bound = rounding * exact.abs() + 5e-6 * magnitude + 1e-30
    worst = ((got.double() - exact).abs() / bound).max() if got.numel() else 0.0
    assert worst <= 1, f"error is {float(worst):.2f} times the bound"


@pytest.mark.parametrize("rows", [1, 17, 33, 65, 97, 113, 129, 161])
def test_one_hot_rows_pick_columns_of_the_weight(rows):
    """Exact in any order of summation: if this fails, the elements that differ show what a layout mixes up."""
    k, n = 192, 320
    plain = tensor(n, k, seed=1)
    column = torch.arange(rows, device="cuda") * 37 % k
    x = torch.nn.functional.one_hot(column, k).bfloat16()
    assert torch.equal(run(x, pack(plain)), plain.T[column])


@pytest.mark.parametrize("shape", SHAPES)
def test_oracle(shape):
    k, n = shape
    plain = tensor(n, k, scale=k**-0.5, seed=1)
    weight = pack(plain)
    for rows in ROWS:
        x, residual = tensor(rows, k, seed=rows), tensor(rows, n, seed=rows + 1)
        got = {
            e: run(x, weight, e, residual=residual if e == "residual" else None) for e in ("none", "residual", "logits")
        }
        exact = x.double() @ plain.double().T
        magnitude = x.double().abs() @ plain.double().abs().T
        close(got["none"], exact, magnitude)
        close(got["logits"], exact, magnitude)
        close(got["residual"], exact + residual.double(), magnitude + residual.double().abs())


@pytest.mark.parametrize(("k", "mlp"), [(576, 1536), (2048, 6144), (64, 8), (128, 1000)])
def test_silu_mul(k, mlp):
    plain = tensor(2 * mlp, k, scale=k**-0.5, seed=2)
    weight = pack(plain, gate_up=True)
    for rows in (1, 16, 40, 160, 300):
        x = tensor(rows, k, seed=rows)
        got = run(x, weight, "silu_mul")
        gate, up = (x.double() @ plain.double().T).chunk(2, dim=1)
        magnitude = (x.double().abs() @ plain.double().abs().T).chunk(2, dim=1)
        close(got, gate * gate.sigmoid() * up, 4 * (magnitude[0] * up.abs() + magnitude[1] * gate.abs()) + up.abs())


@pytest.mark.parametrize("shape", [(576, 960), (2048, 2048), (4096, 6144)])
@pytest.mark.parametrize(
    ("rows", "ar"),
    [(1, 0), (1, 1), (32, 0), (32, 1), (33, 32), (64, 17), (96, 16), (150, 70), (250, 130), (300, 7), (400, 200)],
)
def test_both_views(shape, rows, ar):
    k, n = shape
    weight, diff = pack(tensor(n, k, seed=1)), pack(tensor(n, k, seed=2))
    x, residual = tensor(rows, k, seed=3), tensor(rows, n, seed=4)
    got = run(x, weight, "residual", residual=residual, weight_diff=diff, num_rows_ar=ar)
    if ar:
        assert torch.equal(got[:ar], run(x[:ar], weight, "residual", residual=residual[:ar]))
    if rows - ar:
        assert torch.equal(got[ar:], run(x[ar:], diff, "residual", residual=residual[ar:]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("epilogue", "kind"), [("none", "normal"), ("logits", "normal"), ("logits", "wide")])
def test_row_invariance(shape, epilogue, kind):
    """For every tile width, as PTX does not specify in what order wgmma and mma add up."""
    k, n = shape
    weight = pack(wide(n, k, seed=1) if kind == "wide" else tensor(n, k, seed=1))
    x = wide(1000, k, factor=-1.01, seed=5) if kind == "wide" else tensor(1000, k, seed=5)
    want = run(x, weight, epilogue)
    assert want.isfinite().all()
    alone = torch.cat([run(x[i : i + 1], weight, epilogue) for i in range(0, 1000, 111)])
    assert torch.equal(alone, want[::111])
    for rows in [*range(2, 40, 5), 63, 64, 65, 96, 97, 112, 113, 127, 128, 129, 159, 160, 161, 200, 300]:
        assert torch.equal(run(x[:rows], weight, epilogue), want[:rows]), rows
    order = torch.randperm(1000, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    assert torch.equal(run(x[order], weight, epilogue), want[order])
    assert torch.equal(run(x[order[:128]], weight, epilogue), want[order[:128]])


def test_64_bit_offsets(large_card):
    rows, vocab = large_logits.ROWS, large_logits.VOCAB
    out = torch.zeros(rows, vocab, device="cuda")
    large_logits.check_row_linear(ops.row_linear, out, in_features=64, workspace=workspace(rows, 64, vocab))


def test_a_weight_beyond_2_31_elements(large_card):
    """All rows are zero except the last ones and those around 2^31 bytes and elements."""
    k, ends = 8192, [2**31 // (2 * 8192), 2**31 // 8192, 2**31 // 8192 + 200]
    plain, x = torch.zeros(ends[-1], k, dtype=torch.bfloat16, device="cuda"), tensor(5, k, seed=2)
    some = torch.cat([torch.arange(end - 9, min(end + 9, ends[-1]), device="cuda") for end in ends])
    plain[some] = tensor(len(some), k, seed=1)
    got = run(x, pack(plain))
    exact, magnitude = x.double() @ plain[some].double().T, x.double().abs() @ plain[some].double().abs().T
    close(got[:, some], exact, magnitude)
    got[:, some] = 0
    assert not got.any()


def best(partials):
    """The token that the partial maxima select: highest value, then lowest id."""
    value, index = partials
    top = value.amax(1, keepdim=True)
    return top[:, 0], torch.where(value == top, index, 2**31 - 1).amin(1)


@pytest.mark.parametrize("shape", [(64, 512), (576, 49152), (128, 37), (256, 1001), (2048, 20000)])
def test_argmax(shape):
    k, n = shape
    plain = tensor(n, k, seed=1)
    plain[n // 2 :: 7] = plain[n // 3]  # ties: the same logit at many ids
    plain[n // 5] = torch.nan
    weight = pack(plain)
    for rows in (1, 5, 32, 100, 160, 200, 300, 330):
        x = tensor(rows, k, seed=rows)
        x[0] = plain[n // 3]  # its likeliest token is one of the tied ones
        partials = run(x, weight, "argmax")
        value, index = best(partials)
        logits = run(x, weight, "logits")
        logits[logits.isnan()] = -torch.inf
        assert torch.equal(value, logits.amax(1))
        assert torch.equal(index.long(), (logits == logits.amax(1, keepdim=True)).int().argmax(1))
        assert index[0] == n // 3
        assert torch.equal(partials[0], torch.gather(logits, 1, partials[1].long()))
    value, index = run(tensor(3, k).fill_(torch.nan), weight, "argmax")
    assert (value == -torch.inf).all()
    assert ((index >= 0) & (index < n)).all()


@pytest.mark.parametrize("rows", [1, 16, 96, 144])
def test_layers_that_rewrite_their_input_early(rows):
    """In a chain this short kernels may start early, and the last one rewrites in place what the first one has read.
    The bits are the same as with a wait after every op."""
    gate_up = pack(tensor(2 * 1536, 576, scale=0.04, seed=1), gate_up=True)
    down = pack(tensor(576, 1536, scale=0.02, seed=2))
    norm = torch.rand(576, device="cuda") + 0.5
    start, hidden, normed = tensor(rows, 576, seed=3), tensor(rows, 576), tensor(rows, 576)
    wide = tensor(rows, 1536)
    space = max((workspace(rows, *shape) for shape in ((576, 3072), (1536, 576))), key=len)

    def layers(after=lambda: None):
        for _ in range(20):
            ops.rms_norm(hidden, norm, 1e-6, normed)
            after()
            ops.row_linear(normed, gate_up, wide, epilogue="silu_mul", workspace=space, next_weight=down)
            after()
            ops.row_linear(
                wide, down, hidden, residual=hidden, epilogue="residual", workspace=space, next_weight=gate_up
            )
            after()

    hidden.copy_(start)
    layers(torch.cuda.synchronize)
    want = hidden.clone()
    assert want.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    for _ in range(50):
        hidden.copy_(start)
        graph.replay()
        assert torch.equal(hidden, want)


@pytest.mark.parametrize("rows", [1, 32, 160, 300])
def test_graph_and_reuse(rows):
    """With one workspace for many launches of several shapes, eager and replayed, the bits are always the same."""
    shapes = [(4096, 6144), (2048, 2048), (2048, 12288), (6144, 2048), (576, 960)]
    weights = [pack(tensor(n, k, seed=n)) for k, n in shapes]
    xs = [tensor(rows, k, seed=k) for k, _ in shapes]
    space = torch.zeros(max(workspace(rows, k, n).numel() for k, n in shapes), dtype=torch.uint8, device="cuda")
    want = [run(x, w) for x, w in zip(xs, weights, strict=True)]
    outs = [torch.empty_like(w) for w in want]

    def all_of_them():
        for x, w, out, following in zip(xs, weights, outs, [*weights[1:], weights[0]], strict=True):
            ops.row_linear(x, w, out, workspace=space, next_weight=following)

    def check():
        torch.cuda.synchronize()
        for out, bits in zip(outs, want, strict=True):
            assert torch.equal(out, bits)
            out.fill_(torch.nan)

    for _ in range(50):
        all_of_them()
    check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            all_of_them()
    for _ in range(20):
        graph.replay()
    check()


def test_first_call_of_a_thread():
    """No call has made the device's context current in the thread yet, and the driver needs it for x's tensor map."""
    weight, x = pack(tensor(960, 576, seed=1)), tensor(17, 576)
    want, space = run(x, weight), workspace(17, 576, 960)
    got = torch.full_like(want, torch.nan)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(ops.row_linear, x, weight, got, workspace=space).result()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


def test_in_place_residual():
    weight = pack(tensor(2048, 2048, scale=0.02, seed=1))
    x, hidden = tensor(32, 2048, seed=2), tensor(32, 2048, seed=3)
    want = run(x, weight, "residual", residual=hidden)
    ops.row_linear(x, weight, hidden, residual=hidden, epilogue="residual", workspace=workspace(32, 2048, 2048))
    assert torch.equal(hidden, want)


def test_isa(isa):
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert dispatch.extension().cuda.isa() == ("sm80" if isa or not hopper else "sm90a")


def test_no_rows():
    weight = pack(tensor(960, 576))
    assert run(tensor(0, 576), weight).shape == (0, 960)


def test_errors():
    weight = pack(tensor(6144, 4096))
    with pytest.raises(ValueError, match=r"row_linear: workspace must be at least .* bytes for 32 rows, got 16"):
        run(tensor(32, 4096), weight, space=torch.zeros(16, dtype=torch.uint8, device="cuda"))
