"""The tokens that a row may choose and their probabilities, by temperature, top-k, top-p and min-p, in torch."""

from __future__ import annotations

import torch

# Probabilities are summed as integers: the mass of a token is trunc(exp(y - max) * 2**40). Such sums are exact in any
# order, so the bits are the same for any batch and any way to split the row.
MASS_ONE = 1 << 40
FLOAT_MAX = torch.finfo(torch.float32).max


def _mass(weight):
    return (weight * MASS_ONE).long()


def _per_row(value, logits, dtype):
    return torch.as_tensor(value, dtype=dtype, device=logits.device).expand(logits.shape[0])[:, None]


def filtered(logits, temperature, top_k, top_p, min_p):
    """The steps of :func:`filtered_probabilities`, which takes the same arguments: ``(y, weight, keep)``, scaled logits
    and exp(y - max), fp32, and the kept tokens (of a greedy row one), bool, each ``[num_rows, vocab_size]``.
    """
    vocab = logits.shape[1]
    temperature = _per_row(temperature, logits, torch.float32)
    top_k = _per_row(top_k, logits, torch.int64)
    top_p = _per_row(top_p, logits, torch.float32)
    min_p = _per_row(min_p, logits, torch.float32)
    y = torch.where(logits.isnan(), -torch.inf, logits.float())
    y = (y / torch.where(temperature > 0, temperature, 1)).clamp(max=FLOAT_MAX)
    top = y.amax(-1, keepdim=True)
    weight = torch.exp(y - top)
    greedy = (temperature <= 0) | (top == -torch.inf)
    cut = torch.full_like(top, -torch.inf)
    limited = torch.where((top_k > 0) & (top_k < vocab) & ~greedy, top_k, 0)
    if limited.any():
        kth = y.topk(int(limited.max())).values.gather(1, (limited - 1).clamp(min=0))
        cut = torch.where(limited > 0, kth, cut)
    rows = ((top_p < 1) & ~greedy)[:, 0].nonzero()[:, 0]
    if rows.numel():
        cut[rows] = _nucleus(y[rows], weight[rows], cut[rows], top_p[rows])
    cut = torch.where(min_p > 0, torch.maximum(cut, top + torch.log(min_p)), cut)
    first = (y == top).to(torch.uint8).argmax(-1, keepdim=True)
    keep = torch.where(greedy, torch.arange(vocab, device=y.device) == first, y >= cut)
    return y, weight, keep


def _nucleus(y, weight, cut, top_p):
    """Smallest y of the shortest sorted prefix that has ``top_p`` of the mass of ``y >= cut``."""
    total = _mass(torch.where(y >= cut, weight, 0)).sum(-1, keepdim=True)
    target = (top_p.double() * total.double()).long().clamp(min=1)
    for width in (1024, y.shape[1]):  # the nucleus is nearly always small, so a full sort is the exception
        index = y.topk(min(width, y.shape[1])).indices
        reached = _mass(weight.gather(1, index)).cumsum(-1) >= target
        if reached[:, -1].all():
            break
    return y.gather(1, index.gather(1, reached.int().argmax(-1, keepdim=True)))


def filtered_probabilities(logits, temperature, top_k, top_p, min_p):
    """Probabilities fp32 ``[num_rows, vocab_size]`` of the tokens that each row may choose.

    Temperature first; then ``top_k`` (0: off), ``top_p`` (1: off; the shortest prefix of the sorted distribution whose
    mass is at least ``top_p``), ``min_p`` relative to the largest probability. Tokens equal to the last kept one are
    kept. ``temperature`` 0 puts everything on the largest logit (lowest id). NaN counts as -inf; a row of nothing but
    these chooses id 0. ``logits`` are ``[num_rows, vocab_size]``, parameters numbers or ``[num_rows]`` tensors.
    Row-invariant.
    """
    _, weight, keep = filtered(logits, temperature, top_k, top_p, min_p)
    alone = keep.sum(-1, keepdim=True) == 1
    kept = torch.where(keep, weight, 0)
    return torch.where(alone, keep.float(), kept / total_mass(kept))


def total_mass(kept):
    """The sum of each row of ``kept``, weights of :func:`filtered` or 0: fp32 ``[num_rows, 1]``, exact in any order."""
    return (_mass(kept).sum(-1, keepdim=True).double() / MASS_ONE).float()
