"""From a row of logits to one token: penalties, bias, temperature, top-k, top-p, min-p, noise, choice.

Every filter keeps "all tokens at or above a cut", so a row's filters are one number. It is found without a sort: a
census counts the tokens above a few rungs, those above the right rung are gathered, and bisection does the rest.
Probability is summed as integers (trunc(exp(y - max) * 2**40)): exact in any order, so the cut and the
choice cannot depend on how the row is split.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # tokens of one tile
SWEEP = 1024  # values that the search over one row takes at a time
RUNGS = 8
MASS_ONE = tl.constexpr(1 << 40)
# Rung i lies RUNG * (i + 1)**2 below the row's maximum; exact in fp32, so every kernel means the same number.
RUNG = tl.constexpr(0.4375)
# The last rung. exp(-REACH) * 2**40 < 1: tokens further below have no mass.
REACH = tl.constexpr(28.0)


@triton.jit
def _order(bits):
    """fp32 bits to an int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scale_kernel(
    logits_ptr, tile_top_ptr, temperature_ptr, position_ptr, penalties_ptr, counts_ptr, bias_ids_ptr, bias_values_ptr,
    stop_ids_ptr, min_position_ptr, stride_logits, stride_counts, vocab, num_tiles, num_bias, num_stop,
    HAS_COUNTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scaled logits in place, and each tile's maximum."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    token = tile * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    y = tl.load(logits_ptr + row * stride_logits + token, mask=inside, other=float("-inf"))
    y = tl.where(y == y, y, float("-inf"))
    if HAS_COUNTS:
        count = tl.load(counts_ptr + row * stride_counts + token, mask=inside, other=0)
        repetition = tl.load(penalties_ptr + row * 3)
        presence = tl.load(penalties_ptr + row * 3 + 1)
        frequency = tl.load(penalties_ptr + row * 3 + 2)
        punished = tl.where(y > 0, tl.div_rn(y, repetition), y * repetition)
        y = tl.where(count != 0, punished, y)
        y = tl.where(count > 0, y - (presence + frequency * count.to(tl.float32)), y)
    if HAS_BIAS:
        for i in range(num_bias):
            biased = tl.load(bias_ids_ptr + row * num_bias + i)
            y = tl.where(token == biased, y + tl.load(bias_values_ptr + row * num_bias + i), y)
    if HAS_STOP:
        early = tl.load(position_ptr + row) < tl.load(min_position_ptr + row)
        for i in range(num_stop):
            y = tl.where(early & (token == tl.load(stop_ids_ptr + row * num_stop + i)), float("-inf"), y)
    temperature = tl.load(temperature_ptr + row)
    y = tl.div_rn(y, tl.where(temperature > 0, temperature, 1.0))
    y = tl.minimum(y, 3.4028234663852886e38)
    tl.store(logits_ptr + row * stride_logits + token, y, mask=inside)
    tl.store(tile_top_ptr + row * num_tiles + tile, tl.max(y, 0))


@triton.jit
def _mass(y, top, kept):
    return tl.where(kept, (tl.exp(tl.where(kept, y - top, 0.0)) * MASS_ONE).to(tl.int64), 0)


@triton.jit
def _active(temperature_ptr, top_k_ptr, top_p_ptr, row, top, vocab):
    """Whether a search is needed: the row samples, and top-k or top-p cuts something."""
    top_k = tl.load(top_k_ptr + row)
    cuts = ((top_k > 0) & (top_k < vocab)) | (tl.load(top_p_ptr + row) < 1)
    return cuts & (tl.load(temperature_ptr + row) > 0) & (top > float("-inf"))


@triton.jit
def _row_top(tile_top_ptr, row, num_tiles, TILES: tl.constexpr):
    tile = tl.arange(0, TILES)
    return tl.max(tl.load(tile_top_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf")), 0)


@triton.jit
def _census_kernel(
    y_ptr, tile_top_ptr, temperature_ptr, top_k_ptr, top_p_ptr, count_ptr, mass_ptr, stride_logits, vocab, num_tiles,
    TILES: tl.constexpr, RUNGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per tile, how many tokens reach each rung below the row's maximum, and their mass."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    top = _row_top(tile_top_ptr, row, num_tiles, TILES)
    if _active(temperature_ptr, top_k_ptr, top_p_ptr, row, top, vocab):
        token = tile * BLOCK + tl.arange(0, BLOCK)
        inside = token < vocab
        y = tl.load(y_ptr + row * stride_logits + token, mask=inside, other=float("-inf"))
        for rung in tl.static_range(RUNGS):
            kept = y >= top - RUNG * ((rung + 1) * (rung + 1))
            at = (row * num_tiles + tile) * RUNGS + rung
            tl.store(count_ptr + at, tl.sum(kept.to(tl.int32), 0))
            tl.store(mass_ptr + at, tl.sum(_mass(y, top, kept), 0))


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
    count_ptr, mass_ptr, row, top, top_k, top_p, vocab, num_tiles, before_tile, TILES: tl.constexpr, RUNGS: tl.constexpr
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
def _gather_kernel(
    y_ptr, tile_top_ptr, temperature_ptr, top_k_ptr, top_p_ptr, count_ptr, mass_ptr, found_ptr,
    stride_logits, vocab, num_tiles, TILES: tl.constexpr, RUNGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The values that reach the row's rung, side by side."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    top = _row_top(tile_top_ptr, row, num_tiles, TILES)
    if _active(temperature_ptr, top_k_ptr, top_p_ptr, row, top, vocab):
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        first, _, base, _, _ = _bracket(
            count_ptr, mass_ptr, row, top, top_k, top_p, vocab, num_tiles, tile, TILES, RUNGS
        )
        base = tl.where(first < RUNGS, base, tile * BLOCK)
        token = tile * BLOCK + tl.arange(0, BLOCK)
        inside = token < vocab
        y = tl.load(y_ptr + row * stride_logits + token, mask=inside, other=0.0)
        kept = (inside & (y >= _rung_cut(top, first, RUNGS))).to(tl.int32)
        tl.store(found_ptr + row * vocab + base + tl.cumsum(kept, 0) - 1, y, mask=kept != 0)


@triton.jit
def _bisect(y_ptr, length, top, low, high, count_low, count_high, target, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """A cut for which {y >= cut} is the smallest such set whose count (or mass) is at least ``target``.

    ``low`` reaches the target with count_low values, ``high`` misses it with count_high. Halving the ordered bits of
    fp32 ends within 32 steps for any values, as soon as one value or one value's ties are left between the two.
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
    y_ptr, tile_top_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, count_ptr, mass_ptr, found_ptr,
    cut_ptr, top_ptr, total_ptr, stride_logits, vocab, num_tiles,
    WITH_TOTAL: tl.constexpr, TILES: tl.constexpr, RUNGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row's maximum, its cut (the maximum itself if greedy) and, if asked for, the mass that is kept."""
    row = tl.program_id(0).to(tl.int64)
    y_ptr += row * stride_logits
    found_ptr += row * vocab
    top = _row_top(tile_top_ptr, row, num_tiles, TILES)
    above_top = _order(_order(top.to(tl.int32, bitcast=True)) + 1).to(tl.float32, bitcast=True)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    sampled = (tl.load(temperature_ptr + row) > 0) & (top > float("-inf"))
    cut = tl.where(sampled, float("-inf"), top)
    if _active(temperature_ptr, top_k_ptr, top_p_ptr, row, top, vocab):
        by_count = (top_k > 0) & (top_k < vocab)
        first, length, _, count_high, target = _bracket(
            count_ptr, mass_ptr, row, top, top_k, top_p, vocab, num_tiles, 0, TILES, RUNGS
        )
        low = _rung_cut(top, first, RUNGS)
        high = tl.where(first > 0, _rung_cut(top, first - 1, RUNGS), above_top)
        count_low = length
        if by_count:
            cut = _bisect(found_ptr, length, top, low, high, count_low, count_high, target, False, BLOCK)
            low = tl.maximum(cut, top - REACH)
            high = above_top
            count_high = 0
            count_low, mass = _sweep(found_ptr, length, top, low, BLOCK)
            target = _share(top_p, mass)
        if top_p < 1:
            cut = _bisect(found_ptr, length, top, low, high, count_low, count_high, target, True, BLOCK)
    if sampled:
        if min_p > 0:
            cut = tl.maximum(cut, top + tl.log(min_p))
        if WITH_TOTAL:
            _, mass = _sweep(y_ptr, vocab, top, cut, BLOCK)
            tl.store(total_ptr + row, (mass.to(tl.float64) / MASS_ONE).to(tl.float32))
    tl.store(cut_ptr + row, cut)
    tl.store(top_ptr + row, top)


@triton.jit(do_not_specialize=["purpose"])
def _draw_kernel(
    y_ptr, cut_ptr, temperature_ptr, seed_ptr, position_ptr, best_score_ptr, best_token_ptr,
    purpose, stride_logits, vocab, num_tiles, BLOCK: tl.constexpr,
):  # fmt: skip
    """Best score and its lowest token of one tile: the kept logits plus Gumbel noise."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    token = tile * BLOCK + tl.arange(0, BLOCK)
    cut = tl.load(cut_ptr + row)
    y = tl.load(y_ptr + row * stride_logits + token, mask=token < vocab, other=float("-inf"))
    score = tl.where(y >= cut, y, float("-inf"))
    best = tl.max(score, 0)
    if (best >= cut) & (tl.load(temperature_ptr + row) > 0):  # noise is dear: most tiles keep nothing
        quad = (tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        zero = quad * 0
        position = zero + tl.load(position_ptr + row).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr + row), quad, position, zero + purpose, zero)
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
        series = u * (1 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
        noise = tl.where(u < 0.0078125, series, -tl.log(1 - u))
        score = tl.where(y >= cut, y - tl.log(noise), float("-inf"))
        best = tl.max(score, 0)
    tl.store(best_score_ptr + row * num_tiles + tile, best)
    tl.store(best_token_ptr + row * num_tiles + tile, tl.min(tl.where(score == best, token, 0x7FFFFFFF), 0))


@triton.jit
def _choose_kernel(best_score_ptr, best_token_ptr, choice_ptr, num_tiles, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    inside = tile < num_tiles
    score = tl.load(best_score_ptr + row * num_tiles + tile, mask=inside, other=float("-inf"))
    token = tl.load(best_token_ptr + row * num_tiles + tile, mask=inside, other=0x7FFFFFFF)
    tl.store(choice_ptr + row, tl.min(tl.where(score == tl.max(score, 0), token, 0x7FFFFFFF), 0))


@triton.jit
def _log_probs_kernel(
    y_ptr, cut_ptr, top_ptr, total_ptr, temperature_ptr, choice_ptr, log_probs_ptr, stride_logits, stride_log_probs,
    vocab, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    y = tl.load(y_ptr + row * stride_logits + token, mask=inside, other=float("-inf"))
    top = tl.load(top_ptr + row)
    if (tl.load(temperature_ptr + row) > 0) & (top > float("-inf")):
        value = tl.where(y >= tl.load(cut_ptr + row), y - top - tl.log(tl.load(total_ptr + row)), float("-inf"))
    else:
        value = tl.where(token == tl.load(choice_ptr + row), 0.0, float("-inf"))
    tl.store(log_probs_ptr + row * stride_log_probs + token, value, mask=inside)


def process_logits(
    logits, temperature, top_k, top_p, min_p, seed, position, purpose, choice, *, log_probs=None,
    penalties=None, token_counts=None, bias_ids=None, bias_values=None, stop_ids=None, min_position=None,
):  # fmt: skip
    """One token per row: the filtered distribution's draw, or the largest logit where ``temperature`` is 0.

    Steps, all in fp32: NaN becomes -inf; penalties; bias; stop mask; division by the temperature (IEEE); keep the
    ``top_k`` largest (0: all); of those the shortest sorted prefix with mass >= ``top_p`` (1: all); of those what
    is at least ``min_p`` times as likely as the best. Values equal to the last kept one are kept. The choice is
    the argmax over kept tokens of y - log(e), e exponential noise, ties to the lowest id; see
    ``reference.exponential`` for the generator, keyed by (seed, position, purpose, token) alone. Its uniforms are
    the same bits everywhere; exp and log may differ in the last bits between implementations.

    Contract (R rows, V tokens):
        logits: fp32 ``[R, V]``, unit stride along V, MUTATED: the scaled logits y afterwards.
        temperature, top_p, min_p: fp32 ``[R]``; top_k, position: int32 ``[R]``; seed: int64 ``[R]``.
        position: absolute position of the token that is chosen. purpose: int >= 0.
        choice: int32 ``[R]``, MUTATED. A row without any finite logit chooses id 0.
        log_probs: None or fp32 ``[R, V]``, MUTATED: log of the filtered distribution.
        penalties: None or fp32 ``[R, 3]``, repetition (> 0; divides positive and multiplies other logits of tokens
            seen), presence and frequency (subtracted for tokens generated), with
            token_counts: int32 ``[R, V]`` (row stride 0 allowed): times generated; -1: in the prompt alone.
        bias_ids, bias_values: None or int32 / fp32 ``[R, B]``, added in order; id -1 pads.
        stop_ids, min_position: None or int32 ``[R, S]`` (-1 pads) and ``[R]``: these ids cannot be chosen at
            positions below min_position.
        No rows: no launch. Deterministic, row-invariant, graph-safe (workspace comes from torch's allocator).
        Reads the row 3 times and writes it once; with top-k or top-p 2 reads more and those of the few candidates.
    """
    num_rows, vocab = logits.shape
    if not num_rows:
        return
    num_tiles = triton.cdiv(vocab, BLOCK)
    tiles = triton.next_power_of_2(num_tiles)
    device = logits.device
    tile_value = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=device)
    tile_token = torch.empty(num_rows, num_tiles, dtype=torch.int32, device=device)
    found = torch.empty(num_rows, vocab, dtype=torch.float32, device=device)
    count = torch.empty(num_rows, num_tiles, RUNGS, dtype=torch.int32, device=device)
    mass = torch.empty(num_rows, num_tiles, RUNGS, dtype=torch.int64, device=device)
    cut, top, total = torch.empty(3, num_rows, dtype=torch.float32, device=device)
    stride = logits.stride(0)
    _scale_kernel[(num_rows, num_tiles)](
        logits, tile_value, temperature, position, penalties, token_counts, bias_ids, bias_values,
        stop_ids, min_position, stride, 0 if token_counts is None else token_counts.stride(0), vocab, num_tiles,
        0 if bias_ids is None else bias_ids.shape[1], 0 if stop_ids is None else stop_ids.shape[1],
        HAS_COUNTS=penalties is not None, HAS_BIAS=bias_ids is not None, HAS_STOP=stop_ids is not None,
        BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _census_kernel[(num_rows, num_tiles)](
        logits, tile_value, temperature, top_k, top_p, count, mass, stride, vocab, num_tiles,
        TILES=tiles, RUNGS=RUNGS, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _gather_kernel[(num_rows, num_tiles)](
        logits, tile_value, temperature, top_k, top_p, count, mass, found, stride, vocab, num_tiles,
        TILES=tiles, RUNGS=RUNGS, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    # maxnreg: without it some versions of ptxas spill for an occupancy that one block a row cannot use.
    _cut_kernel[(num_rows,)](
        logits, tile_value, temperature, top_k, top_p, min_p, count, mass, found, cut, top, total,
        stride, vocab, num_tiles, WITH_TOTAL=log_probs is not None,
        TILES=tiles, RUNGS=RUNGS, BLOCK=SWEEP, num_warps=8, maxnreg=128, enable_fp_fusion=False,
    )  # fmt: skip
    _draw_kernel[(num_rows, num_tiles)](
        logits, cut, temperature, seed, position, tile_value, tile_token, purpose, stride, vocab, num_tiles,
        BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _choose_kernel[(num_rows,)](tile_value, tile_token, choice, num_tiles, TILES=tiles, num_warps=1)
    if log_probs is not None:
        _log_probs_kernel[(num_rows, num_tiles)](
            logits, cut, top, total, temperature, choice, log_probs, stride, log_probs.stride(0), vocab,
            BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
