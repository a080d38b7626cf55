"""What tests pin of an instruction set's roundings: where two logits nearly tie, another set writes another text."""

from __future__ import annotations

from typing import TypeVar

from orthrus_rt import dispatch

T = TypeVar("T")


def of_this_isa(pinned: dict[str, T], tight: float, loose: float) -> tuple[T, float]:
    """What is pinned for the CPU variant that runs, and ``tight``; else what is for AVX-512 BF16, and ``loose``. AVX2
    and NEON round as AVX-512 does, and have pins of their own where they decode something else.
    """
    isa = dispatch.native().cpu.isa()
    if isa in ("avx2", "neon"):
        isa = "avx2" if "avx2" in pinned else "avx512"
    return (pinned[isa], tight) if isa in pinned else (pinned["avx512_bf16"], loose)
