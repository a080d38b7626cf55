"""How tests depend on the instruction set that runs.

Pinned values: instruction sets round differently, so texts differ where two logits nearly tie. Time: without AVX-512 a
pass of the embedded model takes so long that some of its tests run only with ``--full``. Only test modules may import
this: it loads the native module, which ``--software-tiles`` and ``--sanitized`` must replace first.
"""

from __future__ import annotations

from typing import TypeVar

import pytest

from orthrus_rt import dispatch

SLOW = dispatch.extension() is not None and dispatch.extension().cpu.isa() in ("avx2", "neon", "portable")
UNLESS_SLOW = pytest.mark.full if SLOW else ()

T = TypeVar("T")


def of_this_isa(pinned: dict[str, T], tight: float, loose: float) -> tuple[T, float]:
    """The value pinned for the CPU variant that runs, with ``tight``; if there is none, that of AVX-512 BF16, with
    ``loose``. AVX2 has the bits of AVX-512; NEON, which drafts with plain weights, rounds as they do.
    """
    isa = dispatch.extension().cpu.isa()
    isa = "avx512" if isa == "avx2" else isa
    return (pinned[isa], tight) if isa in pinned else (pinned["avx512_bf16"], loose)
