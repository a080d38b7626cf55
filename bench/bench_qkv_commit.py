"""qkv_commit (norms, RoPE and cache write of both views' rows in one launch) compared with torch operations.

    python -m bench.bench_qkv_commit --model 8b --rows 1 32 2048 --out DIR

If there is more than one row, half of them belong to a diffusion block. Bytes are the rows read and written, and the
table of angles; see bench/small_ops.py.
"""

from __future__ import annotations

import torch

from bench import small_ops
from bench.common import run_script
from orthrus_rt import ops, reference
from orthrus_rt.pages import PAGE_SIZE, num_pages
from orthrus_rt.rope import cos_sin_table
from orthrus_rt.rows import Layout, empty_rows

CONTEXT = 1000  # tokens before the first row


class Case(small_ops.Case):
    op, baseline = "qkv_commit", "the oracle's torch operations"

    def __init__(self, config, num_rows, device):
        super().__init__(config, num_rows, device)
        num_rows_diff = num_rows // 2
        num_rows_ar = num_rows - num_rows_diff
        self.rows = rows = empty_rows(Layout(1, num_rows_ar, min(num_rows_diff, 1), num_rows_diff), device)
        rows.seq.zero_()
        rows.position.copy_(CONTEXT + torch.cat([torch.arange(num_rows_ar), torch.arange(num_rows_diff)]))
        dim, heads_kv = config.head_dim, config.num_heads_kv
        self.qkv = self.randn(num_rows, (config.num_heads_q + 2 * heads_kv) * dim)
        self.cos_sin = cos_sin_table(config, CONTEXT + num_rows).to(device)
        self.norms = tuple(self.randn(4, dim).float()) if config.qk_norm else None
        pages = num_pages(CONTEXT + num_rows_ar)
        self.page_table = (1 + torch.randperm(pages)).int()[None].to(device)
        self.pages = self._zeros(2, 1 + pages, heads_kv, PAGE_SIZE, dim)
        self.scratch = self._zeros(2, num_rows_diff, heads_kv, dim) if num_rows_diff else (None, None)
        self.q_out = self._zeros(num_rows, config.num_heads_q, dim)
        self.nbytes = 2 * self.qkv.nbytes + 4 * num_rows * dim

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=self.device)

    def call(self):
        self._run(ops.qkv_commit)

    def call_baseline(self):
        self._run(reference.qkv_commit)
        return self.q_out

    def _run(self, op):
        angles = self.rows, self.cos_sin, self.norms, self.config.rms_norm_eps
        op(self.qkv, *angles, *self.pages, self.page_table, *self.scratch, self.q_out)

    def max_error(self):
        found = [self.q_out, self.pages, *(self.scratch if self.rows.num_rows_diff else ())]
        self.call()
        got = torch.cat([tensor.flatten() for tensor in found])
        for tensor in found:
            tensor.zero_()
        self.call_baseline()
        return small_ops.error_of(got, torch.cat([tensor.flatten() for tensor in found]))


def main() -> None:
    small_ops.report_on(Case, __doc__)


if __name__ == "__main__":
    run_script(main)
