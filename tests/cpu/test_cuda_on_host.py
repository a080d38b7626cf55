"""The indexing of the plain CUDA kernels (qkv_commit, consensus), run as host C++ in both thread orders."""

import pytest
import torch

from orthrus_rt import reference
from orthrus_rt.plan import Rows
from tests import consensus_states as cs
from tests.cpu import cuda_host

pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="no C++ compiler")


def host_consensus(state, partials, step, next_pass, rows, mask_token_id, block_len, fan_out=0, *, descending):
    value, ids = partials
    slots = cuda_host.fill(
        "SlotState",
        **vars(state),
        num_slots=state.num_slots,
        max_block_len=state.max_block_len,
        max_fan_out=state.max_fan_out,
        max_stop_ids=state.stop_ids.shape[1],
        output_capacity=state.output.shape[1],
    )
    staged = {f"next_{n}": getattr(rows, n) for n in ("token", "position", "seq", "prefix_len")} if rows else {}
    params = cuda_host.fill(
        "ConsensusParams",
        partial_value=value,
        partial_id=ids,
        state=slots,
        rows_per_slot=ids.shape[0] // state.num_slots,
        block_len=block_len,
        fan_out=fan_out,
        num_partials=ids.shape[1],
        mask_token_id=mask_token_id,
        step=step,
        next_pass=next_pass,
        **staged,
    )
    cuda_host.call("consensus", params, descending=descending)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("block_len", [1, 2, 5, 32])
@pytest.mark.parametrize("num_partials", [1, 37])
def test_consensus(block_len, num_partials, descending):
    slots = 6
    for seed, (step, rows_per_slot, next_pass) in enumerate(cs.steps(block_len) * 2):
        generator = torch.Generator().manual_seed(seed)
        state = cs.random_state(generator, slots, block_len)
        if rows_per_slot == 1 and block_len > 1:
            state.num_drafts.zero_()
        value, ids = cs.random_partials(generator, slots * rows_per_slot, num_partials)
        partials = (None if num_partials == 1 else value, ids)
        rows = cs.staged_rows(slots, block_len, next_pass)
        want_state, want_rows = cs.clone(state), cs.clone(rows)
        host_consensus(state, partials, step, next_pass, rows, cs.MASK, block_len, descending=descending)
        reference.consensus(want_state, partials, step, next_pass, want_rows, cs.MASK, block_len)
        cs.assert_same(state, want_state)
        cs.assert_same(rows, want_rows)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("block_len", [2, 5, 40])
@pytest.mark.parametrize("fan_out", [1, 4, 11])
def test_one_pass_consensus(block_len, fan_out, descending):
    slots = 6
    for seed, (step, rows_per_slot, next_pass) in enumerate(cs.one_pass_steps(block_len, fan_out) * 4):
        generator = torch.Generator().manual_seed(seed)
        state = cs.random_state(generator, slots, block_len, fan_out=fan_out)
        partials = cs.random_partials(generator, slots * rows_per_slot, (1, 2, 37, 300)[seed % 4], ties=False)
        rows = cs.staged_rows(slots, block_len, next_pass, fan_out)
        want_state, want_rows = cs.clone(state), cs.clone(rows)
        host_consensus(state, partials, step, next_pass, rows, cs.MASK, block_len, fan_out, descending=descending)
        reference.consensus(want_state, partials, step, next_pass, want_rows, cs.MASK, block_len, fan_out)
        cs.assert_same(state, want_state)
        cs.assert_same(rows, want_rows)


def mixed_rows():
    """3 AR rows (one invalid) of slots 1 and 0, then a diffusion block of 4 (one invalid) of slot 2."""
    position = torch.tensor([70, 71, -1, 5, 130, 131, 132, -1], dtype=torch.int32)
    seq = torch.tensor([1, 1, 1, 0, 2, 2, 2, 2], dtype=torch.int32)
    return Rows(
        token=torch.zeros(8, dtype=torch.int32),
        position=position,
        seq=seq,
        prefix_len=torch.zeros(8, dtype=torch.int32),
        group_start=torch.tensor([0, 3, 4, 8], dtype=torch.int32),
        num_rows_ar=4,
        num_groups_ar=2,
        max_group_rows=4,
    )


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("heads", [(3, 1, 64), (4, 2, 128)])
def test_qkv_commit(heads, norms, descending):
    check_qkv_commit(heads, norms, descending, torch.bfloat16)


def check_qkv_commit(heads, norms, descending, dtype):
    heads_q, heads_kv, dim = heads
    torch.manual_seed(1)
    rows = mixed_rows()
    num_pages, scratch_shape = 6, (4, heads_kv, dim)
    page_table = torch.tensor([[3, -9, 1 << 29], [2, 4, -9], [-9, -9, 5]], dtype=torch.int32)
    qkv = torch.randn(8, (heads_q + 2 * heads_kv) * dim).to(dtype)
    qkv[1], qkv[6, -3], qkv[4, -dim] = torch.nan, torch.inf, -torch.inf  # all of a row; values alone
    angle = torch.rand(200, dim // 2) * 6
    cos_sin = torch.cat([angle.cos(), angle.sin()], 1)
    weights = tuple(torch.rand(dim) + 0.5 for _ in range(4))

    def outputs():
        pages = [torch.full((num_pages, heads_kv, 64, dim), torch.nan, dtype=dtype) for _ in range(2)]
        rest = [torch.full(s, torch.nan, dtype=dtype) for s in (scratch_shape, scratch_shape, (8, heads_q, dim))]
        return pages + rest

    k_pages, v_pages, scratch_k, scratch_v, q_out = got = outputs()
    kv = cuda_host.fill(
        "PagedKv", k_pages=k_pages, v_pages=v_pages, page_table=page_table, num_pages=num_pages, max_pages=3,
        page_size=64, num_heads_kv=heads_kv, head_dim=dim,
    )  # fmt: skip
    row_fields = {n: getattr(rows, n) for n in ("token", "position", "seq", "prefix_len", "group_start")}
    params = cuda_host.fill(
        "QkvCommitParams", qkv=qkv, cos_sin=cos_sin, q_out=q_out, scratch_k=scratch_k, scratch_v=scratch_v, kv=kv,
        rows=cuda_host.fill("Rows", **row_fields, num_rows=8, num_rows_ar=4, num_groups=3, num_groups_ar=2),
        num_heads_q=heads_q, max_positions=200, eps=1e-6,
    )  # fmt: skip
    if norms:
        for name, weight in zip(("q_norm", "k_norm", "q_norm_diff", "k_norm_diff"), weights, strict=True):
            setattr(params, name, weight.data_ptr())
    op = "qkv_commit_f32" if dtype is torch.float32 else "qkv_commit"
    cuda_host.call(op, params, descending=descending)

    want = outputs()
    page_table.clamp_(0, num_pages - 1)  # the oracle gathers before it discards
    norm_args = weights if norms else None
    reference.qkv_commit(qkv, rows, cos_sin, norm_args, 1e-6, *want[:2], page_table, *want[2:])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps + 1e-6, atol=1e-6, equal_nan=True)
    page = v_pages[4, :, 71 - 64]  # of row 1
    assert not page.any() and bool(k_pages[4, :, 71 - 64].isnan().all()) and bool(scratch_v[:3].isfinite().all())
    assert bool(scratch_k[2, -1, -3].isnan()) and int(scratch_k[2].isnan().sum()) == 1
