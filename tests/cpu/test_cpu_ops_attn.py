"""dual_attn on the CPU: the mask of rows.h and nothing else, in the same bits whatever shares the pass."""

import pytest
import torch

from orthrus_rt import native, ops
from tests.attention_pass import SPOIL, Heads, Pass, check_nan_outlives_the_splits
from tests.native_cpu import make_rows, poison, randn, threads

TABLE = torch.tensor([[3, 5, 8], [7, 6, 4], [1, 2, 9], [0, 0, 0]], dtype=torch.int32)
MAX_SEQ_LEN = 192


def make_cache(rows, heads_kv, head_dim):
    """Keys and values up to the longest prefix of each slot; everything else is NaN."""
    k_pages, v_pages = randn(10, heads_kv, 64, head_dim, seed=1), randn(10, heads_kv, 64, head_dim, seed=2)
    known = torch.zeros(10, 64, dtype=torch.bool)
    for r in range(rows.num_rows):
        position = torch.arange(int(rows.prefix_len[r]))
        known[TABLE[int(rows.seq[r]), position // 64].long(), position % 64] = True
    k_pages.transpose(1, 2)[~known] = torch.nan
    v_pages.transpose(1, 2)[~known] = torch.nan
    return k_pages, v_pages


def oracle(q, k_pages, v_pages, sk, sv, rows, r):
    """Row ``r`` in float64, over the keys it sees; and the error that rounded weights and output may bring."""
    heads_per_kv = q.shape[1] // k_pages.shape[1]
    position = torch.arange(int(rows.prefix_len[r]))
    page = TABLE[int(rows.seq[r]), position // 64].long()
    k, v = k_pages[page, :, position % 64], v_pages[page, :, position % 64]
    group = int((rows.group_start <= r).sum()) - 1
    if group >= rows.num_groups_ar and rows.position[r] >= 0:
        first, last = rows.group_start[group].item(), rows.group_start[group + 1].item()
        mine = [i - rows.num_rows_ar for i in range(first, last) if rows.position[i] >= 0]
        k, v = torch.cat([k, sk[mine]]), torch.cat([v, sv[mine]])
    k = k.double().repeat_interleave(heads_per_kv, dim=1)
    v = v.double().repeat_interleave(heads_per_kv, dim=1)
    scores = torch.einsum("hd,khd->hk", q[r].double(), k) * q.shape[2] ** -0.5
    weights = scores.softmax(-1)
    want = torch.einsum("hk,khd->hd", weights, v)
    # Each weight is off by up to its rounding, and so may be their sum; then one rounding of the output.
    eps = torch.finfo(q.dtype).eps / 2
    return want, torch.einsum("hk,khd->hd", weights, v.abs()) * eps + want.abs() * eps + 2e-6


def attend(q, k_pages, v_pages, sk, sv, rows):
    out = poison(*q.shape)
    ops.dual_attn(
        q, k_pages, v_pages, TABLE, sk, sv, rows, q.shape[2] ** -0.5, out, max_seq_len=MAX_SEQ_LEN
    )  # fmt: skip
    return out


def causal(seq, first, count):
    return seq, [(p, p + 1) for p in range(first, first + count)]


def block(seq, first, count, invalid=0):
    return seq, [(p, first) for p in range(first, first + count)] + [(-1, 0)] * invalid


AR = [causal(0, 60, 9), causal(1, 0, 1), causal(2, 128, 64), (3, [(-1, 0)]), causal(1, 191, 1), causal(0, 63, 1)]
DIFFUSION = [block(0, 69, 16), block(1, 0, 3, invalid=2), block(2, 127, 65), (3, [(-1, 0)] * 4), block(1, 64, 1)]
HEADS = [(9, 3, 64), (4, 2, 128), (8, 1, 48), (3, 3, 16), (30, 1, 32), (6, 2, 80), (2, 1, 96), (3, 1, 256)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_mask_and_nothing_else(isa, element, heads):
    heads_q, heads_kv, head_dim = heads
    rows = make_rows(AR + DIFFUSION, len(AR))
    q = randn(rows.num_rows, heads_q, head_dim, seed=3)
    sk, sv = randn(2, rows.num_rows_diff, heads_kv, head_dim, seed=4).unbind()
    invalid = rows.position[rows.num_rows_ar :] < 0
    sk[invalid], sv[invalid] = torch.nan, torch.nan
    k_pages, v_pages = make_cache(rows, heads_kv, head_dim)
    out = attend(q, k_pages, v_pages, sk, sv, rows)
    for r in range(rows.num_rows):
        want, bound = oracle(q, k_pages, v_pages, sk, sv, rows, r)
        if rows.position[r] < 0:
            assert bool((out[r] == 0).all())
        assert bool(((out[r].double() - want).abs() <= bound).all())


def groups_of(rows):
    """Every group of ``rows`` as a pass of its own: ``(its rows, first, last)``."""
    for g in range(rows.num_groups):
        first, last = rows.group_start[g].item(), rows.group_start[g + 1].item()
        spec = [(rows.position[r].item(), rows.prefix_len[r].item()) for r in range(first, last)]
        yield make_rows([(rows.seq[first].item(), spec)], int(g < rows.num_groups_ar)), first, last


@pytest.mark.parametrize("heads", HEADS[:3], ids=str)
def test_row_invariance(isa, element, heads):
    """The same bits alone, batched, in another order of groups, and on 1, 2 or 3 threads."""
    heads_q, heads_kv, head_dim = heads
    rows = make_rows(AR + DIFFUSION, len(AR))
    q = randn(rows.num_rows, heads_q, head_dim, seed=5)
    sk, sv = randn(2, rows.num_rows_diff, heads_kv, head_dim, seed=6).unbind()
    k_pages, v_pages = make_cache(rows, heads_kv, head_dim)
    whole = attend(q, k_pages, v_pages, sk, sv, rows)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(attend(q, k_pages, v_pages, sk, sv, rows), whole)
    n = rows.num_rows_ar
    for alone, first, last in groups_of(rows):
        mine = slice(max(first - n, 0), max(last - n, 0))
        got = attend(q[first:last], k_pages, v_pages, sk[mine], sv[mine], alone)
        assert torch.equal(got, whole[first:last])


def test_chunks_of_a_prompt_change_no_bit(isa, element):
    """128 causal rows in one chunk, in chunks of 16 and 50, and one by one."""
    q = randn(128, 6, 64, seed=7)
    whole_rows = make_rows([causal(0, 0, 128)], 1)
    k_pages, v_pages = make_cache(whole_rows, 2, 64)
    whole = attend(q, k_pages, v_pages, None, None, whole_rows)
    for chunk in (1, 16, 50):
        for first in range(0, 128, chunk):
            count = min(chunk, 128 - first)
            part = q[first : first + count]
            got = attend(part, k_pages, v_pages, None, None, make_rows([causal(0, first, count)], 1))
            assert torch.equal(got, whole[first : first + count])


@pytest.mark.parametrize("wild", [(torch.nan, torch.nan), (0.0, torch.nan), (0.0, torch.inf)], ids=str)
def test_nan_of_one_row_stays_with_those_who_see_it(isa, element, wild):
    """A wild key or value at position 70 reaches rows 70 and later, not the earlier rows of the same tile."""
    q = randn(80, 6, 64, seed=8)
    rows = make_rows([causal(0, 0, 80)], 1)
    k_pages, v_pages = make_cache(rows, 2, 64)
    clean = attend(q, k_pages, v_pages, None, None, rows)
    page, slot = int(TABLE[0, 1]), 70 - 64
    k_pages[page, :, slot], v_pages[page, :, slot] = wild
    dirty = attend(q, k_pages, v_pages, None, None, rows)
    assert torch.equal(dirty[:70], clean[:70])
    assert not bool(dirty[70:].isfinite().any())
    for first in (64, 71):  # some of them alone: their sums are made of other tiles
        alone = attend(q[first : first + 9], k_pages, v_pages, None, None, make_rows([causal(0, first, 9)], 1))
        assert torch.equal(alone.nan_to_num(7.0), dirty[first : first + 9].nan_to_num(7.0))


@pytest.mark.parametrize("spoil", SPOIL)
def test_nan_outlives_what_else_a_row_sees(isa, element, spoil):
    check_nan_outlives_the_splits(lambda groups: Pass(Heads(6, 2, 64), groups, device="cpu", dtype=element), spoil)


def test_large_scores(isa, element):
    """Scores in the thousands: the softmax picks the largest and overflows nowhere."""
    rows = make_rows([causal(0, 100, 1)], 1)
    k_pages, v_pages = make_cache(rows, 1, 64)
    q = randn(1, 1, 64, seed=9, scale=1000.0)
    out = attend(q, k_pages, v_pages, None, None, rows)
    want, bound = oracle(q, k_pages, v_pages, None, None, rows, 0)
    assert bool(((out[0].double() - want).abs() <= bound + 1e-3).all())


def test_no_rows_and_wrong_head_dim():
    rows = make_rows([], 0)
    k_pages, v_pages = randn(10, 1, 64, 64), randn(10, 1, 64, 64)
    attend(randn(0, 1, 64), k_pages, v_pages, None, None, rows)
    rows = make_rows([causal(0, 0, 1)], 1)
    args = (randn(1, 1, 24), randn(10, 1, 64, 24), randn(10, 1, 64, 24), TABLE, None, None, rows, 1.0, poison(1, 1, 24))
    with pytest.raises(ValueError, match="dual_attn: head_dim must be a multiple of 16 up to 256 on the CPU, got 24"):
        native.dual_attn(*args, max_seq_len=MAX_SEQ_LEN)
