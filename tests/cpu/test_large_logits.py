"""64-bit offsets into logits, token counts and weights, which would take many GB if they were real memory."""

import dataclasses

import torch

from orthrus_rt import ops
from orthrus_rt.weights import CPU_STRIP, pack
from tests import large_logits, sparse


def test_row_linear():
    out = sparse.drained((large_logits.ROWS, large_logits.VOCAB), torch.float32)
    large_logits.check_row_linear(ops.row_linear, out, in_features=2)


def test_row_linear_over_a_weight_of_more_than_4_GB():
    """Its last outputs are those of its last strip alone."""
    in_features = 1 << 14
    x, last = (torch.randn(n, in_features, generator=torch.Generator().manual_seed(n)) for n in (2, CPU_STRIP))
    alone = pack(last, impl="cpu")
    strips = (1 << 32) // alone.nbytes + 2
    data = sparse.empty((strips, *alone.data.shape[1:]), torch.float32)
    data[-1] = alone.data[0]
    large = dataclasses.replace(alone, data=data, out_features=strips * CPU_STRIP)
    got, want = (torch.full((2, weight.out_features), torch.nan) for weight in (large, alone))
    ops.row_linear(x, large, got)
    ops.row_linear(x, alone, want)
    assert torch.equal(got[:, -CPU_STRIP:], want)
    assert not got[:, :-CPU_STRIP].any()


def test_process_logits():
    large_logits.check_process_logits(ops.process_logits, sparse.empty)


def test_count_tokens():
    large_logits.check_count_tokens(ops.count_tokens, sparse.empty)
