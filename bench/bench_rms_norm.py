"""rms_norm of a model's hidden states, compared with torch's own.

    python -m bench.bench_rms_norm --model 8b --rows 1 32 2048 --out DIR

Bytes are the rows read and written, and the weight: see bench/small_ops.py.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from bench import small_ops
from bench.common import run_script
from orthrus_rt import ops, reference


class Case(small_ops.Case):
    op, baseline = "rms_norm", "torch.nn.functional.rms_norm"

    def __init__(self, config, num_rows, device):
        super().__init__(config, num_rows, device)
        self.x = self.randn(num_rows, config.hidden_size)
        self.weight = self.randn(config.hidden_size).float()
        self.weight_bf16 = self.weight.bfloat16()
        self.out = torch.empty_like(self.x)
        self.nbytes = 2 * self.x.nbytes + self.weight.nbytes

    def call(self):
        ops.rms_norm(self.x, self.weight, self.config.rms_norm_eps, self.out)

    def call_baseline(self):
        return functional.rms_norm(self.x, self.weight.shape, self.weight_bf16, self.config.rms_norm_eps)

    def max_error(self):
        want = torch.empty_like(self.x, dtype=torch.float64)
        reference.rms_norm(self.x, self.weight, self.config.rms_norm_eps, want)
        self.call()
        return small_ops.error_of(self.out, want)


def main() -> None:
    small_ops.report_on(Case, __doc__)


if __name__ == "__main__":
    run_script(main)
