"""Tensors larger than memory, of which only what is written takes any."""

from __future__ import annotations

import math
import mmap

import pytest
import torch

NORESERVE = 0x4000  # MAP_NORESERVE, which mmap does not name in every Python: no account is kept of what it might take


def empty(shape, dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU. Where this process may not have so many addresses, the test is skipped."""
    nbytes = math.prod(shape) * dtype.itemsize
    try:
        space = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        pytest.skip(f"{nbytes >> 20} MB of addresses: {error.strerror}")
    return torch.frombuffer(space, dtype=dtype).view(shape)
