"""An attention pass that runs the portable dual_attn."""

from __future__ import annotations

from orthrus_rt.triton_kernels import dual_attn
from tests.attention_pass import Pass


class TritonPass(Pass):
    def workspace(self):
        return None

    def call(self, out, workspace):
        dual_attn.dual_attn(
            self.q, self.k_pages, self.v_pages, self.page_table, self.scratch_k, self.scratch_v, self.rows,
            self.softmax_scale, out,
        )  # fmt: skip
