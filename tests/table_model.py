"""A language model that is a table, its exact distributions, and drafters that are wrong on purpose."""

from __future__ import annotations

import numpy as np
import torch

VOCAB = 5
# Row t: the AR logits after token t. Adjacent values differ by more than rounding, so filters cut where they should.
TABLE = torch.tensor([
    [1.0, 0.2, -0.5, 2.0, 0.0],
    [0.3, 0.4, 1.5, -2.0, 0.0],
    [-1.0, 0.1, 0.8, 0.9, 2.2],
    [0.7, -0.3, 0.2, 1.1, 0.5],
    [2.5, 0.6, 0.0, -0.4, -3.0],
])  # fmt: skip
# The logits of a drafter at every position of a block after token t.
DRAFTERS = {
    "uniform": torch.zeros(VOCAB, VOCAB),
    "adversarial": -3 * TABLE,  # its mass lies on the tokens least likely in the AR view
    "equal": TABLE,
    "nearly_equal": TABLE + torch.linspace(0, 1e-3, VOCAB),
    "certain": torch.tensor([[0.0, 30.0, 0.0, 0.0, 0.0]]).repeat(VOCAB, 1),
    "nan": torch.full((VOCAB, VOCAB), torch.nan),
}
SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.8},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.7, "top_k": 4, "top_p": 0.9},
)


def distribution(logits: torch.Tensor, temperature, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The filtered distribution of one row in float64, token by token as the filters are defined."""
    y = logits.double().numpy() / temperature
    p = np.exp(y - y.max())
    order = sorted(range(len(p)), key=lambda t: -p[t])
    kept = order[: top_k or None]
    mass, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += p[token]
        if mass >= top_p * p[kept].sum():
            break
    nucleus = [t for t in nucleus if p[t] >= min_p * p.max()]
    out = np.zeros(len(p))
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


def two_tokens(first: int, setting: dict) -> np.ndarray:
    """Joint distribution ``[VOCAB, VOCAB]`` of the two tokens after ``first``."""
    rows = np.stack([distribution(row, **setting) for row in TABLE])
    return rows[first][:, None] * rows


def remember_probs(sampler) -> None:
    """Caches the probabilities of a rejection sampler that sees the same few rows every time."""
    compute, known = sampler._probs, {}

    def remembered(logits):
        key = logits.numpy().tobytes()
        if key not in known:
            known[key] = compute(logits)
        return known[key]

    sampler._probs = remembered
