"""rms_norm against float64, for the interpreter, PTX and GPU tiers."""

from __future__ import annotations

import torch

from tests import sparse
from tests.native_cpu import assert_rounded

EPS = 1e-6


def check_rms_norm(rms_norm, hidden: int, dtype: torch.dtype, device="cpu") -> None:
    """Rounded once, from fp32 sums of squares: beyond fp16, so small that eps counts, and zero."""
    generator = torch.Generator().manual_seed(hidden)
    scales = torch.tensor([3.0, 1.0, 300.0, 1e-2, 1e-3, 1e-3, 0.0])
    x = (torch.randn(7, hidden, generator=generator) * scales[:, None]).to(dtype).to(device)
    weight = torch.randn(hidden, generator=generator).to(device)
    out = torch.full_like(x, torch.nan)
    rms_norm(x, weight, EPS, out)
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS) * weight.double()
    limits = torch.finfo(dtype)
    assert_rounded(out, exact, slack=limits.smallest_normal * limits.eps)


def check_64_bit_offsets(rms_norm, dtype: torch.dtype) -> None:
    x, out = sparse.empty(((1 << 31) // 64 + 2, 64), dtype), torch.zeros(1, 64, dtype=dtype)
    x[-1] = 3
    rms_norm(x, torch.ones(64), EPS, out, torch.tensor([len(x) - 1], dtype=torch.int32))
    assert (out == 1).all()
