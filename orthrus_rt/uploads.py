"""Copies of numbers to a device, without waiting for the work in progress there."""

from __future__ import annotations

import ctypes
import functools

import torch

STAGED_BYTES = 64 << 10  # of pageable memory, which CUDA stages before it returns; for larger copies it may wait


@functools.cache
def reads_pageable_memory(device: torch.device) -> bool:
    """Whether a CUDA device reads the host's pageable memory itself, through the host's page tables, as in a GH200.
    Then copies are not staged, and one may transfer what was written after it was requested.
    """
    uses_host_page_tables, answer = 100, ctypes.c_int(0)  # CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_...
    ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(answer), uses_host_page_tables, device.index)
    return bool(answer.value)


def copy_up(there: torch.Tensor, host: torch.Tensor) -> None:
    """``there.copy_(host)`` of one dimension, if possible without waiting for the work in progress on the device.
    ``host``, which is pageable, may be overwritten at once.
    """
    step = STAGED_BYTES // host.element_size()
    for part, values in zip(there.split(step), host.split(step), strict=True):
        part.copy_(values, non_blocking=True)
    if there.device.type == "cuda" and reads_pageable_memory(there.device):
        torch.cuda.current_stream(there.device).synchronize()


def upload(values, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.tensor(values, device=device)`` of flat values, transferred by :func:`copy_up`."""
    host = torch.tensor(values, dtype=dtype, device="cpu")
    there = torch.empty_like(host, device=device)
    copy_up(there, host)
    return there


def put(column: torch.Tensor, index: int, value) -> None:
    """``column[index] = value`` for a number, which torch itself would copy from the host, and wait for the copy."""
    column[index].fill_(value)
