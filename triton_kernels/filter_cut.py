"""Finds the cut of a row's filters: top-k, top-p and min-p all keep the tokens at or above some value.

It is found without a sort. A census counts the tokens above a few rungs, the tokens above the right rung are gathered
if they are few, and bisection does the rest. Probability is summed as integers (trunc(exp(y - max) * 2**40)), which is
exact in any order, so the cut cannot depend on how the row is split.
"""

import torch
import triton
import triton.language as tl

from .pdl import take_turn

SWEEP = 1024  # values that the search of one row takes at a time
MOST_FOUND = 16384  # most values gathered per row: if more reach its rung, the search sweeps the whole row
RUNGS = 8
MASS_ONE = tl.constexpr(1 << 40)
# Rung i lies RUNG * (i + 1)**2 below the row's maximum; exact in fp32, so every kernel uses the same number.
RUNG = tl.constexpr(0.4375)
# The last rung. exp(-REACH) * 2**40 < 1: tokens further below the maximum have no mass.
REACH = tl.constexpr(28.0)


@triton.jit
def _order(bits):
    """fp32 bits to an int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def place_of(rows_ptr, seq_ptr, position_ptr, i):
    """Slot and position (-1: invalid) of the pass row that row ``i`` of the logits belongs to."""
    r = tl.load(rows_ptr + i)
    return tl.load(seq_ptr + r).to(tl.int64), tl.load(position_ptr + r)


@triton.jit
def _mass(y, top, kept):
    return tl.where(kept, (tl.exp(tl.where(kept, y - top, 0.0)) * MASS_ONE).to(tl.int64), 0)


@triton.jit
def _active(temperature_ptr, top_k_ptr, top_p_ptr, slot, position, top, vocab):
    """Whether a search is needed: the row is valid and samples, and top-k or top-p cuts something."""
    top_k = tl.load(top_k_ptr + slot)
    cuts = ((top_k > 0) & (top_k < vocab)) | (tl.load(top_p_ptr + slot) < 1)
    return cuts & (position >= 0) & (tl.load(temperature_ptr + slot) > 0) & (top > float("-inf"))


@triton.jit
def _row_top(tile_top_ptr, row, num_tiles, TILES: tl.constexpr):
    tile = tl.arange(0, TILES)
    return tl.max(tl.load(tile_top_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf")), 0)


@triton.jit
def _census_kernel(
    y_ptr, tile_top_ptr, rows_ptr, seq_ptr, position_ptr, temperature_ptr, top_k_ptr, top_p_ptr, count_ptr, mass_ptr,
    vocab, num_tiles, TILES: tl.constexpr, RUNGS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Per tile, how many tokens reach each rung below the row's maximum, and their mass."""
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    top = _row_top(tile_top_ptr, row, num_tiles, TILES)
    slot, position = place_of(rows_ptr, seq_ptr, position_ptr, row)
    if _active(temperature_ptr, top_k_ptr, top_p_ptr, slot, position, top, vocab):
        token = tile * BLOCK + tl.arange(0, BLOCK)
        inside = token < vocab
        y = tl.load(y_ptr + row * vocab + token, mask=inside, other=float("-inf"))
        mass = _mass(y, top, inside)  # the same for every rung, as no value is above the maximum
        tile_top = tl.load(tile_top_ptr + row * num_tiles + tile)
        for rung in tl.static_range(RUNGS):
            at = (row * num_tiles + tile) * RUNGS + rung
            if tile_top >= top - RUNG * ((rung + 1) * (rung + 1)):  # most tiles do not reach the first rungs
                kept = y >= top - RUNG * ((rung + 1) * (rung + 1))
                tl.store(count_ptr + at, tl.sum(kept.to(tl.int32), 0))
                tl.store(mass_ptr + at, tl.sum(tl.where(kept, mass, 0), 0))
            else:
                tl.store(count_ptr + at, 0)
                tl.store(mass_ptr + at, 0)


@triton.jit
def _sweep(y_ptr, length, top, cut, BLOCK: tl.constexpr):
    """How many values reach ``cut``, and their mass."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.int64)
    for at in range(0, length, BLOCK):
        index = at + tl.arange(0, BLOCK)
        inside = index < length
        y = tl.load(y_ptr + index, mask=inside, other=0.0)
        kept = inside & (y >= cut)
        count += kept.to(tl.int32)
        mass += _mass(y, top, kept)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _bracket(
    count_ptr, mass_ptr, row, top_k, top_p, vocab, num_tiles, before_tile, TILES: tl.constexpr, RUNGS: tl.constexpr
):
    """The first rung that reaches the row's top-k count, or else its top-p mass; RUNGS if none does.

    Returns (rung, tokens that reach it, those of them before ``before_tile``, tokens that reach the rung above, target)
    with the target in tokens or mass.
    """
    rung = tl.arange(0, RUNGS)
    tile = tl.arange(0, TILES)[:, None]
    at = (row * num_tiles + tile) * RUNGS + rung[None, :]
    counts = tl.load(count_ptr + at, mask=tile < num_tiles, other=0)
    masses = tl.sum(tl.load(mass_ptr + at, mask=tile < num_tiles, other=0), 0)
    earlier = tl.sum(tl.where(tile < before_tile, counts, 0), 0)
    counts = tl.sum(counts, 0)
    if (top_k > 0) & (top_k < vocab):
        target = top_k.to(tl.int64)
        reached = counts >= top_k
    else:
        target = _share(top_p, tl.max(masses, 0))
        reached = masses >= target
    first = tl.min(tl.where(reached, rung, RUNGS), 0)
    count = tl.sum(tl.where(rung == first, counts, 0), 0)
    earlier = tl.sum(tl.where(rung == first, earlier, 0), 0)
    above = tl.sum(tl.where(rung == first - 1, counts, 0), 0)
    return first, tl.where(first < RUNGS, count, vocab), earlier, above, target


@triton.jit
def _share(top_p, mass):
    return tl.maximum((top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _rung_cut(top, rung, RUNGS: tl.constexpr):
    return tl.where(rung < RUNGS, top - RUNG * ((rung + 1) * (rung + 1)), float("-inf"))


@triton.jit
def _is_gathered(rung, count, RUNGS: tl.constexpr, MOST_FOUND: tl.constexpr):
    return (rung < RUNGS) & (count <= MOST_FOUND)


@triton.jit
def _gather_kernel(
    y_ptr, tile_top_ptr, rows_ptr, seq_ptr, position_ptr, temperature_ptr, top_k_ptr, top_p_ptr, count_ptr, mass_ptr,
    found_ptr, vocab, num_tiles, MOST_FOUND: tl.constexpr, TILES: tl.constexpr, RUNGS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gather the values that reach the row's rung, if they are few."""
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    top = _row_top(tile_top_ptr, row, num_tiles, TILES)
    slot, position = place_of(rows_ptr, seq_ptr, position_ptr, row)
    if _active(temperature_ptr, top_k_ptr, top_p_ptr, slot, position, top, vocab):
        top_k = tl.load(top_k_ptr + slot)
        top_p = tl.load(top_p_ptr + slot)
        first, count, base, _, _ = _bracket(
            count_ptr, mass_ptr, row, top_k, top_p, vocab, num_tiles, tile, TILES, RUNGS
        )
        if _is_gathered(first, count, RUNGS, MOST_FOUND):
            token = tile * BLOCK + tl.arange(0, BLOCK)
            inside = token < vocab
            y = tl.load(y_ptr + row * vocab + token, mask=inside, other=0.0)
            kept = (inside & (y >= _rung_cut(top, first, RUNGS))).to(tl.int32)
            tl.store(found_ptr + row * MOST_FOUND + base + tl.cumsum(kept, 0) - 1, y, mask=kept != 0)


@triton.jit
def _bisect(y_ptr, length, top, low, high, count_low, count_high, target, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """A cut for which {y >= cut} is the smallest such set whose count (or mass) is at least ``target``.

    ``low`` reaches the target with count_low values, ``high`` misses it with count_high. Halving the ordered bits of
    fp32 ends within 32 steps for any values, as soon as only one value or its ties are left between the two.
    """
    below = _order(low.to(tl.int32, bitcast=True)).to(tl.int64)
    above = _order(high.to(tl.int32, bitcast=True)).to(tl.int64)
    while (count_low - count_high > 1) & (above - below > 1):
        between = (below + above) >> 1
        middle = _order(between.to(tl.int32)).to(tl.float32, bitcast=True)
        count, mass = _sweep(y_ptr, length, top, middle, BLOCK)
        enough = (mass if BY_MASS else count.to(tl.int64)) >= target
        below, count_low = tl.where(enough, between, below), tl.where(enough, count, count_low)
        above, count_high = tl.where(enough, above, between), tl.where(enough, count_high, count)
    return _order(below.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _cut_kernel(
    y_ptr, tile_top_ptr, rows_ptr, seq_ptr, position_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, count_ptr,
    mass_ptr, found_ptr, cut_ptr, top_ptr, total_ptr, vocab, num_tiles,
    MOST_FOUND: tl.constexpr, WITH_TOTAL: tl.constexpr, TILES: tl.constexpr, RUNGS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The row's maximum, its cut (the maximum itself if greedy) and, if requested, the mass that is kept."""
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot, position = place_of(rows_ptr, seq_ptr, position_ptr, row)
    y_ptr += row * vocab
    top = _row_top(tile_top_ptr, row, num_tiles, TILES)
    above_top = _order(_order(top.to(tl.int32, bitcast=True)) + 1).to(tl.float32, bitcast=True)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    sampled = (position >= 0) & (tl.load(temperature_ptr + slot) > 0) & (top > float("-inf"))
    cut = tl.where(sampled, float("-inf"), top)
    if _active(temperature_ptr, top_k_ptr, top_p_ptr, slot, position, top, vocab):
        by_count = (top_k > 0) & (top_k < vocab)
        first, count_low, _, count_high, target = _bracket(
            count_ptr, mass_ptr, row, top_k, top_p, vocab, num_tiles, 0, TILES, RUNGS
        )
        values_ptr, length = y_ptr, vocab
        if _is_gathered(first, count_low, RUNGS, MOST_FOUND):
            values_ptr, length = found_ptr + row * MOST_FOUND, count_low
        low = _rung_cut(top, first, RUNGS)
        high = tl.where(first > 0, _rung_cut(top, first - 1, RUNGS), above_top)
        if by_count:
            cut = _bisect(values_ptr, length, top, low, high, count_low, count_high, target, False, BLOCK)
            low = tl.maximum(cut, top - REACH)
            high = above_top
            count_high = 0
            count_low, mass = _sweep(values_ptr, length, top, low, BLOCK)
            target = _share(top_p, mass)
        if top_p < 1:
            cut = _bisect(values_ptr, length, top, low, high, count_low, count_high, target, True, BLOCK)
    if sampled:
        if min_p > 0:
            cut = tl.maximum(cut, top + tl.log(min_p))
        if WITH_TOTAL:
            _, mass = _sweep(y_ptr, vocab, top, cut, BLOCK)
            tl.store(total_ptr + row, (mass.to(tl.float64) / MASS_ONE).to(tl.float32))
    tl.store(cut_ptr + row, cut)
    tl.store(top_ptr + row, top)


def find_cuts(launch, logits, tile_top, place, sampling, block, with_total):
    """``(cut, maximum, mass that is kept)`` of each row, fp32 ``[n or more]``; the last is written only ``with_total``.
    Three launches; for the rest of the contract see process_logits.

    Args:
        launch: ``(kernel, grid, *args, **options)``.
        logits: fp32 ``[n, vocab]``, edited and scaled. tile_top: fp32 ``[n, tiles of block tokens]``, the tiles'
            maxima.
        place: of each row, as :func:`place_of` reads it.
        sampling: per slot.
    """
    num_rows, vocab = logits.shape
    num_tiles, device = tile_top.shape[1], logits.device
    tiles = triton.next_power_of_2(num_tiles)
    found = torch.empty(num_rows, MOST_FOUND, dtype=torch.float32, device=device)
    count = torch.empty(num_rows, num_tiles, RUNGS, dtype=torch.int32, device=device)
    mass = torch.empty(num_rows, num_tiles, RUNGS, dtype=torch.int64, device=device)
    # Padded, so that all three are aligned for any number of rows and one specialisation of the kernels serves all.
    cut, top, total = torch.empty(3, triton.cdiv(num_rows, 4) * 4, dtype=torch.float32, device=device)
    filters = (sampling.temperature, sampling.top_k, sampling.top_p)
    launch(
        _census_kernel, (num_rows, num_tiles),
        logits, tile_top, *place, *filters, count, mass, vocab, num_tiles,
        TILES=tiles, RUNGS=RUNGS, BLOCK=block,
    )  # fmt: skip
    launch(
        _gather_kernel, (num_rows, num_tiles),
        logits, tile_top, *place, *filters, count, mass, found, vocab, num_tiles,
        MOST_FOUND=MOST_FOUND, TILES=tiles, RUNGS=RUNGS, BLOCK=block,
    )  # fmt: skip
    # maxnreg: without it some versions of ptxas spill for an occupancy that one block per row cannot use.
    launch(
        _cut_kernel, (num_rows,),
        logits, tile_top, *place, *filters, sampling.min_p, count, mass, found, cut, top, total, vocab, num_tiles,
        MOST_FOUND=MOST_FOUND, WITH_TOTAL=with_total, TILES=tiles, RUNGS=RUNGS, BLOCK=SWEEP, maxnreg=128,
    )  # fmt: skip
    return cut, top, total
