"""One layer of a tiny model, run with the native CPU ops."""

import torch

from orthrus_rt import ops, weights
from tests.native_cpu import poison, randn
from tests.rows import ar, diff, make_rows


class Layer:
    """One layer's ops over fixed buffers: 20 AR rows of slot 0, a block of 4 rows of slot 1."""

    def __init__(self):
        self.rows = make_rows([ar(0, 60, 20), diff(1, 5, 4)])
        n = self.rows.num_rows
        self.rows.token.copy_(torch.arange(n))
        self.table = randn(40, 64, seed=1)
        self.norm = torch.rand(64, generator=torch.Generator().manual_seed(2))
        self.cos_sin = torch.rand(128, 32, generator=torch.Generator().manual_seed(3))
        self.qkv_weight = weights.pack(randn(4 * 32, 64, seed=4, scale=0.1), impl="cpu")
        self.head = weights.pack(randn(40, 64, seed=5), impl="cpu")
        self.pages = randn(2, 5, 1, 64, 32, seed=6)
        self.page_table = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
        self.hidden, self.normed = poison(n, 64), poison(n, 64)
        self.qkv, self.q, self.attn = poison(n, 128), poison(n, 2, 32), poison(n, 2, 32)
        self.sk, self.sv = poison(4, 1, 32), poison(4, 1, 32)
        self.logits = poison(n, 40, dtype=torch.float32)

    def run(self):
        cache = (*self.pages, self.page_table, self.sk, self.sv)
        ops.embed(self.rows.token, self.table, self.hidden)
        ops.rms_norm(self.hidden, self.norm, 1e-5, self.normed)
        ops.row_linear(self.normed, self.qkv_weight, self.qkv)
        ops.qkv_commit(self.qkv, self.rows, self.cos_sin, None, 1e-5, *cache, self.q)
        ops.dual_attn(self.q, *cache, self.rows, 32**-0.5, self.attn, max_seq_len=128)
        flat = self.attn.view(self.rows.num_rows, 64)
        ops.row_linear(flat, self.head, self.logits, epilogue="logits")
