"""Logits and token counts beyond 2^31 elements: the last row gets the same result as alone. For CPU and GPU."""

from __future__ import annotations

import dataclasses

import torch

from orthrus_rt import weights
from orthrus_rt.state import SlotEdits, SlotSampling, SlotState, empty_partials, num_score_tiles
from tests.logits_cases import logits, moved, with_filters
from tests.rows import ar, make_rows

VOCAB = 1 << 20
ROWS = (1 << 31) // VOCAB + 2


def check_row_linear(row_linear, out: torch.Tensor, in_features: int, **kwargs) -> None:
    """``out``: fp32 ``[ROWS, VOCAB]``."""
    generator = torch.Generator(out.device).manual_seed(0)
    x, weight = (torch.randn(n, in_features, generator=generator, device=out.device).bfloat16() for n in (ROWS, VOCAB))
    alone, packed = torch.empty(1, VOCAB, device=out.device), weights.pack(weight)
    row_linear(x[-1:], packed, alone, epilogue="logits", **kwargs)
    row_linear(x, packed, out, epilogue="logits", **kwargs)
    assert alone.any()
    assert torch.equal(out[-1:], alone)


def check_process_logits(process_logits, zeros, device="cpu") -> None:
    """``zeros(shape, dtype=…)`` allocates the large tensors on ``device``. All rows but the last are invalid."""
    one = with_filters(logits(1, VOCAB, "normal"), [(0.9, 40, 0.9, 0.0)], edits=True, device=device)
    one.sampling.edits.token_counts[0, 5] = 3
    many = dataclasses.replace(
        one,
        logits=zeros((ROWS, VOCAB), dtype=torch.float32),
        rows=moved(make_rows([ar(0, 0, ROWS - 1, invalid=ROWS - 1), ar(ROWS - 1, 99, 1)]), device),
        logit_rows=torch.arange(ROWS, dtype=torch.int32, device=device),
        sampling=SlotSampling(
            *map(repeated, (*one.sampling.filters(), one.sampling.seed)), edits_of_the_last(one.sampling.edits, zeros)
        ),
        cache_seqlens=repeated(one.cache_seqlens),
    )
    many.logits[-1] = one.logits[0]
    chosen = []
    for case in (one, many):
        partials = empty_partials(len(case), num_score_tiles(VOCAB), device)
        process_logits(case.logits, case.rows, case.logit_rows, case.sampling, case.cache_seqlens, 2, partials)
        chosen.append([part[-1] for part in partials])
    assert all(torch.equal(*parts) for parts in zip(*chosen, strict=True))
    assert torch.equal(many.logits[-1], one.logits[0])


def check_count_tokens(count_tokens, zeros, device="cpu") -> None:
    state = SlotState.allocate(ROWS, 4, 8, 1, device)
    edits = SlotEdits.allocate(ROWS, 1, 1, torch.zeros(ROWS, 1, dtype=torch.int32, device=device))
    edits.token_counts = zeros((ROWS, VOCAB), dtype=torch.int32)
    state.output[-1, :3] = torch.tensor([7, VOCAB - 1, 7])
    state.num_output[-1] = 3
    count_tokens(state, edits)
    assert edits.token_counts[-1, [7, VOCAB - 1, 8]].tolist() == [2, 1, 0]


def repeated(tensor: torch.Tensor) -> torch.Tensor:
    """Repeats the values of one slot for ROWS slots."""
    return tensor.expand(ROWS, *tensor.shape[1:]).contiguous()


def edits_of_the_last(edits: SlotEdits, zeros) -> SlotEdits:
    counts = zeros((ROWS, VOCAB), dtype=torch.int32)
    counts[-1] = edits.token_counts[0]
    others = {name: repeated(tensor) for name, tensor in vars(edits).items() if name != "token_counts"}
    return SlotEdits(token_counts=counts, **others)
