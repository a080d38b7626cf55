"""Host memory in huge pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthrus_rt import dispatch
from orthrus_rt.fork_lock import ForkLock


class Arena:
    """Tensors in blocks that request huge pages. A pass reads every weight and every key once, so with 4 KiB pages it
    would also read most of the page tables. Small tensors share a block, which is freed with the last of them once the
    next block is begun.
    """

    BLOCK, PAGE, LINE = 32 << 20, 2 << 20, 64  # bytes

    def __init__(self):
        self.block, self.lock = torch.empty(0, dtype=torch.uint8, device="cpu"), ForkLock()

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        nbytes = shape.numel() * dtype.itemsize
        size = -(-nbytes // self.LINE) * self.LINE
        if size >= self.BLOCK:
            return self._new_block(size)[:nbytes].view(dtype).view(shape)
        with self.lock.held():
            if size > self.block.numel():
                self.block = self._new_block(self.BLOCK)
            data, self.block = self.block[:nbytes].view(dtype).view(shape), self.block[size:]
        return data

    def _new_block(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):  # otherwise only callers in inference mode could use its rest
            block = torch.empty(nbytes + self.PAGE, dtype=torch.uint8, device="cpu")
        block = block[-block.data_ptr() % self.PAGE :][:nbytes]
        if native := dispatch.extension():
            native.cpu.advise_huge_pages(block.data_ptr(), nbytes)
        return block


arena = Arena()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """An empty tensor, on the CPU by default and there in huge pages."""
    if device is None or device.type == "cpu":
        return arena.empty(torch.Size(shape), dtype)
    return torch.empty(shape, dtype=dtype, device=device)
