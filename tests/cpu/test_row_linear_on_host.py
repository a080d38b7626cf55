"""Both CUDA variants of row_linear run on the host with a shim: indexing, cuts, folds, stages and epilogues.

The shim's copies and multiplications happen as late as the kernel's waits allow, from descriptors and layouts that
tests/compile/test_cute.py compares with CuTe. Blocks, or clusters of them, run one after the other. So this shows what
the code computes, but not how fast, nor how CTAs and kernels overlap: tests/gpu does that.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import os

import pytest
import torch

from orthrus_rt import dispatch, native
from orthrus_rt.weights import pack
from tests import sparse
from tests.cpu.cuda_host import row_linear_library as library
from tests.cpu.cuda_host.device import as_ctypes
from tests.cpu.test_cuda_on_host import INVALID, MISALIGNED, shifted

pytestmark = pytest.mark.usefixtures("host")
GUARD, COUNTERS = 8, 4 * 4096
ISAS = "sm90", "sm80", "coded-sm90", "coded-sm80"


@pytest.fixture(params=ISAS, autouse=True)
def isa(request, monkeypatch):
    """The instruction variant, and whether it multiplies by weights in 12 bits."""
    coded, _, isa = request.param.rpartition("-")
    monkeypatch.setenv("ORTHRUS_CUDA_ISA", isa)
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", str(int(bool(coded))))
    return request.param


def tensor(*shape, scale=1.0, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def workspace(rows, k, n, sms):
    """A workspace with counters at zero, and NaN where no partial sum has been written."""
    space = torch.full([max(COUNTERS, library().row_linear_workspace(rows, k, n, sms))], 0xFF, dtype=torch.uint8)
    space[:COUNTERS] = 0
    return space


@functools.lru_cache(maxsize=4)  # the weights of one test, which nothing changes after packing
def packed(plain, gate_up, coded):
    return pack(plain, gate_up=gate_up)


def run(
    x, plain, epilogue="none", *, residual=None, diff=None, num_rows_ar=None, sms=5, descending=False, space=None,
    next_weight=None, exact=True,
):  # fmt: skip
    """Runs the op on a device of ``sms`` SMs, into a NaN-filled output between guards. Weights that are not packed yet
    are packed here, but ``next_weight`` must be packed.
    """
    host = dispatch.extension().cuda
    host.num_sms, host.descending = sms, descending
    rows, gate_up = x.shape[0], epilogue == "silu_mul"
    weight, weight_diff = (
        packed(w, gate_up, os.environ.get("ORTHRUS_CUDA_CODED")) if isinstance(w, torch.Tensor) else w
        for w in (plain, diff)
    )
    n, k = weight.out_features, weight.in_features
    width = {"silu_mul": n // 2, "argmax": weight.num_partials}.get(epilogue, n)
    dtype = torch.float32 if epilogue in ("logits", "argmax") else torch.bfloat16
    guarded = torch.full((rows + 2 * GUARD, width), torch.nan, dtype=dtype)
    out = guarded[GUARD:-GUARD]
    if epilogue == "argmax":
        out = out, torch.full((rows, width), -7, dtype=torch.int32)
    if space is None:
        space = workspace(rows, k, n, sms)
    kwargs = dict(residual=residual, epilogue=epilogue, workspace=space, next_weight=next_weight, exact=exact)
    native.row_linear(x, weight, out, weight_diff=weight_diff, num_rows_ar=num_rows_ar, **kwargs)
    assert guarded[:GUARD].isnan().all()
    assert guarded[-GUARD:].isnan().all()
    assert not space[:COUNTERS].any()  # the counters are back at zero
    return out


def close(got, exact, magnitude):
    rounding = 2.0**-8 if got.dtype == torch.bfloat16 else 0.0
    bound = rounding * exact.abs() + 2e-6 * magnitude + 1e-30
    assert ((got.double() - exact).abs() <= bound).all()


# in_features, out_features, SMs: whole tiles of one and two blocks, and cut tiles, shared by up to 8 CTAs.
SHAPES = [
    (64, 64, 3), (192, 37, 2), (128, 1001, 4), (1024, 192, 5), (640, 320, 7), (256, 3200, 7), (1024, 128, 5),
    (3072, 64, 8),
]  # fmt: skip
# Cut tiles of two blocks, as in most layers of a model, shared by 2, 3 and 6 CTAs.
CUT_PAIRS, CUT_IN_3, CUT_IN_6 = (128, 3200, 7), (640, 3072, 40), (2112, 3072, 132)
CUT_IN_11 = (4224, 64, 11)  # by so many CTAs that a fold loads their sums in three rounds
ORACLE = [
    *((17, shape) for shape in SHAPES), (70, (256, 3200, 7)), (3, CUT_IN_3), (3, CUT_IN_6), (3, CUT_IN_11),
    *((rows, CUT_PAIRS) for rows in (1, 40, 100, 120, 130, 200, 300)),
]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 17, 33, 65, 97, 113, 129, 161])
def test_one_hot_rows_pick_columns_of_the_weight(rows):
    """Exact in any order of summation: if this fails, the elements that differ show what a layout mixes up."""
    k, n = 192, 320
    plain = tensor(n, k, seed=1)
    column = torch.arange(rows) * 37 % k
    x = torch.nn.functional.one_hot(column, k).bfloat16()
    assert torch.equal(run(x, plain), plain.T[column])


def across_isas(rows_and_shapes, coded):
    """Every variant. With coded weights only the cases in ``coded``, or all with ``--full``: test_coded_blocks.py
    compares their bits with those of plain weights.
    """
    cases = [
        pytest.param(isa, *case, marks=pytest.mark.full if isa.startswith("coded") and case not in coded else ())
        for isa, case in itertools.product(ISAS, rows_and_shapes)
    ]
    return pytest.mark.parametrize(("isa", "rows", "shape"), cases, indirect=["isa"])


@across_isas(ORACLE, coded=[(3, CUT_IN_3), (1, CUT_PAIRS), (300, CUT_PAIRS)])
def test_oracle(rows, shape):
    k, n, sms = shape
    plain, x, residual = tensor(n, k, scale=k**-0.5, seed=1), tensor(rows, k, seed=2), tensor(rows, n, seed=3)
    exact = x.double() @ plain.double().T
    magnitude = x.double().abs() @ plain.double().abs().T
    got = run(x, plain, sms=sms)
    close(got, exact, magnitude)
    assert torch.equal(run(x, plain, sms=sms, descending=True), got)
    close(run(x, plain, "logits", sms=sms), exact, magnitude)
    got = run(x, plain, "residual", residual=residual, sms=sms)
    close(got, exact + residual.double(), magnitude + residual.double().abs())


SILU = [
    *((20, (1024, 2 * mlp, 5)) for mlp in (8, 200, 256)), (200, (1024, 512, 5)),
    *((rows, CUT_PAIRS) for rows in (20, 200, 300)),
]  # fmt: skip


@across_isas([*SILU, (3, CUT_IN_6)], coded=[(20, CUT_PAIRS), (300, CUT_PAIRS)])
def test_silu_mul(rows, shape):
    k, n, sms = shape
    plain, x = tensor(n, k, scale=k**-0.5, seed=1), tensor(rows, k, seed=2)
    gate, up = (x.double() @ plain.double().T).chunk(2, dim=1)
    magnitude = (x.double().abs() @ plain.double().abs().T).chunk(2, dim=1)
    bound = 4 * (magnitude[0] * up.abs() + magnitude[1] * gate.abs()) + up.abs()
    close(run(x, plain, "silu_mul", sms=sms, descending=True), gate * gate.sigmoid() * up, bound)


MORE = [pytest.param(shape, marks=pytest.mark.full) for shape in [(128, 320, 7), (1024, 128, 5), (256, 3200, 7)]]


@pytest.mark.parametrize("shape", [(512, 192, 4), (3072, 64, 8), (512, 320, 3), *MORE])
def test_row_invariance(shape):
    """Whole sums of a prefill (170 rows, in tiles of 96 or 128 or one of 192) equal cut sums of narrower variants."""
    k, n, sms = shape
    plain, x = tensor(n, k, seed=1), tensor(170, k, seed=2)
    want = run(x, plain, sms=sms)
    for rows in (1, 17, 64, 90, 96, 112, 128, 160):
        assert torch.equal(run(x[:rows], plain, sms=sms), want[:rows]), rows
    order = torch.randperm(170, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(x[order], plain, sms=sms), want[order])


@pytest.mark.parametrize("epilogue", ["residual", "silu_mul", "logits", "argmax"])
def test_epilogues_at_every_width(epilogue):
    """The same with each epilogue; two columns of the output are equal, so they tie."""
    k, n, sms = 512, 192, 4
    plain, x, residual = tensor(n, k, seed=1), tensor(170, k, seed=2), tensor(170, n, seed=3)
    plain[n // 2] = plain[n // 3]

    def some(rows):
        out = run(x[:rows], plain, epilogue, residual=residual[:rows] if epilogue == "residual" else None, sms=sms)
        return out if isinstance(out, tuple) else (out,)

    want = some(170)
    for rows in (1, 17, 33, 65, 97, 113, 129, 161):
        for got, all_rows in zip(some(rows), want, strict=True):
            assert torch.equal(got, all_rows[:rows]), rows


@pytest.mark.parametrize("epilogue", ["none", "residual", "logits"])
@pytest.mark.parametrize("n", [33, 34, 36])
def test_rows_that_are_not_aligned(n, epilogue):
    """Rows of 36 bf16 are not aligned to 16 bytes, shorter ones not even to 8: the bits are those of 64 outputs."""
    plain, x, residual = tensor(64, 64, seed=1), tensor(20, 64, seed=2), tensor(20, 64, seed=3)

    def some(outputs):
        of = residual[:, :outputs].contiguous() if epilogue == "residual" else None
        return run(x, plain[:outputs], epilogue, residual=of)

    assert torch.equal(some(n), some(64)[:, :n])


BOTH = [(1, 0), (20, 0), (20, 20), (21, 1), (50, 32), (150, 70), (200, 30), (200, 170), (280, 140)]
WHOLE, CUT = (512, 128, 5), (1024, 128, 5)


ROWS_AND_SHAPES = [
    *itertools.product(BOTH, (WHOLE, CUT)), *itertools.product([(20, 0), (150, 70), (200, 30), (200, 170)], [CUT_PAIRS])
]  # fmt: skip


def both_views():
    """All combinations with ``--full``. Otherwise every second one, so that every epilogue meets every shape, and coded
    weights only with the shape that has tiles of two blocks.
    """
    cases = enumerate(itertools.product(ROWS_AND_SHAPES, ("none", "residual")))
    for isa, (i, ((both, shape), epilogue)) in itertools.product(ISAS, cases):
        quick = (i & 7).bit_count() % 2 == 0 and (shape == CUT_PAIRS or not isa.startswith("coded"))
        yield pytest.param(isa, *both, shape, epilogue, marks=() if quick else pytest.mark.full)


@pytest.mark.parametrize(("isa", "rows", "ar", "shape", "epilogue"), [*both_views()], indirect=["isa"])
def test_both_views(rows, ar, shape, epilogue):
    k, n, sms = shape
    weight, diff, x = tensor(n, k, seed=1), tensor(n, k, seed=2), tensor(rows, k, seed=3)
    residual = tensor(rows, n, seed=4) if epilogue == "residual" else None

    def some(part, *args, **kwargs):
        of = None if residual is None else residual[part]
        return run(x[part], *args, epilogue, residual=of, sms=sms, **kwargs)

    got = some(slice(None), weight, diff=diff, num_rows_ar=ar, descending=True)
    assert torch.equal(got[:ar], some(slice(ar), weight) if ar else got[:0])
    assert torch.equal(got[ar:], some(slice(ar, None), diff) if rows - ar else got[:0])


# The last three have tiles of two blocks; in the last one, the lowest of the tied ids is in a second block.
ARGMAX = [(64, 512, 3), (128, 37, 4), (64, 1001, 5), (64, 3136, 6), (64, 3180, 6), (192, 3180, 6), (64, 3328, 1)]


@across_isas(
    [*itertools.product([1, 33, 200, 300, 330], ARGMAX)],
    coded=[(1, (64, 3180, 6)), (33, (192, 3180, 6)), (330, (64, 3328, 1))],
)
def test_argmax(shape, rows):
    k, n, sms = shape
    plain, x = tensor(n, k, seed=1), tensor(rows, k, seed=2)
    plain[n // 2 :: 7] = plain[n // 3 + 1] = plain[n // 3]  # the first two belong to one thread
    plain[n // 5] = torch.nan
    x[1:][-1:] = torch.nan
    x[0] = plain[n // 3]
    value, index = run(x, plain, "argmax", sms=sms, descending=True)
    logits = run(x, plain, "logits", sms=sms)
    logits[logits.isnan()] = -torch.inf
    assert torch.equal(value, logits.gather(1, index.long()))
    top = value.amax(1, keepdim=True)
    best = torch.where(value == top, index, n).amin(1)
    assert torch.equal(top, logits.amax(1, keepdim=True))
    assert torch.equal(best.long(), (logits == top).int().argmax(1))
    assert best[0] == n // 3
    if rows > 1:
        first = index[-1]  # where each run begins: no other row has its best before that, or in the next run
        assert bool((value[-1] == -torch.inf).all() and first[0] == 0)
        assert bool((index >= first).all() and (index[:, :-1] < first[1:]).all() and (first[1:] < n).all())


@pytest.mark.parametrize("shape", [(64, 37, 3), (128, 1001, 4), (64, 3180, 6)])
def test_argmax_of_negative_logits(shape):
    """The padding of the last block, whose products are 0, is never chosen as a token."""
    k, n, sms = shape
    value, index = run(tensor(3, k, seed=2).abs(), -tensor(n, k, seed=1).abs(), "argmax", sms=sms)
    assert (index < n).all() and (value < 0).all()


# Among others, hidden, MLP and vocabulary sizes of real checkpoints; SMs of real devices, and a few small numbers.
INS = [64, 192, 576, 1024, 1536, 2048, 2560, 4096, 6144, 9728, 12288, 14336, 28672]
OUTS = [8, 37, 64, 576, 960, 1001, 2048, 4096, 6144, 19456, 24576, 28672, 49152, 57344, 128256, 151936]
SMS = [1, 2, 5, 7, 60, 78, 108, 114, 132, 142, 148, 188]


def test_every_unit_has_one_owner_and_every_partial_sum_a_place():
    beyond_32_bits = (64 * 24000, 64 * 1131, False, 188)
    for case in (*itertools.product(INS, OUTS, (False, True), SMS), beyond_32_bits):
        assert library().row_linear_plan_error(*case) is None, case


def test_shapes_are_cut_as_they_say():
    """Otherwise no test would fold, and with more SMs than tiles some would have nothing to do."""
    shared = {WHOLE: 1, CUT: 3, CUT_PAIRS: 2, CUT_IN_3: 3, CUT_IN_6: 6, CUT_IN_11: 11}
    shared |= {(3072, 64, 8): 8, (1024, 192, 5): 3, (512, 192, 4): 2}
    # Just within the idle time and the number of units that leave tiles whole, and just beyond them.
    shared |= {(512, 6144, 5): 1, (512, 6016, 5): 2, (704, 64, 2): 1, (768, 64, 2): 2}
    assert {shape: library().row_linear_most_sharers(*shape) for shape in shared} == shared


def test_reciprocals_divide_exactly():
    """They compute where ranges are cut, on which the order of a sum depends, and so its bits."""
    near_powers = {2**k + by for k in range(2, 31) for by in (-1, 0, 1)}
    for d in sorted({*range(1, 200), *near_powers, 9728 * 132, 46341, 2**31 - 1}):
        assert library().wrongly_divided(d) == -1, d


@pytest.mark.parametrize(("rows", "epilogue"), [(1, "none"), (2100, "residual"), (2100, "silu_mul")])
def test_64_bit_offsets(rows, epilogue, host, monkeypatch):
    """So many SMs that each has a single tile."""
    host.num_sms = 800_000
    monkeypatch.setattr(ctypes.c_bool.in_dll(library(), "last_cluster_only"), "value", True)
    sparse.check_row_linear(native.row_linear, pack, rows, epilogue, workspace=torch.zeros(COUNTERS // 4))


def test_a_reused_workspace():
    plain, x, space = tensor(128, 1024, seed=1), tensor(24, 1024, seed=2), workspace(160, 1024, 128, 5)
    want = run(x, plain)
    for _ in range(3):
        assert torch.equal(run(x, plain, space=space), want)


def test_without_another_view_all_rows_have_the_one_weight():
    plain, x = tensor(64, 64, seed=1), tensor(20, 64, seed=2)
    for ar in (0, 7):
        assert torch.equal(run(x, plain, num_rows_ar=ar), run(x, plain))


def test_no_rows_and_no_outputs(monkeypatch):
    assert run(tensor(0, 64), tensor(64, 64)).shape == (0, 64)
    errors = []

    def launch(op, params, device):
        params = as_ctypes(params)
        params.out_features = 0
        errors.append(library().row_linear(ctypes.byref(params), 0, 5))

    monkeypatch.setattr(native, "_launch", launch)
    run(tensor(3, 64), tensor(64, 64))
    assert errors == [0]


@pytest.mark.parametrize("n", [128, 132])
def test_what_is_not_aligned_is_refused(n, host):
    """On a device such an access would make the context unusable."""
    host.num_sms = 5
    weight, residual = pack(tensor(n, 1024, seed=1)), tensor(3, n)
    tensors = dict(x=tensor(3, 1024), out=torch.empty_like(residual), workspace=workspace(3, 1024, n, 5))
    given = tensors | dict(residual=residual, weight=weight, weight_diff=weight, next_weight=weight)
    native.row_linear(**given, num_rows_ar=1, epilogue="residual")
    for name, value in given.items():
        data = value.data if value is weight else value
        for by in (1, 8 // data.element_size()):
            moved = shifted(data, by)
            moved = dataclasses.replace(value, data=moved) if value is weight else moved
            with pytest.raises(AssertionError, match=f"row_linear returned {MISALIGNED}"):
                native.row_linear(**given | {name: moved}, num_rows_ar=1, epilogue="residual")


@pytest.mark.parametrize("n", [37, 130])
def test_rows_of_odd_widths_may_lie_anywhere(n, host):
    host.num_sms = 5
    weight, x, residual, out = pack(tensor(n, 64, seed=1)), tensor(3, 64), tensor(3, n), torch.empty(3, n).bfloat16()
    tensors = dict(x=x, weight=weight, workspace=workspace(3, 64, n, 5), epilogue="residual")
    native.row_linear(**tensors, residual=residual, out=out)
    moved = shifted(torch.zeros_like(out))
    native.row_linear(**tensors, residual=shifted(residual), out=moved)
    assert torch.equal(moved, out)


REFUSED = dict(in_features=(0, 96), num_rows_ar=(-1, 4), workspace_bytes=(COUNTERS,), num_partials=(1, 3))


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_do_not_take_is_refused(name, monkeypatch):
    """Each is reported as an error before any launch."""
    errors = []

    def launch(op, params, device):
        params = as_ctypes(params)
        for value in REFUSED[name]:
            setattr(params, name, value)
            errors.append(library().row_linear(ctypes.byref(params), 0, 5))

    monkeypatch.setattr(native, "_launch", launch)
    run(tensor(3, 1024), tensor(128, 1024), "argmax" if name == "num_partials" else "none")
    assert errors == [INVALID] * len(REFUSED[name])


@pytest.mark.parametrize(("rows", "ar"), [(3, 3), (24, 24), (24, 0), (34, 17)])
def test_a_workspace_that_does_not_hold_every_sum_is_refused(rows, ar, monkeypatch):
    """It is a byte smaller than the sums of AR rows, and of diffusion rows if there are any, in tiles of 16 or of 32
    rows. The memory after it belongs to something else.
    """
    k, n, sms = CUT
    views = 2 if ar < rows else 1
    need = COUNTERS + (library().row_linear_workspace(max(ar, rows - ar), k, n, sms) - COUNTERS) // 2 * views
    errors = []

    def launch(op, params, device):
        params = as_ctypes(params)
        for params.workspace_bytes in (need - 1, need):
            errors.append(library().row_linear(ctypes.byref(params), 0, sms))

    monkeypatch.setattr(native, "_launch", launch)
    run(tensor(rows, k), tensor(n, k), diff=tensor(n, k), num_rows_ar=ar, sms=sms)
    assert errors == [INVALID, 0]
