"""The oracle against naive float64 loops written from the definitions."""

import math

import pytest
import torch

from orthrus_rt import reference
from tests.rows import ar, diff, make_rows

D, HQ, HKV, PAGE = 8, 4, 2, 64


# Slot 0: an AR block of 3 rows at 70 and a diffusion block of 4 rows, its last row invalid; slot 1: one AR row at 0, a
# diffusion block with no prefix; slot 2: padding only.
MIXED = [ar(0, 70, 3), ar(1, 0, 1), ar(2, 0, 1, invalid=1), diff(0, 70, 4, invalid=1), diff(1, 0, 2)]


@pytest.fixture
def paged():
    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(2, 8, HKV, PAGE, D, generator=generator)
    table = torch.tensor([[3, 5], [7, 0], [0, 0]], dtype=torch.int32)
    return pages[0], pages[1], table


def test_dual_attn_is_the_mask_and_nothing_else(paged):
    k_pages, v_pages, table = paged
    k_pages[5, :, 9:] = torch.nan  # slot 0 beyond position 72
    v_pages[5, :, 9:] = torch.nan
    k_pages[0] = v_pages[0] = torch.nan  # the sink
    rows = make_rows(MIXED)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(rows.num_rows, HQ, D, generator=generator)
    sk, sv = torch.randn(2, rows.num_rows_diff, HKV, D, generator=generator)
    out = torch.full_like(q, torch.nan)
    reference.dual_attn(q, k_pages, v_pages, table, sk, sv, rows, D**-0.5, out)
    starts = rows.group_start.tolist()
    for r in range(rows.num_rows):
        group = next(g for g in range(rows.num_groups) if starts[g] <= r < starts[g + 1])
        seq, prefix = int(rows.seq[r]), int(rows.prefix_len[r])
        for h in range(HQ):
            keys = [
                (k_pages[table[seq, t // PAGE], h // 2, t % PAGE], v_pages[table[seq, t // PAGE], h // 2, t % PAGE])
                for t in range(prefix)
            ]
            if group >= rows.num_groups_ar and rows.position[r] >= 0:
                block = [i for i in range(starts[group], starts[group + 1]) if rows.position[i] >= 0]
                keys += [(sk[i - rows.num_rows_ar, h // 2], sv[i - rows.num_rows_ar, h // 2]) for i in block]
            scores = [float(q[r, h].double() @ k.double()) * D**-0.5 for k, _ in keys]
            total = sum(math.exp(s - max(scores)) for s in scores) if scores else 1.0
            want = torch.zeros(D, dtype=torch.float64)
            for s, (_, v) in zip(scores, keys, strict=True):
                want += math.exp(s - max(scores)) / total * v.double()
            torch.testing.assert_close(out[r, h].double(), want, rtol=1e-5, atol=1e-6)


def test_qkv_commit_writes_only_what_it_may(paged):
    k_pages, v_pages, table = paged
    rows = make_rows(MIXED)
    before = k_pages.clone()
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(rows.num_rows, (HQ + 2 * HKV) * D, generator=generator)
    angle = torch.arange(128)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=1)
    norms = tuple(torch.rand(D, generator=generator) + 0.5 for _ in range(4))
    q_out = torch.full((rows.num_rows, HQ, D), torch.nan)
    sk, sv = torch.full((2, rows.num_rows_diff, HKV, D), torch.nan)
    reference.qkv_commit(qkv, rows, cos_sin, norms, 1e-6, k_pages, v_pages, table, sk, sv, q_out)

    def rotated(vector, norm, position):
        x = vector.double()
        x = x * norm.double() / math.sqrt(float(x.pow(2).mean()) + 1e-6)
        out = x.clone()
        for i in range(D // 2):
            c, s = math.cos(angle[position, i]), math.sin(angle[position, i])
            out[i], out[i + D // 2] = x[i] * c - x[i + D // 2] * s, x[i + D // 2] * c + x[i] * s
        return out

    touched = torch.zeros(before.shape[:3], dtype=torch.bool)
    touched[0] = True
    heads = qkv.view(rows.num_rows, -1, D)
    for r in range(rows.num_rows):
        ar, position = r < rows.num_rows_ar, int(rows.position[r])
        if position < 0:
            continue
        for h in range(HQ):
            want = rotated(heads[r, h], norms[0 if ar else 2], position)
            torch.testing.assert_close(q_out[r, h].double(), want, rtol=1e-4, atol=1e-5)
        for h in range(HKV):
            want = rotated(heads[r, HQ + h], norms[1 if ar else 3], position)
            if ar:
                page = int(table[rows.seq[r], position // PAGE])
                touched[page, h, position % PAGE] = True
                got_k, got_v = k_pages[page, h, position % PAGE], v_pages[page, h, position % PAGE]
            else:
                got_k, got_v = sk[r - rows.num_rows_ar, h], sv[r - rows.num_rows_ar, h]
            torch.testing.assert_close(got_k.double(), want, rtol=1e-4, atol=1e-5)
            assert torch.equal(got_v, heads[r, HQ + HKV + h])
    assert torch.equal(k_pages[~touched], before[~touched])


@pytest.mark.parametrize("epilogue", ("none", "residual", "silu_mul", "logits"))
def test_row_linear_epilogues(epilogue):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 12, generator=generator)
    w, w_diff, residual = (torch.randn(*s, generator=generator) for s in ((6, 12), (6, 12), (5, 6)))
    out = torch.full((5, 3 if epilogue == "silu_mul" else 6), torch.nan)
    kwargs = dict(residual=residual) if epilogue == "residual" else {}
    reference.row_linear(x, w, out, weight_diff=w_diff, num_rows_ar=2, epilogue=epilogue, **kwargs)
    for r in range(5):
        y = x[r].double() @ (w if r < 2 else w_diff).double().T
        if epilogue == "residual":
            y = y + residual[r]
        if epilogue == "silu_mul":
            y = torch.tensor([float(g) / (1 + math.exp(-float(g))) for g in y[:3]]) * y[3:]
        torch.testing.assert_close(out[r].double(), y.double(), rtol=1e-5, atol=1e-5)


def test_partial_argmax_ties_to_the_lowest_id():
    x = torch.eye(2)
    w = torch.tensor([[1.0, 5.0, 2.0, 5.0, 5.0], [0.0] * 5]).T
    value, index = torch.empty(2, 2), torch.empty(2, 2, dtype=torch.int32)
    reference.row_linear(x, w, (value, index), epilogue="argmax")
    assert index.tolist() == [[1, 3], [0, 3]] and value.tolist() == [[5.0, 5.0], [0.0, 0.0]]


def test_rms_norm_gathers():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    w = torch.rand(6)
    out = torch.full((2, 6), torch.nan)
    reference.rms_norm(x, w, 1e-5, out, torch.tensor([3, 1], dtype=torch.int32))
    for i, r in enumerate((3, 1)):
        want = x[r].double() / math.sqrt(float(x[r].double().pow(2).mean()) + 1e-5) * w
        torch.testing.assert_close(out[i].double(), want, rtol=1e-5, atol=1e-6)
