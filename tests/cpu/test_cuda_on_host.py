"""The indexing of CUDA's qkv_commit, run as host C++ in both thread orders."""

import copy
import ctypes

import pytest
import torch

from orthrus_rt import native, reference
from orthrus_rt import state as st
from tests import consensus_states, sparse
from tests.attention_pass import Heads, Pass
from tests.cpu import cuda_host
from tests.cpu.cuda_host.device import as_ctypes
from tests.rows import ar, diff, make_rows

pytestmark = pytest.mark.usefixtures("both_orders")


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("heads", [(3, 1, 64), (4, 2, 128), (27, 2, 64), (7, 1, 128)])  # the last two take two CTAs
def test_qkv_commit(heads, norms):
    check_qkv_commit(heads, norms, torch.bfloat16)


def check_qkv_commit(heads, norms, dtype):
    heads_q, heads_kv, dim = heads
    torch.manual_seed(1)
    rows = make_rows([ar(1, 63, 3, invalid=1), ar(0, 5, 1), diff(2, 130, 4, invalid=1)])
    num_pages, scratch_shape = 6, (4, heads_kv, dim)
    page_table = torch.tensor([[3, -9, 1 << 29], [2, 4, -9], [-9, -9, 5]], dtype=torch.int32)
    qkv = torch.randn(8, (heads_q + 2 * heads_kv) * dim).to(dtype)
    qkv[1], qkv[6, -3], qkv[4, -dim] = torch.nan, torch.inf, -torch.inf  # a whole row; single values
    qkv[0] *= 2.0**-10  # so small that eps counts
    angle = torch.rand(200, dim // 2) * 6
    cos_sin = torch.cat([angle.cos(), angle.sin()], 1)
    weights = tuple(torch.rand(dim) + 0.5 for _ in range(4)) if norms else None

    def outputs():
        pages = [torch.full((num_pages, heads_kv, 64, dim), torch.nan, dtype=dtype) for _ in range(2)]
        rest = [torch.full(s, torch.nan, dtype=dtype) for s in (scratch_shape, scratch_shape, (8, heads_q, dim))]
        return pages + rest

    got, want = outputs(), outputs()
    native.qkv_commit(qkv, rows, cos_sin, weights, 1e-6, *got[:2], page_table, *got[2:])
    assert all(bool(pages[0].isnan().all()) for pages in got[:2])
    page_table.clamp_(0, num_pages - 1)  # the oracle gathers before it discards
    reference.qkv_commit(qkv, rows, cos_sin, weights, 1e-6, *want[:2], page_table, *want[2:])
    for pages in want[:2]:
        pages[0] = torch.nan  # where the oracle puts entries that have no place
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps + 1e-6, atol=1e-6, equal_nan=True)
    k_pages, v_pages, scratch_k, scratch_v, _ = got
    page = v_pages[4, :, 0]  # of row 1, the first one past the end of a page
    assert not page.any() and bool(k_pages[4, :, 0].isnan().all()) and bool(scratch_v[:3].isfinite().all())
    assert bool(scratch_k[2, -1, -3].isnan()) and int(scratch_k[2].isnan().sum()) == 1


def test_qkv_commit_64_bit_offsets():
    sparse.check_qkv_commit(native.qkv_commit)


INVALID, MISALIGNED = 1, 716  # cudaErrorInvalidValue, cudaErrorMisalignedAddress


def shifted(tensor, by=1):
    """The same values, starting ``by`` elements after a multiple of 16 bytes."""
    buffer = torch.empty(tensor.numel() + 16 + by, dtype=tensor.dtype)
    first = -buffer.data_ptr() // tensor.element_size() % 16 + by
    return buffer[first:][: tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_what_is_not_aligned_is_refused(dtype):
    """On a device such an access would make the context unusable."""
    case = Pass(Heads(3, 1, 64), [ar(0, 70, 2), diff(0, 72, 3)], "cpu", dtype=dtype)
    out, qkv = torch.empty_like(case.q), torch.zeros(5, 5 * 64, dtype=dtype)
    case.call(out, None)
    for name in ("k_pages", "scratch_k") + (("q", "v_pages", "scratch_v") if dtype is torch.bfloat16 else ()):
        moved = copy.copy(case)
        setattr(moved, name, shifted(getattr(case, name)))
        with pytest.raises(AssertionError, match=f"dual_attn.* returned {MISALIGNED}"):
            moved.call(out, None)
    if dtype is torch.bfloat16:
        with pytest.raises(AssertionError, match=f"dual_attn returned {MISALIGNED}"):
            case.call(shifted(out), None)
    args = [qkv, case.k_pages, case.v_pages, case.scratch_k, case.scratch_v, out]
    cos_sin, norm = torch.zeros(80, 64), torch.ones(64)

    def commit(qkv, k_pages, v_pages, *rest, cos_sin=cos_sin, norms=None):
        native.qkv_commit(qkv, case.rows, cos_sin, norms, 1e-6, k_pages, v_pages, case.page_table, *rest)

    commit(*args)
    for i, tensor in enumerate(args):
        with pytest.raises(AssertionError, match=f"qkv_commit.* returned {MISALIGNED}"):
            commit(*args[:i], shifted(tensor), *args[i + 1 :])
    fp32 = [dict(cos_sin=shifted(cos_sin))]
    fp32 += [dict(norms=tuple(shifted(norm) if i == k else norm for i in range(4))) for k in range(4)]
    for moved in fp32:
        with pytest.raises(AssertionError, match=f"qkv_commit.* returned {MISALIGNED}"):
            commit(*args, **moved)


def test_what_the_kernel_does_not_take_is_refused(monkeypatch):
    """Each is reported as an error before any launch: other head_dims, more heads than a grid has blocks for, a norm of
    the queries without one of the keys, or the other way round.
    """
    case, errors = Pass(Heads(3, 1, 64), [ar(0, 70, 2)], "cpu"), []

    def launch(op, params, device):
        params = as_ctypes(params)
        good = params.kv.head_dim, params.num_heads_q
        for params.kv.head_dim, params.num_heads_q in ((96, good[1]), (64, 2**30 - 65), (64, 2**31 - 3)):
            errors.append(cuda_host.library().qkv_commit(ctypes.byref(params)))
        params.kv.head_dim, params.num_heads_q = good
        for name in ("q_norm", "k_norm", "q_norm_diff", "k_norm_diff"):
            setattr(params, name, cos_sin.data_ptr())
            errors.append(cuda_host.library().qkv_commit(ctypes.byref(params)))
            setattr(params, name, None)

    monkeypatch.setattr(native, "_launch", launch)
    qkv, cos_sin, out = torch.zeros(2, 5 * 64, dtype=torch.bfloat16), torch.zeros(80, 64), torch.empty_like(case.q)
    pages = case.k_pages, case.v_pages, case.page_table
    native.qkv_commit(qkv, case.rows, cos_sin, None, 1e-6, *pages, case.scratch_k, case.scratch_v, out)
    assert errors == [INVALID] * 7


@pytest.mark.parametrize("name", ("dual_attn", "dual_attn_f32"))
def test_what_attention_does_not_take_is_refused(name, monkeypatch):
    dtype, changes = torch.float32, [("kv", "head_dim", 96)]
    if name == "dual_attn":
        dtype = torch.bfloat16
        changes += [("kv", "num_heads_kv", 0), ("kv", "num_heads_kv", 4), ("rows", "max_group_rows", 0)]
        changes += [("rows", "blocks_per_seq", 0), ("rows", "blocks_per_seq", 2)]  # of one block
    case, errors = Pass(Heads(3, 1, 64), [ar(0, 70, 2), diff(0, 72, 3)], "cpu", dtype=dtype), []

    def launch(op, params, device):
        for part, field, value in changes:
            changed = as_ctypes(params)
            setattr(getattr(changed, part), field, value)
            errors.append(cuda_host.library()[name](ctypes.byref(changed)))

    monkeypatch.setattr(native, "_launch", launch)
    case.call(torch.empty_like(case.q), None)
    assert errors == [INVALID] * len(changes)


@pytest.mark.parametrize(
    ("name", "value", "error"), [("block_len", 257, INVALID), ("fan_out", 767, INVALID), ("fan_out", 766, 0)]
)
def test_blocks_that_a_consensus_has_no_room_for_are_refused_and_no_others(name, value, error, monkeypatch):
    errors = []

    def launch(op, params, device):
        params = as_ctypes(params)
        setattr(params, name, value)
        errors.append(cuda_host.library().consensus(ctypes.byref(params)))

    monkeypatch.setattr(native, "_launch", launch)
    state = consensus_states.random_state(torch.Generator().manual_seed(0), 2, 4)
    native.consensus(state, (None, None), st.STEP_STAGE, st.NEXT_NONE, None, 0, 4, 0)
    assert errors == [error]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_without_rows_nothing_is_launched(dtype, monkeypatch):
    """A grid without blocks would be an error."""
    case, errors = Pass(Heads(3, 1, 64), [ar(0, 70, 2)], "cpu", dtype=dtype), []

    def launch(op, params, device):
        params = as_ctypes(params)
        params.rows.num_rows = params.rows.num_rows_ar = 0
        name = op if dtype is torch.bfloat16 else op + "_f32"
        errors.append(cuda_host.library()[name](ctypes.byref(params)))

    monkeypatch.setattr(native, "_launch", launch)
    out, qkv, pages = torch.empty_like(case.q), torch.zeros(2, 5 * 64, dtype=dtype), (case.k_pages, case.v_pages)
    case.call(out, None)
    native.qkv_commit(qkv, case.rows, torch.zeros(80, 64), None, 1e-6, *pages, case.page_table, None, None, out)
    assert errors == [0, 0]
