"""Emitted tokens into the counts that penalties read."""

import triton
import triton.language as tl

from .pdl import launch, take_turn


@triton.jit
def _count_kernel(
    output_ptr, num_output_ptr, counts_ptr, num_counted_ptr, capacity, vocab, RING: tl.constexpr, PDL: tl.constexpr
):
    take_turn(PDL)
    slot = tl.program_id(0).to(tl.int64)
    total = tl.load(num_output_ptr + slot)
    first = tl.maximum(tl.load(num_counted_ptr + slot), total - capacity)
    index = first + tl.arange(0, RING)
    mine = index < total
    token = tl.load(output_ptr + slot * capacity + index % capacity, mask=mine, other=-1)
    times = tl.zeros([RING], tl.int32)
    for i in range(first, total):
        same = token == tl.load(output_ptr + slot * capacity + i % capacity)
        times += same.to(tl.int32)
        mine = mine & ((i >= index) | (same == 0))  # only a token's first lane, so that no two write the same count
    mine = mine & (token >= 0) & (token < vocab)
    at = counts_ptr + slot * vocab + token
    count = tl.load(at, mask=mine, other=0)
    tl.store(at, tl.maximum(count, 0) + times, mask=mine)
    tl.store(num_counted_ptr + slot, total)


def count_tokens(state, edits):
    """Emitted tokens into the counts that penalties read.

    Contract:
        state: ``output`` int32 ``[num_slots, capacity]``, a ring, and ``num_output`` int32 ``[num_slots]``; not
            mutated.
        edits: ``token_counts`` int32 ``[num_slots or more, vocab]`` and ``num_counted`` int32 ``[num_slots or more]``,
            MUTATED for these slots. Of more than ``capacity`` new tokens the last are counted; ids outside the
            vocabulary are not.
        No slots: nothing is launched. Integers only, one program per slot, which writes each count once: deterministic,
        graph-safe. Reads the ring's new tokens, and reads and writes a count for each of them.
    """
    capacity = state.output.shape[1]
    # One warp, so every lane has read num_counted before any writes it.
    launch(
        _count_kernel, (state.num_slots,), state.output.device,
        state.output, state.num_output, edits.token_counts, edits.num_counted, capacity, edits.token_counts.shape[1],
        RING=triton.next_power_of_2(capacity), num_warps=1,
    )  # fmt: skip
