"""Rows of the embedding table."""

import triton
import triton.language as tl

from .pdl import launch, take_turn

BLOCK = 1024


@triton.jit
def embed_kernel(token_ptr, table_ptr, out_ptr, hidden, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < hidden
    take_turn(PDL)
    token = tl.load(token_ptr + row).to(tl.int64)
    value = tl.load(table_ptr + token * hidden + lane, mask=inside)
    tl.store(out_ptr + row * hidden + lane, value, mask=inside)


def embed(token, table, out):
    """``out[r] = table[token[r]]``.

    Contract:
        token: int32 ``[num_rows]``, each within ``[0, vocab_size)``: the kernel does not check.
        table: ``[vocab_size, hidden]`` of any dtype, contiguous; 64-bit row offsets.
        out: ``[num_rows, hidden]`` of the same dtype, contiguous, MUTATED whole.
        No rows: no launch. A copy: no rounding, deterministic, row-invariant, graph-safe.
        Moves ``2 * num_rows * hidden`` elements.
    """
    num_rows, hidden = out.shape
    if not num_rows:
        return
    grid = (num_rows, triton.cdiv(hidden, BLOCK))
    launch(embed_kernel, grid, out.device, token, table, out, hidden, BLOCK=BLOCK, num_warps=4)
