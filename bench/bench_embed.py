"""embed, the embedding rows of some tokens, compared with torch.index_select.

    python -m bench.bench_embed --model 8b --rows 1 32 2048 --out DIR

Bytes are the rows read and written, and the ids: see bench/small_ops.py.
"""

from __future__ import annotations

import torch

from bench import small_ops
from bench.common import run_script
from orthrus_rt import ops, reference


class Case(small_ops.Case):
    op, baseline = "embed", "torch.index_select"

    def __init__(self, config, num_rows, device):
        super().__init__(config, num_rows, device)
        self.table = self.randn(config.vocab_size, config.hidden_size)
        self.token = (torch.arange(num_rows, device=device) * 9973 % config.vocab_size).int()
        self.out = torch.empty(num_rows, config.hidden_size, dtype=torch.bfloat16, device=device)
        self.nbytes = 2 * self.out.nbytes + self.token.nbytes

    def call(self):
        ops.embed(self.token, self.table, self.out)

    def call_baseline(self):
        return torch.index_select(self.table, 0, self.token, out=self.out)

    def max_error(self):
        want = torch.empty_like(self.out)
        reference.embed(self.token, self.table, want)
        self.call()
        return small_ops.error_of(self.out, want)


def main() -> None:
    small_ops.report_on(Case, __doc__)


if __name__ == "__main__":
    run_script(main)
