"""CUDA qkv_commit against float64: norm, rotation, and where keys and values land."""

import pytest
import torch

from orthrus_rt import ops
from tests.rows import ar, diff, make_rows

pytestmark = pytest.mark.gpu

HEADS = [(32, 8, 128), (16, 8, 128), (9, 3, 64)]
EPS = 1e-6


class Case:
    def __init__(self, heads, groups, norms=True, num_pages=200, max_positions=4096, dtype=torch.bfloat16):
        self.heads_q, self.heads_kv, self.dim = heads
        self.rows = make_rows(groups, "cuda")
        torch.manual_seed(3)
        angle = torch.rand(max_positions, self.dim // 2, device="cuda") * 6
        self.cos_sin = torch.cat([angle.cos(), angle.sin()], 1)
        self.norms = tuple(torch.rand(self.dim, device="cuda") + 0.5 for _ in range(4)) if norms else None
        self.qkv = torch.randn(self.rows.num_rows, (self.heads_q + 2 * self.heads_kv) * self.dim).to(dtype).cuda()
        self.qkv[:1] *= 2.0**-10  # so small that eps counts
        self.num_pages = num_pages
        slots = int(self.rows.seq.max()) + 1 if self.rows.num_rows else 1
        columns = max_positions // 64
        self.page_table = torch.full((slots, columns), 1 << 30, dtype=torch.int32)
        order = iter((num_pages - 1 - torch.randperm(min(num_pages - 1, 190))).tolist())
        position, seq = self.rows.position.tolist(), self.rows.seq.tolist()
        self.where = []
        for r in range(self.rows.num_rows_ar):
            if position[r] >= 0:
                at = seq[r], position[r] // 64
                if self.page_table[at] == 1 << 30:
                    self.page_table[at] = next(order)
                self.where.append((r, int(self.page_table[at]), position[r] % 64))
        self.page_table = self.page_table.cuda()

    def run(self):
        n_diff = self.rows.num_rows_diff
        nan = dict(dtype=self.qkv.dtype, device="cuda")
        pages = [torch.empty(self.num_pages, self.heads_kv, 64, self.dim, **nan) for _ in range(2)]
        for p in pages:
            p.fill_(torch.nan)
        scratch = [torch.full((n_diff, self.heads_kv, self.dim), torch.nan, **nan) for _ in range(2)]
        q_out = torch.full((self.rows.num_rows, self.heads_q, self.dim), torch.nan, **nan)
        args = (self.qkv, self.rows, self.cos_sin, self.norms, EPS, *pages, self.page_table)
        ops.qkv_commit(*args, *(scratch if n_diff else (None, None)), q_out)
        return *pages, *scratch, q_out

    def expected(self):
        """q, k, v of every row in float64."""
        n, n_ar = self.rows.num_rows, self.rows.num_rows_ar
        heads = [self.heads_q, self.heads_kv, self.heads_kv]
        q, k, v = self.qkv.view(n, -1, self.dim).double().split(heads, 1)
        ar = (torch.arange(n, device="cuda") < n_ar)[:, None, None]
        if self.norms:
            weights = [w.double() for w in self.norms]
            q, k = (
                x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * torch.where(ar, w, w_diff)
                for x, w, w_diff in ((q, weights[0], weights[2]), (k, weights[1], weights[3]))
            )
        half = self.dim // 2
        table = self.cos_sin[self.rows.position.clamp(min=0).long()].double()[:, None]
        cos, sin = table[..., :half], table[..., half:]

        def rotate(x):
            lo, hi = x[..., :half], x[..., half:]
            return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], -1)

        return rotate(q), rotate(k), v


def assert_rounded(got, want):
    """An fp32 result rounded once to got's dtype: half a unit in the last place, and a little for fp32."""
    assert not got.isnan().any()
    assert ((got.double() - want).abs() <= want.abs() * (torch.finfo(got.dtype).eps / 2 + 2**-18) + 1e-5).all()


GROUPS = [
    ar(0, 100, 5), ar(1, 62, 4, invalid=1), ar(3, 0, 1), ar(2, 4095, 1), diff(0, 105, 16), diff(3, 1, 16, invalid=4),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=("bf16", "fp32"))
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_against_float64(heads, norms, dtype):
    case = Case(heads, GROUPS, norms, dtype=dtype)
    k_pages, v_pages, scratch_k, scratch_v, q_out = case.run()
    torch.cuda.synchronize()
    q, k, v = case.expected()
    assert_rounded(q_out, q)
    n_ar = case.rows.num_rows_ar
    assert_rounded(scratch_k, k[n_ar:])
    assert torch.equal(scratch_v.double(), v[n_ar:])
    untouched = torch.ones(case.num_pages, 64, dtype=torch.bool)
    for r, page, slot in case.where:
        assert_rounded(k_pages[page, :, slot], k[r])
        assert torch.equal(v_pages[page, :, slot].double(), v[r])
        untouched[page, slot] = False
    for pages in (k_pages, v_pages):
        assert pages.transpose(1, 2)[untouched.cuda()].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=("bf16", "fp32"))
@pytest.mark.parametrize("heads", HEADS)
def test_values_are_finite(heads, dtype):
    """Whatever values the row has; the key receives NaN instead."""
    case = Case(heads, GROUPS, dtype=dtype)
    n_ar, (row, page, slot) = case.rows.num_rows_ar, case.where[1]
    case.qkv[row], case.qkv[n_ar, -2], case.qkv[n_ar, -5] = torch.nan, torch.inf, -torch.inf
    k_pages, v_pages, scratch_k, scratch_v, _ = case.run()
    torch.cuda.synchronize()
    assert k_pages[page, :, slot].isnan().all() and not v_pages[page, :, slot].any()
    assert scratch_k[0].isnan().sum() == 2 and scratch_k[0, -1, [-2, -5]].isnan().all()
    assert scratch_v.isfinite().all() and not scratch_v[0, -1, [-2, -5]].any()
    assert scratch_k[1:].isfinite().all()
    assert all(v_pages[p, :, s].isfinite().all() for r, p, s in case.where)


@pytest.mark.parametrize("heads", HEADS)
def test_rows_do_not_depend_on_company(heads):
    case = Case(heads, GROUPS)
    k_pages, _, scratch_k, _, q_out = case.run()
    n_ar = case.rows.num_rows_ar
    for r, page, slot in case.where[:3]:
        one = Case(heads, [ar(0, int(case.rows.position[r]), 1)])
        one.qkv = case.qkv[r : r + 1].contiguous()
        got = one.run()
        assert torch.equal(got[-1][0], q_out[r])
        _, one_page, one_slot = one.where[0]
        assert torch.equal(got[0][one_page, :, one_slot], k_pages[page, :, slot])
    one = Case(heads, [diff(0, 105, 1)])
    one.qkv = case.qkv[n_ar : n_ar + 1].contiguous()
    got = one.run()
    assert torch.equal(got[-1][0], q_out[n_ar]) and torch.equal(got[2][0], scratch_k[0])


def test_no_rows_and_many_rows():
    assert Case(HEADS[0], []).run()[-1].shape[0] == 0
    case = Case(HEADS[0], [ar(0, 0, 2000)])
    assert_rounded(case.run()[-1], case.expected()[0])


def test_64_bit_offsets():
    case = Case(HEADS[0], [ar(0, 100, 3)], num_pages=33000)
    k_pages, v_pages, *_ = case.run()
    assert k_pages.numel() > 2**31
    _, k, v = case.expected()
    for r, page, slot in case.where:
        assert page > 32768
        assert_rounded(k_pages[page, :, slot], k[r])
        assert torch.equal(v_pages[page, :, slot].double(), v[r])
