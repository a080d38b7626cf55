"""Numbers on their way to a device, without waiting for what it is doing."""

from __future__ import annotations

import ctypes
import functools

import torch

STAGED_BYTES = 64 << 10  # of pageable memory, which CUDA stages before it returns; for more it may wait


@functools.cache
def reads_pageable_memory(device: torch.device) -> bool:
    """Whether a CUDA device reads the host's pageable memory itself, through its page tables, as a GH200's does: then
    nothing has to be staged, and a copy may bring what was written after it was asked for.
    """
    uses_host_page_tables, answer = 100, ctypes.c_int(0)  # CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_...
    ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(answer), uses_host_page_tables, device.index)
    return bool(answer.value)


def copy_up(there: torch.Tensor, host: torch.Tensor) -> None:
    """``there.copy_(host)`` of one dimension, without its wait for what the device is doing, if that can be; ``host``,
    which is pageable, may be written again at once.
    """
    step = STAGED_BYTES // host.element_size()
    for part, values in zip(there.split(step), host.split(step), strict=True):
        part.copy_(values, non_blocking=True)
    if there.device.type == "cuda" and reads_pageable_memory(there.device):
        torch.cuda.current_stream(there.device).synchronize()


def upload(values, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.tensor(values, device=device)`` of flat values, as :func:`copy_up` brings them there."""
    host = torch.tensor(values, dtype=dtype, device="cpu")
    there = torch.empty_like(host, device=device)
    copy_up(there, host)
    return there


def put(column: torch.Tensor, index: int, value) -> None:
    """``column[index] = value`` for a number, which torch would first copy over from the host, and wait for that."""
    column[index].fill_(value)
