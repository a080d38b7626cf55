"""One forward of an engine's model over given rows, all logits wanted."""

import torch

from orthrus_rt.model import Activations, Workspace, forward


def logits_of(engine, rows):
    """fp32 ``[num_rows, vocab_size]``."""
    model, n = engine.model, rows.num_rows
    out = torch.full((n, model.config.vocab_size), torch.nan, device=model.device)
    forward(
        model, engine.kv, rows, Activations(model, n, rows.num_rows_diff),
        Workspace.allocate(model, max_rows=n, max_groups=rows.num_groups, max_seq_len=engine.max_seq_len),
        logit_rows=torch.arange(n, dtype=torch.int32, device=model.device), epilogue="logits", out=out,
        max_seq_len=engine.max_seq_len,
    )  # fmt: skip
    return out
