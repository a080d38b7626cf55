"""Rows of logits with every kind of sampling parameters, for the CPU, interpreter and GPU tiers."""

from __future__ import annotations

import torch

# temperature, top_k, top_p, min_p
FILTERS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (1.0, 20, 0.8, 0.0),
    (0.7, 0, 0.95, 0.0),
    (1.5, 50, 1.0, 0.02),
    (0.3, 1, 1.0, 0.0),
    (2.0, 0, 0.5, 0.0),
    (1.0, 10**6, 0.999, 0.1),
    (1.0, 3, 1e-9, 0.0),
    (100.0, 0, 0.9, 0.0),
    (1e-4, 40, 0.9, 0.5),
    (0.0, 5, 0.5, 0.5),
]


def with_filters(logits, filters=None, position=100, device="cpu"):
    """Arguments of process_logits before ``purpose``: row i gets filter i, in turn."""
    n = logits.shape[0]
    chosen = [(filters or FILTERS)[i % len(filters or FILTERS)] for i in range(n)]
    temperature, top_k, top_p, min_p = zip(*chosen, strict=True)

    def column(values, dtype):
        return torch.tensor(values, dtype=dtype, device=device)

    return (
        logits.to(device),
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        torch.arange(n, device=device) * 10**12 + 12345,
        torch.arange(n, dtype=torch.int32, device=device) + position,
    )


def logits(n, vocab, kind, seed=0):
    """fp32 ``[n, vocab]`` of a kind: "normal", "peaked" as language models are, "tied" (few values), "hostile"."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, vocab, generator=generator)
    if kind == "peaked":
        return x * 1.5 - 8 + 14 * torch.rand(n, vocab, generator=generator) ** 12
    if kind == "tied":
        return (x * 2).round() / 2
    if kind == "hostile":
        x[0::4] = torch.nan
        x[1::4, : vocab // 2] = -torch.inf
        x[1::4, -1] = torch.inf
        x[2::4] = 1e38 * x[2::4]
        x[3::4] = -torch.inf
        x[3::4, vocab // 3] = torch.nan
        return x
    return x * 3


def extras(n, vocab, position, seed=0, device="cpu"):
    """Penalties, bias and stop ids: half the rows before their min_position, half beyond."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    counts = integers(-6, 4, n, vocab).clamp(min=-1)
    counts[integers(0, 10, n, vocab) > 1] = 0
    penalties = torch.stack([torch.linspace(0.8, 1.5, n), torch.linspace(-0.5, 1, n), torch.linspace(0, 0.4, n)], 1)
    bias_ids = integers(-1, vocab, n, 7)
    bias_ids[:, 3] = bias_ids[:, 2]
    return {
        name: t.to(device).contiguous()
        for name, t in dict(
            penalties=penalties, token_counts=counts, bias_ids=bias_ids,
            bias_values=torch.randn(n, 7, generator=generator) * 4, stop_ids=integers(-1, vocab, n, 5),
            min_position=position.cpu() + torch.arange(n, dtype=torch.int32) % 2,
        ).items()
    }  # fmt: skip
