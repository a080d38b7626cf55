"""embed, rms_norm and qkv_commit on the CPU against float64."""

import pytest
import torch

from orthrus_rt import native, ops
from tests import sparse
from tests.native_cpu import assert_rounded, poison, randn, threads
from tests.rows import ar, diff, make_rows


def test_embed(isa, element):
    table = randn(50, 33)
    token = torch.tensor([0, 49, 7, 7] * 20, dtype=torch.int32)
    out = poison(80, 33)
    ops.embed(token, table, out)
    assert torch.equal(out, table[token.long()])
    ops.embed(token[:0], table, out[:0])
    ops.embed(torch.tensor([-1, 50, 7], dtype=torch.int32), table, out[:3])  # ids outside the table
    assert not out[:2].any() and torch.equal(out[2], table[7])


def test_embed_64_bit_offsets():
    sparse.check_embed(ops.embed, torch.bfloat16)


@pytest.mark.parametrize("hidden", [1, 16, 33, 576])
def test_rms_norm(isa, element, hidden):
    x = randn(200, hidden)
    x[5] = 0
    x[6] = torch.nan
    weight = torch.rand(hidden) + 0.5
    index = torch.randperm(200, generator=torch.Generator().manual_seed(0)).int()
    out, picked, one = poison(200, hidden), poison(200, hidden), poison(1, hidden)
    ops.rms_norm(x, weight, 1e-5, out)
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    keep = torch.arange(200) != 6
    assert_rounded(out[keep], exact[keep])
    assert bool(out[6].isnan().all())
    for count in (1, 2):
        with threads(count):
            ops.rms_norm(x, weight, 1e-5, picked, index)
            assert torch.equal(picked.nan_to_num(9.0), out[index.long()].nan_to_num(9.0))
    ops.rms_norm(x[17:18], weight, 1e-5, one)
    assert torch.equal(one[0], out[17])


def test_nan_of_any_payload_stays_one(isa, element):
    """Rounding its bits like a number's would make it a number: for an odd width, in whole vectors and after them."""
    weight = torch.full((19,), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    out = torch.zeros(1, 19, dtype=element)
    ops.rms_norm(randn(1, 19), weight, 1e-5, out)
    assert bool(out.isnan().all())


# Slot 0 crosses a page, slot 1 starts one, slot 2 is padding; then two blocks, the second with an invalid last row.
GROUPS = [ar(0, 62, 4), ar(1, 0, 1), ar(2, 0, 1, invalid=1), diff(0, 66, 3), diff(1, 1, 2, invalid=1)]
TABLE = torch.tensor([[3, 5], [7, 0], [0, 0]], dtype=torch.int32)


def commit(qkv, rows, cos_sin, norms, heads_q, heads_kv, head_dim):
    k_pages, v_pages = poison(9, heads_kv, 64, head_dim), poison(9, heads_kv, 64, head_dim)
    sk, sv = poison(rows.num_rows_diff, heads_kv, head_dim), poison(rows.num_rows_diff, heads_kv, head_dim)
    q_out = poison(rows.num_rows, heads_q, head_dim)
    ops.qkv_commit(qkv, rows, cos_sin, norms, 1e-6, k_pages, v_pages, TABLE, sk, sv, q_out)
    return q_out, k_pages, v_pages, sk, sv


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("heads_q", "heads_kv", "head_dim"), [(9, 3, 64), (4, 2, 128), (2, 1, 16), (1, 1, 6)])
def test_qkv_commit(isa, element, qk_norm, heads_q, heads_kv, head_dim):
    rows = make_rows(GROUPS)
    qkv = randn(rows.num_rows, (heads_q + 2 * heads_kv) * head_dim)
    angle = torch.rand(128, head_dim // 2) * 6
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=-1)
    norms = tuple(torch.rand(head_dim) + 0.5 for _ in range(4)) if qk_norm else None
    q_out, k_pages, v_pages, sk, sv = commit(qkv, rows, cos_sin, norms, heads_q, heads_kv, head_dim)

    x = qkv.view(rows.num_rows, -1, head_dim).double()
    qk, v = x[:, : heads_q + heads_kv], qkv.view(rows.num_rows, -1, head_dim)[:, heads_q + heads_kv :]
    if qk_norm:
        qk = qk * torch.rsqrt(qk.pow(2).mean(-1, keepdim=True) + 1e-6)
        for r in range(rows.num_rows):
            q_norm, k_norm = norms[:2] if r < rows.num_rows_ar else norms[2:]
            qk[r, :heads_q] *= q_norm
            qk[r, heads_q:] *= k_norm
    cos, sin = cos_sin[rows.position.clamp(min=0).long(), None].double().chunk(2, dim=-1)
    lo, hi = qk.chunk(2, dim=-1)
    want = torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], dim=-1)
    slack = 1e-6 * float(want.abs().max())  # a difference of products may cancel
    assert_rounded(q_out, want[:, :heads_q], slack)
    assert_rounded(sk, want[rows.num_rows_ar :, heads_q:], slack)
    assert torch.equal(sv, v[rows.num_rows_ar :])
    written = torch.zeros(9, 64, dtype=torch.bool)
    for r in range(rows.num_rows_ar):
        position, seq = int(rows.position[r]), int(rows.seq[r])
        if position >= 0:
            page, slot = int(TABLE[seq, position // 64]), position % 64
            written[page, slot] = True
            assert_rounded(k_pages[page, :, slot], want[r, heads_q:], slack)
            assert torch.equal(v_pages[page, :, slot], v[r])
    for pages in (k_pages, v_pages):
        assert bool(pages.transpose(1, 2)[~written].isnan().all())


@pytest.mark.parametrize(("heads_q", "heads_kv", "head_dim"), [(9, 3, 64), (2, 1, 16), (1, 1, 6)])
def test_qkv_commit_writes_finite_values(isa, element, heads_q, heads_kv, head_dim):
    """Instead the key holds NaN, so that it can be hidden from rows that must not see it."""
    rows = make_rows(GROUPS)
    qkv = randn(rows.num_rows, (heads_q + 2 * heads_kv) * head_dim)
    cos_sin = torch.rand(128, head_dim)
    clean = commit(qkv, rows, cos_sin, None, heads_q, heads_kv, head_dim)
    for i, broken in enumerate((torch.nan, torch.inf, -torch.inf)):
        for row, scratch in ((0, None), (rows.num_rows_ar, 0)):
            dirty = qkv.clone()
            dirty[row, -1 - i] = broken  # a value of the last head
            q_out, *dirty = commit(dirty, rows, cos_sin, None, heads_q, heads_kv, head_dim)
            assert torch.equal(q_out, clean[0])
            keys, values = (dirty[0], dirty[1]) if scratch is None else (dirty[2], dirty[3])
            page, slot = int(TABLE[rows.seq[row], rows.position[row] // 64]), int(rows.position[row] % 64)
            at = (page, -1, slot) if scratch is None else (scratch, -1)
            want_key, want_value = (x[at].clone() for x in (clean[1:3] if scratch is None else clean[3:]))
            want_key[-1 - i], want_value[-1 - i] = torch.nan, 0
            torch.testing.assert_close(keys[at], want_key, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(values[at], want_value)
            for name, (a, b) in enumerate(zip(dirty, clean[1:], strict=True)):
                assert int((a.nan_to_num(9.0) != b.nan_to_num(9.0)).sum()) <= 1, name  # nothing else


def test_qkv_commit_row_invariance(isa, element):
    """128 AR rows at once, on one thread or two, write the same bits as one row at a time."""
    qkv = randn(128, 5 * 64)
    cos_sin = torch.rand(128, 64)
    norms = tuple(torch.rand(64) + 0.5 for _ in range(4))
    rows = make_rows([ar(0, 0, 128)])
    whole = commit(qkv, rows, cos_sin, norms, 3, 1, 64)
    for count in (1, 2):
        with threads(count):
            again = commit(qkv, rows, cos_sin, norms, 3, 1, 64)
        assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(whole, again, strict=True))
    for i in (0, 63, 64, 127):
        one = commit(qkv[i : i + 1], make_rows([ar(0, i, 1)]), cos_sin, norms, 3, 1, 64)
        page = int(TABLE[0, i // 64])
        assert torch.equal(one[0][0], whole[0][i])
        assert torch.equal(one[1][page, :, i % 64], whole[1][page, :, i % 64])


def test_qkv_commit_64_bit_offsets():
    sparse.check_qkv_commit(ops.qkv_commit)


def test_qkv_commit_of_an_odd_head_dim_is_refused():
    rows, tensor = make_rows([ar(0, 0, 1)]), torch.empty(1, 1, 17)
    with pytest.raises(ValueError, match=r"qkv_commit: head_dim must be even \(its halves rotate\), got 17"):
        native.qkv_commit(torch.empty(1, 51), rows, None, None, 1e-5, None, None, None, None, None, tensor)
