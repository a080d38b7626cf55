"""Copies of numbers to a device, which do not wait for the work in progress there unless very many are under way."""

from __future__ import annotations

import functools
from collections import deque

import torch

from orthrus_rt.device import never_free

STAGED_BYTES = 1 << 20  # of page-locked memory per device
PART_BYTES = STAGED_BYTES // 4  # longer copies are made in parts
ALIGNMENT = 256  # bytes, of each part


class Staging:
    """Page-locked host memory, used round and round, from which a CUDA device fetches numbers when it gets there. For
    pageable memory CUDA promises neither that a copy does not wait for the stream nor that its source may be
    overwritten at once; where a device reads the host's page tables, it may not.
    """

    @torch.inference_mode(False)  # its memory is used outside that mode too
    def __init__(self):
        self._memory = never_free(torch.empty(STAGED_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True))
        self._end = 0  # of the last part, in bytes since the first round
        self._parts: deque[tuple[int, torch.cuda.Event]] = deque()  # (start, its arrival) that may be under way
        self._events: list[torch.cuda.Event] = []  # to use again

    def copy(self, there: torch.Tensor, host: torch.Tensor) -> None:
        """``there.copy_(host)`` of one dimension and at most ``PART_BYTES``, on the current stream. It waits only for
        copies a whole round ago. One call at a time: the caller has the turn of the device's engine.
        """
        start, stream = self._reserve(host.nbytes), torch.cuda.current_stream(there.device)
        event = self._events.pop() if self._events else torch.cuda.Event()
        staged = self._memory[start % STAGED_BYTES :][: host.nbytes].view(host.dtype)
        staged.copy_(host)
        self._parts.append((start, event))
        try:
            there.copy_(staged, non_blocking=True)
        finally:  # an interrupt may come after the copy was launched
            event.record(stream)

    def _reserve(self, num_bytes: int) -> int:
        """Where a part may start: all that was there has been fetched."""
        start = self._end + -self._end % ALIGNMENT
        if start % STAGED_BYTES + num_bytes > STAGED_BYTES:
            start += -start % STAGED_BYTES
        while self._parts and self._parts[0][0] < start + num_bytes - STAGED_BYTES:
            self._parts[0][1].synchronize()
            self._events.append(self._parts.popleft()[1])
        self._end = start + num_bytes
        return start


@functools.cache
def staging(device: torch.device) -> Staging:
    """The staging memory of a CUDA device."""
    return Staging()


def copy_up(there: torch.Tensor, host: torch.Tensor) -> None:
    """``there.copy_(host)`` of one dimension, without waiting for the work in progress on the device unless almost
    ``STAGED_BYTES`` are under way. ``host`` may be overwritten at once.
    """
    if there.device.type != "cuda":
        there.copy_(host)
        return
    step = PART_BYTES // host.element_size()
    for part, values in zip(there.split(step), host.split(step), strict=True):
        staging(there.device).copy(part, values)


def upload(values, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.tensor(values, device=device)`` of flat values, transferred by :func:`copy_up`."""
    host = torch.tensor(values, dtype=dtype, device="cpu")
    there = torch.empty_like(host, device=device)
    copy_up(there, host)
    return there


def put(column: torch.Tensor, index: int, value) -> None:
    """``column[index] = value`` for a number, which torch itself would copy from the host, and wait for the copy."""
    column[index].fill_(value)
