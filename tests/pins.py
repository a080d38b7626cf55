"""What tests owe to the instruction set that runs.

Pins: sets round differently, and where two logits nearly tie, another set writes another text. Time: without AVX-512 a
pass of the embedded model takes so long that some of its tests are ``--full``'s there. Only modules of tests import
this: it loads the native module, which ``--software-tiles`` and ``--sanitized`` replace first.
"""

from __future__ import annotations

from typing import TypeVar

import pytest

from orthrus_rt import dispatch

SLOW = dispatch.extension() is not None and dispatch.extension().cpu.isa() in ("avx2", "neon", "portable")
UNLESS_SLOW = pytest.mark.full if SLOW else ()

T = TypeVar("T")


def of_this_isa(pinned: dict[str, T], tight: float, loose: float) -> tuple[T, float]:
    """What is pinned for the CPU variant that runs, and ``tight``; else what is for AVX-512 BF16, and ``loose``. AVX2
    and NEON round as AVX-512 does.
    """
    isa = dispatch.extension().cpu.isa()
    isa = "avx512" if isa in ("avx2", "neon") else isa
    return (pinned[isa], tight) if isa in pinned else (pinned["avx512_bf16"], loose)
