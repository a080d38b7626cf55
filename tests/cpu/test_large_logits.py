"""Offsets of 64 bits into logits and counts of tokens, which would be 8 GB each if they took memory."""

import torch

from orthrus_rt import ops
from tests import large_logits, sparse


def test_row_linear():
    out = sparse.drained((large_logits.ROWS, large_logits.VOCAB), torch.float32)
    large_logits.check_row_linear(ops.row_linear, out, in_features=2)


def test_process_logits():
    large_logits.check_process_logits(ops.process_logits, sparse.empty)


def test_count_tokens():
    large_logits.check_count_tokens(ops.count_tokens, sparse.empty)
