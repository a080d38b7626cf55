"""What row_linear brings to L2 ahead of its loads, on the host with a shim: see test_row_linear_on_host.py.

sm_80 prefetches nothing. Drafts read less of a coded block, and the diffusion view's own have no more.
"""

import ctypes
import functools
import os

import pytest
import torch

from orthrus_rt.weights import pack
from tests.cpu import test_row_linear_on_host as rl
from tests.cpu.cuda_host import row_linear_library as library
from tests.cpu.test_row_linear_on_host import run, tensor

pytestmark = pytest.mark.usefixtures("host")
isa = rl.isa

READ = pytest.mark.parametrize(("exact", "bits"), [(True, 12), (False, 12), (True, 8), (False, 8)], indirect=["bits"])


@pytest.fixture
def bits(request, isa):
    if request.param == 8 and not isa.startswith("coded"):
        pytest.skip("weights are not coded")
    return request.param


@functools.cache
def following(k, n, coded, bits):
    return pack(tensor(n, k, seed=3), bits=bits)


def brought_of(weight, exact):
    """How many of its blocks the last launch prefetched, each once and as far as it is read; -1 if otherwise."""
    begin = weight.data.data_ptr()
    ends = map(ctypes.c_void_p, (begin, begin + weight.nbytes))
    return library().row_linear_prefetched(*ends, weight.bits, not exact)


@pytest.mark.parametrize(
    ("rows", "ar", "shape"),
    [(1, 1, (256, 3200, 7)), (1, 1, (64, 64, 7)), *((n, n, (1024, 192, 5)) for n in (1, 120, 200)),
     (160, 100, (1024, 192, 5)), (200, 100, (1024, 192, 5))],
)  # fmt: skip
@READ
def test_the_next_weights_beginning_is_brought_to_l2(shape, rows, ar, exact, bits, isa):
    """A hint: no bit changes, and other prefetches stay the same. With many rows nothing of the next weight is brought:
    they may all be of one view in the next launch, which then reads in another order.
    """
    if isa.endswith("sm80") and (exact, bits) != (True, 12):
        pytest.skip("sm_80 prefetches nothing, whatever it reads")
    k, n, sms = shape
    plain, x = tensor(n, k, seed=1), tensor(rows, k, seed=2)
    how = dict(sms=sms, exact=exact) | (dict(diff=tensor(n, k, seed=4), num_rows_ar=ar) if ar < rows else {})
    want, before = run(x, plain, **how), library().row_linear_prefetches()
    for next_k, next_n in ((64, 64), (640, 320), (64, 3200), (256, 3200)):
        next_weight = following(next_k, next_n, os.environ["ORTHRUS_CUDA_CODED"], bits)
        assert torch.equal(run(x, plain, next_weight=next_weight, **how), want)
        brought = brought_of(next_weight, exact)
        assert library().row_linear_prefetches() == before + brought
        ctas = 0 if isa.endswith("sm80") or rows > 160 else library().row_linear_grid(k, n, sms)
        assert brought == library().row_linear_next_prefetch(ctas, next_k, next_n, sms, next_weight.bits, not exact)


@pytest.mark.parametrize("steps", [7, 16, 60])
def test_the_next_weight_does_not_wait_where_this_ones_steps_are_few(steps, isa):
    """What they leave of a CTA's 96 KiB goes to the next weight, as memory has nothing else to do until earlier kernels
    have finished.
    """
    weight = pack(tensor(64, 64 * steps, seed=1))
    next_weight = following(640, 320, os.environ["ORTHRUS_CUDA_CODED"], 16)
    run(tensor(1, 64 * steps, seed=2), weight, sms=1, next_weight=next_weight)
    begin = next_weight.data.data_ptr()
    ends = map(ctypes.c_void_p, (begin, begin + next_weight.nbytes))
    early = library().row_linear_early(*ends)
    if isa.endswith("sm80") or steps == 60:
        assert early == 0
    else:
        own = brought_of(weight, True)
        assert early == min(12, (15 if weight.coded else 12) - own) > 0 and (own == 0) == (steps == 7)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(4096, 192, 5), (1024, 3200, 7)])
def test_both_views_weights_are_brought_to_l2(shape, exact, isa):
    """Of the second one all blocks, as the stages hold the first one's."""
    k, n, sms = shape
    views = pack(tensor(n, k, seed=1)), pack(tensor(n, k, seed=3), bits=8)
    run(tensor(2, k, seed=2), views[0], diff=views[1], num_rows_ar=1, sms=sms, exact=exact)
    brought = [brought_of(weight, exact) for weight in views]
    assert sum(brought) == library().row_linear_prefetches()
    assert brought == [0, 0] if isa.endswith("sm80") else 0 < brought[0] < brought[1] == k * n // 64**2


@READ
@pytest.mark.parametrize("shape", [(4096, 192, 5), (1024, 3200, 7)])
def test_a_weight_is_brought_to_l2_ahead_of_its_loads(shape, exact, bits, isa):
    """Each block once, except the first ones of each CTA, which fill its stages at once."""
    k, n, sms = shape
    weight = pack(tensor(n, k, seed=1), bits=bits)
    run(tensor(1, k, seed=2), weight, sms=sms, exact=exact)
    begin, height = weight.data.data_ptr(), 1 if n < 3072 else 2
    first, brought = (
        library().row_linear_prefetched(ctypes.c_void_p(begin), ctypes.c_void_p(begin + size), weight.bits, not exact)
        for size in (1, weight.nbytes)
    )
    assert first == 0 and brought == library().row_linear_prefetches()
    stages, rest = divmod(k * n // 64**2 - brought, sms * height)
    assert brought == 0 if isa.endswith("sm80") else rest == 0 and 3 <= stages <= 16
