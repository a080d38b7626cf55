"""bf16 weights in 12 bits an element, without loss, as the CUDA kernels for Hopper read them.

The format, and why: csrc/cuda/coded_block.cuh.
"""

from __future__ import annotations

import functools

import torch

BLOCK_BYTES = 6272
NUM_UPPER = 8  # exponents' upper seven bits that have a code in a block
LISTED = 28  # exceptions that have room in their block
THREADS, STEPS, STEP_ELEMENTS = 128, 4, 8
HEAD_BYTES, CODE_BYTES, LOWER_BYTES = 128, 2048, 4096
AT_ONCE = 1024  # blocks, 4 million elements: what is computed with takes some 100 MB


def encode(blocks: torch.Tensor) -> torch.Tensor:
    """``blocks`` ``[n, 64 features, 64 inputs]`` in bfloat16, coded: bytes, a multiple of 16 of them."""
    out = torch.empty(len(blocks), BLOCK_BYTES, dtype=torch.uint8, device=blocks.device)
    behind, words = [], len(blocks) * BLOCK_BYTES // 4
    for first in range(0, len(blocks), AT_ONCE):
        more = _encode_some(blocks[first : first + AT_ONCE], out[first : first + AT_ONCE], words)
        behind.append(more)
        words += len(more)
    if words * 4 == out.numel():
        return out.flatten()
    behind.append(torch.zeros(-words % 4, dtype=torch.int32, device=blocks.device))
    return torch.cat([out.flatten(), *(more.view(torch.uint8) for more in behind)])


def _encode_some(blocks: torch.Tensor, out: torch.Tensor, end: int) -> torch.Tensor:
    """Write ``out`` ``[n, BLOCK_BYTES]``; return the exceptions that have no room in there, which will lie ``end``
    words behind the weight's begin.
    """
    n, device = len(blocks), blocks.device
    bits = blocks.reshape(n, -1).view(torch.int16)[:, _order(device)].int() & 0xFFFF
    upper = (bits >> 8 & 0x7F).long()
    count = torch.zeros(n, 128, dtype=torch.int32, device=device).scatter_add_(1, upper, torch.ones_like(bits))
    table = count.sort(dim=1, descending=True, stable=True).indices[:, :NUM_UPPER]
    code_of = torch.full((n, 128), NUM_UPPER, dtype=torch.int32, device=device)
    code_of.scatter_(1, table, torch.arange(NUM_UPPER, dtype=torch.int32, device=device).expand(n, -1))
    code = code_of.gather(1, upper)
    excepted = code == NUM_UPPER

    # Codes by nibbles: 0-3 and 4-7 are selectors, signs are the top bits of 1, 3, 5, 7 and of 0, 2, 4, 6.
    nibble = (code % NUM_UPPER).view(n, THREADS, STEPS, STEP_ELEMENTS)
    sign = (bits >> 15 << 3).view_as(nibble)
    nibble[..., 1::2] |= sign[..., :4]
    nibble[..., 0::2] |= sign[..., 4:]
    codes = nibble[..., 0::2] | nibble[..., 1::2] << 4
    lower = (bits & 0xFF).view(n, THREADS, 2, 16).transpose(1, 2)

    # Exceptions, block by block and in the order of the elements.
    which, element = excepted.nonzero(as_tuple=True)
    listed = bits[which, element].long() | _place(device)[element]
    num = excepted.sum(1)
    begin = num.cumsum(0) - num
    inside = num[which] <= LISTED
    elsewhere = torch.where(num > LISTED, num, 0)
    head = torch.zeros(n, HEAD_BYTES // 4, dtype=torch.int32, device=device)
    head.view(torch.uint8)[:, :NUM_UPPER] = table.byte()
    head[:, 2] = num
    head[:, 3] = end + elsewhere.cumsum(0) - elsewhere
    rank = torch.arange(len(which), device=device) - begin[which]
    head[which[inside], 4 + rank[inside]] = listed[inside].int()

    out[:, :HEAD_BYTES] = head.view(torch.uint8)
    out[:, HEAD_BYTES : HEAD_BYTES + CODE_BYTES] = codes.reshape(n, -1)
    out[:, HEAD_BYTES + CODE_BYTES :] = lower.reshape(n, -1)
    return listed[~inside].int()


@functools.cache
def _order(device: torch.device) -> torch.Tensor:
    """Which element of a block, ``64 * feature + input``, comes where: by thread, step and the step's elements."""
    thread, step, element = torch.meshgrid(
        *(torch.arange(size, device=device) for size in (THREADS, STEPS, STEP_ELEMENTS)), indexing="ij"
    )
    feature = thread // 32 * 16 + thread % 32 // 4 + element // 2 % 2 * 8
    column = step * 16 + thread % 4 * 2 + element % 2 + element // 4 * 8
    return (64 * feature + column).flatten()


@functools.cache
def _place(device: torch.device) -> torch.Tensor:
    """What an exception says of each element in that order: the thread, the register and which half of it."""
    index = torch.arange(THREADS * STEPS * STEP_ELEMENTS, device=device)
    return index // 32 << 16 | index % 32 // 2 << 23 | index % 2 << 27
