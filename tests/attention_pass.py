"""Attention passes for the tests: rows, a poisoned paged cache and the float64 answer.

Everything that a row depends on is drawn from a seed of its own (sequence, view, position), so the same row in
another pass has the same inputs and must get the same bits.
"""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass

import torch

from orthrus_rt import native, ops
from tests import sparse
from tests.rows import Group, ar, diff, make_rows

WILD_PAGE = 1 << 30


@dataclass(frozen=True)
class Heads:
    q: int
    kv: int
    dim: int


def draw(device, dtype, *shape, key) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


class Pass:
    """One dual_attn call: AR groups first, as rows require."""

    def __init__(
        self, heads: Heads, groups: list[Group], device="cuda", max_seq_len=None, first_page=1, dtype=torch.bfloat16,
        blocks_per_seq=1,
    ):  # fmt: skip
        groups = sorted(groups, key=lambda g: g.view != "ar")
        self.heads, self.groups, self.device, self.dtype = heads, groups, device, dtype
        self.rows = make_rows(groups, device, blocks_per_seq)
        self.q = self._rows("q", heads.q, 0)
        self.scratch_k = self.scratch_v = None
        if self.rows.num_groups > self.rows.num_groups_ar:
            self.scratch_k, self.scratch_v = (self._rows(x, heads.kv, self.rows.num_rows_ar) for x in ("k", "v"))
        self.lengths = {}
        for g in groups:
            self.lengths[g.seq] = max([self.lengths.get(g.seq, 0), *(prefix_len for *_, prefix_len in g.columns())])
        self.max_seq_len = max_seq_len or max([64, *self.lengths.values()])
        self._fill_cache(first_page)

    def _rows(self, what, heads, first):
        rows = []
        for g in self.groups:
            for position, seq, _ in g.columns():
                if position >= 0:
                    key = (what, g.view, seq, position)
                    rows.append(draw(self.device, self.dtype, heads, self.heads.dim, key=key))
                else:
                    rows.append(self._nan_row(heads))
        return torch.stack(rows)[first:].contiguous() if rows else self._nan_row(heads)[None][:0]

    def _nan_row(self, heads):
        return torch.full((heads, self.heads.dim), torch.nan, dtype=self.dtype, device=self.device)

    def _fill_cache(self, first_page):
        """Random keys and values where any row looks, NaN elsewhere; pages in random order."""
        heads, device = self.heads, self.device
        columns = -(-self.max_seq_len // ops.PAGE_SIZE)
        counts = {s: -(-n // ops.PAGE_SIZE) for s, n in self.lengths.items()}
        total = sum(counts.values())
        order = torch.randperm(total, generator=torch.Generator().manual_seed(1)) + first_page
        shape = (first_page + total, heads.kv, ops.PAGE_SIZE, heads.dim)
        if first_page > 1 and str(device) == "cpu":
            self.k_pages, self.v_pages = sparse.empty(shape, self.dtype), sparse.empty(shape, self.dtype)
        else:
            self.k_pages = torch.empty(shape, dtype=self.dtype, device=device)
            self.v_pages = torch.empty_like(self.k_pages)
        for pages in (self.k_pages, self.v_pages):
            pages[0] = torch.nan
            pages[first_page:] = torch.nan
        self.page_table = torch.full((max(counts, default=0) + 1, columns), WILD_PAGE, dtype=torch.int32)
        used = 0
        for s, n in self.lengths.items():
            pages = order[used : used + counts[s]]
            used += counts[s]
            self.page_table[s, : counts[s]] = pages.int()
            for name, store in (("K", self.k_pages), ("V", self.v_pages)):
                # Drawn per page, so that a longer run of the same sequence starts with the same bits.
                for i, page in enumerate(pages.tolist()):
                    m = min(ops.PAGE_SIZE, n - i * ops.PAGE_SIZE)
                    drawn = draw(device, self.dtype, heads.kv, ops.PAGE_SIZE, heads.dim, key=(name, s, i))
                    store[page, :, :m] = drawn[:, :m]
        self.page_table = self.page_table.to(device)

    @property
    def softmax_scale(self):
        return self.heads.dim**-0.5

    def workspace(self):
        size = native.dual_attn_workspace_bytes(
            self.q.device, self.q.dtype, self.rows.num_rows, self.heads.q, self.heads.dim, self.max_seq_len
        )
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def call(self, out, workspace):
        ops.dual_attn(
            self.q, self.k_pages, self.v_pages, self.page_table, self.scratch_k, self.scratch_v, self.rows,
            self.softmax_scale, out, max_seq_len=self.max_seq_len, workspace=workspace,
        )  # fmt: skip

    def run(self, split=True) -> torch.Tensor:
        """Output rows; ``split=False`` withholds the workspace, so that CTAs fold all splits themselves."""
        out = torch.full_like(self.q, torch.nan)
        self.call(out, self.workspace() if split else None)
        return out

    def by_group(self, out) -> dict[Group, torch.Tensor]:
        starts = self.rows.group_start.tolist()
        return {g: out[a:b] for g, a, b in zip(self.groups, starts, starts[1:], strict=False)}

    def expected(self) -> torch.Tensor:
        """Softmax attention in float64, group by group, over the keys that each row may see."""
        out = torch.zeros(self.q.shape, dtype=torch.float64, device=self.device)
        starts, position, prefix = (getattr(self.rows, n).tolist() for n in ("group_start", "position", "prefix_len"))
        repeat = self.heads.q // self.heads.kv
        for g, a, b in zip(self.groups, starts, starts[1:], strict=False):
            longest = max(prefix[a:b], default=0)
            pages = self.page_table[g.seq, : -(-longest // ops.PAGE_SIZE)].long()
            keys, values = (
                p[pages].transpose(1, 2).flatten(0, 1)[:longest].double() for p in (self.k_pages, self.v_pages)
            )
            valid = self.rows.position[a:b] >= 0
            seen = torch.arange(longest, device=self.device)[None] < self.rows.prefix_len[a:b, None]
            if g.view == "diff":
                own = slice(a - self.rows.num_rows_ar, b - self.rows.num_rows_ar)
                keys = torch.cat([keys, self.scratch_k[own].double()])
                values = torch.cat([values, self.scratch_v[own].double()])
                seen = torch.cat([seen, valid[None] & valid[:, None]], 1)
            rows = [i for i in range(b - a) if position[a + i] >= 0 and bool(seen[i].any())]
            for at in range(0, len(rows), 128):
                some = torch.tensor(rows[at : at + 128], device=self.device)
                any_row = seen[some].any(0)
                k, v = (x[any_row].repeat_interleave(repeat, 1) for x in (keys, values))
                scores = torch.einsum("rhd,khd->rhk", self.q[a + some].double(), k) * self.softmax_scale
                weights = scores.masked_fill(~seen[some][:, any_row][:, None], -torch.inf).softmax(-1)
                out[a + some] = torch.einsum("rhk,khd->rhd", weights, v)
        return out

    def bound(self) -> torch.Tensor:
        """How far rounding may take each element of the output from the expected one: each weight, and so their sum, by
        up to its own rounding error, then the output by its own.
        """
        magnitudes = copy.copy(self)
        magnitudes.v_pages = self.v_pages.abs()
        magnitudes.scratch_v = self.scratch_v if self.scratch_v is None else self.scratch_v.abs()
        return (magnitudes.expected() + self.expected().abs()) * (torch.finfo(self.dtype).eps / 2) + 2e-6


def assert_close(got, want):
    """Probabilities and output are rounded to bf16, which adds at most 2^-9 / sqrt(3) of noise each."""
    assert not got.isnan().any()
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-9)
    assert error < 3e-3, float(error)
    assert (got.double() - want).abs().max() < 2**-6 * want.abs().max().clamp(min=1)


def set_entries(case, pages, positions, entry):
    """Set entries of sequence 0."""
    for at in positions:
        pages[int(case.page_table[0, at // ops.PAGE_SIZE]), :, at % ops.PAGE_SIZE] = entry


def set_keys(case, positions, key):
    set_entries(case, case.k_pages, positions, key)


def set_values(case, positions, value):
    set_entries(case, case.v_pages, positions, value)


def spoil_keys(case, positions):
    """As qkv_commit writes rows that turned NaN: the key is NaN, the value 0."""
    set_keys(case, positions, torch.nan)
    set_values(case, positions, 0)


def spoil_the_block(case, split):
    case.scratch_k.fill_(torch.nan)
    case.scratch_v.zero_()


def spoil_a_key_beside_a_loud_one(case, split):
    """For all other scores e^(score - maximum) is 0, whatever the head."""
    case.q[case.rows.position >= 0] = 8
    set_keys(case, [0], 8)
    spoil_keys(case, [split + 12])


def spoil_queries(case, split):
    """Queries of rows that see only the first split, in a pass with rows that see the second."""
    case.q[1:3] = torch.nan


# What turns NaN in check_nan_outlives_the_splits.
SPOIL = {
    "all of the first split": lambda case, split: spoil_keys(case, range(split)),
    "all of a later split": lambda case, split: spoil_keys(case, range(split, 2 * split)),
    "all of the block": spoil_the_block,
    "a key far below the maximum": spoil_a_key_beside_a_loud_one,
    "queries": spoil_queries,
}


def check_nan_outlives_the_splits(make, spoil, split=128):
    """Rows that see NaN yield NaN, with splits (of ``split`` keys) folded at once or not; others are unaffected."""
    across, long = ar(0, split - 3, 8), ar(0, 2 * split + 44, 2)
    case = make([across, long, diff(0, 2 * split + 14, 4), ar(1, split + 72, 2)])
    SPOIL[spoil](case, split)
    want = case.expected()
    apart, fold = case.run(), case.run(split=False)
    assert torch.equal(apart.isnan(), want.isnan())
    assert torch.equal(fold.isnan(), want.isnan())
    assert torch.equal(apart.nan_to_num(), fold.nan_to_num())
    assert_close(apart.nan_to_num(), want.nan_to_num())


def check_scores_of_minus_infinity_have_no_weight(make, split=128):
    """Scores that overflow: of a split of ``split`` keys, of the first of another, and of the last keys. Rows that see
    nothing else yield zeros.
    """
    case = make([ar(0, 2 * split + 44, 2), diff(0, split + 14, 4)])
    case.q.fill_(1)
    set_keys(case, [*range(split + 10), *range(2 * split, 2 * split + 44)], -1e38)
    for at_once in (True, False):
        assert_close(case.run(split=not at_once), case.expected())
    set_keys(case, range(2 * split + 46), -1e38)
    for at_once in (True, False):
        assert case.run(split=not at_once).flatten(1).any(1).tolist() == 2 * [False] + 4 * [True]


def check_maxima_that_rise_or_fall_from_one_look_to_the_next(make):
    """The warp that folds the splits looks at 24 at a time; random maxima hardly ever change much between two looks."""
    case = make([ar(0, 40959, 1)])  # one head
    for first_page, by in ((96, 0.2), (320, -20)):  # of the 25th split, and of the 49th
        pages = case.page_table[0, first_page:].long()
        case.k_pages[pages] = (case.k_pages[pages] + by * case.q[0]).bfloat16()
    split = case.run()
    assert_close(split, case.expected())
    assert torch.equal(split, case.run(split=False))


def check_a_nan_key_spoils_those_who_see_it_alone(make):
    """``make(groups)`` is a :class:`Pass`."""
    groups = [ar(0, 60, 20), diff(0, 70, 4), diff(0, 71, 4), diff(1, 30, 4)]
    case = make(groups)
    clean = case.by_group(case.run())
    spoil_keys(case, [70])
    case.scratch_k[-2], case.scratch_v[-2] = torch.nan, 0
    dirty = case.by_group(case.run())
    verify, before, behind, own = groups
    assert torch.equal(dirty[verify][:10], clean[verify][:10]) and torch.equal(dirty[before], clean[before])
    assert dirty[verify][10:].isnan().all() and dirty[behind].isnan().all() and dirty[own].isnan().all()


# By dtype: the score of a second key (the first key's is 0), then its weight and the first key's share, both in that
# dtype. In the sum of weights, for the share, weights are not rounded.
SECOND_KEY = {
    torch.bfloat16: (-2.546875 / 4, 0.52734375, 0.65234375),  # with rounded ones 0.65625
    torch.float16: (-2.32421875 / 4, 0.55908203125, 0.64111328125),  # with rounded ones 0.6416015625
}


def check_weights_are_rounded_for_their_products_alone(make):
    """``make(groups)`` is a :class:`Pass` of one head, whose scale is a power of 2."""
    case = make([ar(0, 1, 1)])
    score, weight, share = SECOND_KEY[case.dtype]
    case.q.zero_()[..., 0] = 1
    keys, values = (pages[case.page_table[0, 0].long(), 0, :2] for pages in (case.k_pages, case.v_pages))
    keys.zero_()[1, 0] = score / case.softmax_scale
    values.zero_()
    values[0, 0], values[1, 0], values[0, 1] = -weight, 1, 1
    for split in (True, False):
        assert case.run(split)[0, 0, :2].tolist() == [0, share]


# Sequences, blocks per sequence, rows per block: few enough to be split on a GPU of 108 SMs.
SHARED_BLOCKS = [(1, 8, 16), (3, 4, 5), (2, 3, 32), (1, 2, 70), (1, 5, 1), (5, 6, 2)]


def check_blocks_read_their_sequence_together(make, slots, blocks, n):
    """Blocks of ``n`` rows, the last one of each sequence cut short, processed one by one or all blocks of a sequence
    at once. They begin on both sides of a split's boundary.
    """
    groups, starts = [ar(s, 64 * s + 119, n) for s in range(slots)], range(120, 120 + 5 * blocks, 5)
    for s in range(slots):
        groups += [diff(s, 64 * s + at, n, invalid=n // 3 * (at == starts[-1])) for at in starts]
    together, apart = make(groups, blocks_per_seq=blocks), make(groups)
    want = apart.run()
    assert_close(want, apart.expected())
    out, workspace = torch.full_like(want, torch.nan), together.workspace()
    together.call(out, workspace)
    assert torch.equal(out, want)
    assert workspace.any()  # it splits, as a pass that folds at once takes blocks one by one
    assert torch.equal(together.run(split=False), want)
    for case in (together, apart):
        spoil_keys(case, [124])
    assert torch.equal(together.run().nan_to_num(7), apart.run().nan_to_num(7))
