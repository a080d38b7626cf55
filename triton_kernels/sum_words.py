"""A plain read of memory, which measures a device's bandwidth (see orthrus_rt/timing.py)."""

import triton
import triton.language as tl

BLOCK, STEPS = 4096, 16  # words that a program loads at once, and how many times


@triton.jit
def sum_words_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for step in range(STEPS):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def sum_words(x, out):
    """Sums over 65,536 words each, modulo 2**32; the last one over the remainder.

    Contract: x: int32 ``[n]``, contiguous, n < 2**31. out: int32 ``[num_sums(n)]``, MUTATED whole. Reads ``n`` words
        and writes 1 per 65,536 of them.
    """
    sum_words_kernel[(out.numel(),)](x, out, x.numel(), BLOCK=BLOCK, STEPS=STEPS, num_warps=8, enable_fp_fusion=False)


def num_sums(n: int) -> int:
    """How many sums ``n`` words have."""
    return triton.cdiv(n, BLOCK * STEPS)
