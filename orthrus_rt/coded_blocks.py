"""bf16 weights in 12 bits an element, without loss, or for drafts in 8, as the CUDA kernels read them.

The format, and why: csrc/cuda/coded_block.cuh.
"""

from __future__ import annotations

import torch

CODED_BITS, DRAFT_BITS = 12, 8  # per element: without loss, and where only drafts depend on a weight
HEAD_BYTES, HALF_BYTES = 64, 2048  # 4 bits of each element: codes, then leading and trailing halves of lower bytes
BLOCK_BYTES = {CODED_BITS: HEAD_BYTES + 3 * HALF_BYTES, DRAFT_BITS: HEAD_BYTES + 2 * HALF_BYTES}
NUM_UPPER = 8  # values of an exponent's upper seven bits that have a code in a block
LISTED = 12  # exceptions that fit into their block
# Per block, on average, in a coded weight. By estimate each exception costs some 50 to 100 clocks of an H100, and the
# bytes saved per block are worth 150.
MOST_EXCEPTIONS = 2
THREADS, STEPS, STEP_ELEMENTS = 128, 4, 8
AT_ONCE = 1024  # blocks, of 4 million elements: temporary tensors take some 100 MB


def encode(blocks: torch.Tensor, bits: int = CODED_BITS) -> torch.Tensor | None:
    """``blocks`` ``[rows, columns, 64 features, 64 inputs]`` in bfloat16, coded: bytes, a multiple of 16 of them.

    ``bits``: per element, 12 or, without trailing halves, 8. None if there are more than MOST_EXCEPTIONS exceptions per
    block, as coding does not pay then.

    Raises:
        ValueError: the weight is so large that the places of exceptions do not fit in 31 bits.
    """
    some = max(1, AT_ONCE // blocks.shape[1])
    parts = [blocks[i : i + some] for i in range(0, len(blocks), some)]
    num_blocks, order = len(blocks) * blocks.shape[1], _order(blocks.device)
    exceptions = [_Part(part, order).num_exceptions for part in parts]
    if int(sum(each.sum() for each in exceptions)) > MOST_EXCEPTIONS * num_blocks:
        return None
    elsewhere = int(sum(each[each > LISTED].sum() for each in exceptions))
    size = BLOCK_BYTES[bits]
    out = torch.zeros(num_blocks * size + -(-elsewhere // 4) * 16, dtype=torch.uint8, device=blocks.device)
    if out.numel() >= 1 << 33:
        raise ValueError(f"row_linear: a coded weight must have less than 2^33 bytes, got {out.numel()}")
    words, block, word = out.view(torch.int32), 0, num_blocks * size // 4
    for part in parts:
        coded = _Part(part, order)
        end = block + len(coded.bits)
        more = coded.write(out[block * size : end * size].view(-1, size), word)
        words[word : word + len(more)] = more
        block, word = end, word + len(more)
    return out


class _Part:
    """Some blocks, with their elements in the order of :func:`_order`."""

    def __init__(self, blocks: torch.Tensor, order: torch.Tensor):
        self.bits = blocks.reshape(-1, 4096).view(torch.int16)[:, order].int() & 0xFFFF
        n, device = len(self.bits), self.bits.device
        upper = (self.bits >> 8 & 0x7F).long()
        count = torch.zeros(n, 128, dtype=torch.int32, device=device)
        count.scatter_add_(1, upper, torch.ones_like(self.bits))
        self.table = count.sort(dim=1, descending=True, stable=True).indices[:, :NUM_UPPER]
        code_of = torch.full((n, 128), NUM_UPPER, dtype=torch.int32, device=device)
        code_of.scatter_(1, self.table, torch.arange(NUM_UPPER, dtype=torch.int32, device=device).expand(n, -1))
        self.code = code_of.gather(1, upper)  # NUM_UPPER: an exception
        self.num_exceptions = (self.code == NUM_UPPER).sum(1)

    def write(self, out: torch.Tensor, end: int) -> torch.Tensor:
        """Write to ``out`` ``[blocks, BLOCK_BYTES[bits]]``. Returns the exceptions that do not fit there, to be placed
        ``end`` words after the weight's start.
        """
        n, bits, num = len(out), self.bits, self.num_exceptions
        # Of a step's eight elements, nibbles 0-3 and 4-7 are selectors; signs are the top bits of nibbles 1, 3, 5, 7
        # and 0, 2, 4, 6.
        nibble = (self.code % NUM_UPPER).view(n, THREADS, STEPS, STEP_ELEMENTS)
        sign = (bits >> 15 << 3).view_as(nibble)
        nibble[..., 1::2] |= sign[..., :4]
        nibble[..., 0::2] |= sign[..., 4:]
        lower = (bits & 0xFF).view_as(nibble)
        halves = (
            nibble[..., 0::2] | nibble[..., 1::2] << 4,
            lower[..., 4:] >> 4 | lower[..., :4] & 0xF0,
            lower[..., :4] & 0xF | (lower[..., 4:] << 4 & 0xF0).roll(-1, dims=-1),
        )

        # Exceptions, block by block: the element, its thread, its register and the half of the register.
        block, index = (self.code == NUM_UPPER).nonzero(as_tuple=True)
        listed = bits[block, index].long() | index // 32 << 16 | index % 32 // 2 << 23 | index % 2 << 27
        rank = torch.arange(len(block), device=bits.device) - (num.cumsum(0) - num)[block]
        inside = num[block] <= LISTED
        elsewhere = torch.where(num > LISTED, num, 0)

        head = torch.zeros(n, HEAD_BYTES // 4, dtype=torch.int32, device=bits.device)
        head.view(torch.uint8)[:, :NUM_UPPER] = self.table.byte()
        head[:, 2] = num
        head[:, 3] = end + elsewhere.cumsum(0) - elsewhere
        head[block[inside], 4 + rank[inside]] = listed[inside].int()
        out[:, :HEAD_BYTES] = head.view(torch.uint8)
        out[:, HEAD_BYTES:] = torch.stack(halves, 1).reshape(n, -1)[:, : out.shape[1] - HEAD_BYTES]
        return listed[~inside].int()


def _order(device: torch.device) -> torch.Tensor:
    """The element of a block, ``64 * feature + input``, at each place: by thread, step and element of the step."""
    thread, step, element = torch.meshgrid(
        *(torch.arange(size, device=device) for size in (THREADS, STEPS, STEP_ELEMENTS)), indexing="ij"
    )
    feature = thread // 32 * 16 + thread % 32 // 4 + element // 2 % 2 * 8
    column = step * 16 + thread % 4 * 2 + element % 2 + element // 4 * 8
    return (64 * feature + column).flatten()
