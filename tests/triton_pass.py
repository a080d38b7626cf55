"""An attention pass that the portable dual_attn runs."""

from __future__ import annotations

import torch

from orthrus_rt.triton_kernels import dual_attn
from tests.attention_pass import Pass


class TritonPass(Pass):
    """The interpreter computes bf16 wrongly, hence ``dtype``."""

    def __init__(self, heads, groups, dtype=torch.bfloat16, **kwargs):
        super().__init__(heads, groups, **kwargs)
        for name in ("q", "k_pages", "v_pages", "scratch_k", "scratch_v"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).to(dtype))

    def workspace(self):
        return None

    def call(self, out, workspace):
        dual_attn.dual_attn(
            self.q, self.k_pages, self.v_pages, self.page_table, self.scratch_k, self.scratch_v, self.rows,
            self.softmax_scale, out,
        )  # fmt: skip
