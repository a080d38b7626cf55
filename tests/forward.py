"""One forward of an engine's model over given rows that returns all logits, and the rows of one draft block."""

import torch

from orthrus_rt.model import Activations, Workspace, forward
from tests.rows import diff, make_rows


def draft_rows(block, start):
    """One diffusion block, int32 ``[k]``, of slot 0, right after ``start`` committed tokens."""
    rows = make_rows([diff(0, start, len(block))])
    rows.token.copy_(block)
    return rows


def logits_of(engine, rows):
    """fp32 ``[num_rows, vocab_size]``."""
    model, n = engine.model, rows.num_rows
    out = torch.full((n, model.config.vocab_size), torch.nan, device=model.device)
    forward(
        model, engine.kv, rows, Activations(model, n, rows.num_rows_diff),
        Workspace.allocate(model, max_rows=n, max_seq_len=engine.max_seq_len),
        logit_rows=torch.arange(n, dtype=torch.int32, device=model.device), epilogue="logits", out=out,
    )  # fmt: skip
    return out
