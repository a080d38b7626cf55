"""Shared by the tests of the native CPU ops: thread counts, row lists, tensors, the rounding bound."""

import torch

from orthrus_rt.plan import Rows

ELEMENT = torch.bfloat16  # see the fixture ``element``


class threads:
    """``with threads(n):`` runs ops on n threads."""

    def __init__(self, count):
        self.count = count

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)


def make_rows(groups, num_groups_ar):
    """Rows from groups of ``(seq, [(position, prefix_len), ...])``, AR groups first."""
    flat = [(seq, position, prefix) for seq, rows in groups for position, prefix in rows]
    starts = [0]
    for _, rows in groups:
        starts.append(starts[-1] + len(rows))
    column = torch.tensor(flat, dtype=torch.int32).reshape(-1, 3)
    return Rows(
        token=torch.zeros(len(flat), dtype=torch.int32),
        position=column[:, 1].contiguous(),
        seq=column[:, 0].contiguous(),
        prefix_len=column[:, 2].contiguous(),
        group_start=torch.tensor(starts, dtype=torch.int32),
        num_rows_ar=starts[num_groups_ar],
        num_groups_ar=num_groups_ar,
        max_group_rows=max((len(rows) for _, rows in groups), default=0),
    )


def randn(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(ELEMENT)


def poison(*shape, dtype=None):
    return torch.full(shape, torch.nan, dtype=dtype or ELEMENT)


def assert_rounded(got, want, slack=0.0):
    """``got`` is float64 ``want`` evaluated in fp32 (1e-6, and ``slack``, absolute) and rounded once to its dtype."""
    bound = want.abs() * (torch.finfo(got.dtype).eps / 2 + 1e-6) + slack + 1e-38
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"worst {float((error / bound).max()):.3g} times the bound"
