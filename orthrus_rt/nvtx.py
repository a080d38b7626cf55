"""NVTX ranges for profilers, per cycle, pass, layer and op, if ``ORTHRUS_NVTX=1`` is set when this module is imported.

Without it :func:`ranged` returns functions unchanged, so that calls cost nothing extra. With it, in a torch without
NVTX (one without CUDA), a single warning says so and everything runs without ranges. A replayed CUDA graph runs no
Python, so only the range of the whole cycle (or prefill) is visible.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable

VARIABLE = "ORTHRUS_NVTX"
ENABLED = os.environ.get(VARIABLE, "0") not in ("", "0")


def ranged(name: str | Callable[..., str]):
    """Decorator: every call runs in a range of this name, or of the name that ``name`` returns for the call's
    arguments.
    """

    def wrap(function):
        if not ENABLED:
            return function
        import torch

        @functools.wraps(function)
        def in_range(*args, **kwargs):
            if not _push(name(*args, **kwargs) if callable(name) else name):
                return function(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.nvtx.range_pop()

        return in_range

    return wrap


def _push(name: str) -> bool:
    """Begin a range; whether that was possible."""
    import torch

    try:
        torch.cuda.nvtx.range_push(name)
    except RuntimeError as error:
        _warn(str(error))
        return False
    return True


@functools.cache
def _warn(why: str) -> None:
    """Warn once for each reason."""
    warnings.warn(f"{VARIABLE} is set, but there will be no ranges: {why}", stacklevel=3)
