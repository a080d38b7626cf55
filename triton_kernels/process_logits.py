"""Turns a row of logits into scores of its tokens: penalties, bias, temperature, top-k, top-p, min-p, noise.

Every filter keeps "all tokens at or above a cut", so a row's filters are one number: filter_cut.py.
"""

import torch
import triton
import triton.language as tl

from . import pdl
from .filter_cut import find_cuts, place_of
from .pdl import take_turn

BLOCK = 4096  # tokens of one tile
SCORE_TILE = 128  # tokens of one partial maximum


@triton.jit(do_not_specialize=["num_rows_ar"])
def _scale_kernel(
    logits_ptr, tile_top_ptr, rows_ptr, seq_ptr, position_ptr, token_ptr, seqlens_ptr, temperature_ptr, penalties_ptr,
    counts_ptr, bias_ids_ptr, bias_values_ptr, stop_ids_ptr, min_position_ptr, num_rows_ar, vocab, num_tiles, max_bias,
    max_stop, HAS_EDITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Edit and scale the logits in place, and write each tile's maximum."""
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    token = tile * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    y = tl.load(logits_ptr + row * vocab + token, mask=inside, other=float("-inf"))
    slot, position = place_of(rows_ptr, seq_ptr, position_ptr, row)
    y = tl.where(y == y, y, float("-inf"))
    if HAS_EDITS:
        r = tl.load(rows_ptr + row)
        count = tl.load(counts_ptr + slot * vocab + token, mask=inside, other=0)
        drafts = tl.where(r < num_rows_ar, position - tl.load(seqlens_ptr + slot), 0)
        for j in range(drafts):  # this row's token and those of the rows before it
            count = tl.where(token == tl.load(token_ptr + r - j), tl.maximum(count, 0) + 1, count)
        repetition = tl.load(penalties_ptr + slot * 3)
        presence = tl.load(penalties_ptr + slot * 3 + 1)
        frequency = tl.load(penalties_ptr + slot * 3 + 2)
        punished = tl.where(y > 0, tl.div_rn(y, repetition), y * repetition)
        y = tl.where(count != 0, punished, y)
        y = tl.where(count > 0, y - (presence + frequency * count.to(tl.float32)), y)
        for j in range(max_bias):
            biased = tl.load(bias_ids_ptr + slot * max_bias + j)
            if (biased >= tile * BLOCK) & (biased < (tile + 1) * BLOCK):
                y = tl.where(token == biased, y + tl.load(bias_values_ptr + slot * max_bias + j), y)
        if position + 1 < tl.load(min_position_ptr + slot):
            for j in range(max_stop):
                y = tl.where(token == tl.load(stop_ids_ptr + slot * max_stop + j), float("-inf"), y)
    temperature = tl.load(temperature_ptr + slot)
    y = tl.div_rn(y, tl.where(temperature > 0, temperature, 1.0))
    y = tl.minimum(y, 3.4028234663852886e38)
    tl.store(logits_ptr + row * vocab + token, y, mask=inside)
    tl.store(tile_top_ptr + row * num_tiles + tile, tl.max(y, 0))


@triton.jit(do_not_specialize=["purpose"])
def _draw_kernel(
    y_ptr, cut_ptr, rows_ptr, seq_ptr, position_ptr, temperature_ptr, seed_ptr, value_ptr, id_ptr, purpose, vocab,
    num_scores, SCORE_TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Best score of every SCORE_TILE tokens and its lowest token: of kept logits plus noise, or if greedy of all
    logits.
    """
    SCORES: tl.constexpr = BLOCK // SCORE_TILE
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    token = tile * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(y_ptr + row * vocab + token, mask=token < vocab, other=float("-inf"))
    cut = tl.load(cut_ptr + row)
    slot, position = place_of(rows_ptr, seq_ptr, position_ptr, row)
    sampled = tl.load(temperature_ptr + slot) > 0
    if sampled:
        score = tl.where(score >= cut, score, float("-inf"))
        if (tl.max(score, 0) > float("-inf")) & (position >= 0):  # noise is expensive, and most tiles keep nothing
            quad = (tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
            zero = quad * 0
            chosen = zero + (position + 1).to(tl.uint32)
            w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr + slot), quad, chosen, zero + purpose, zero)
            word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
            u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
            # -ln(1 - u), with full relative precision near 0 too.
            series = u * (1 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
            score -= tl.log(tl.where(u < 0.0078125, series, -tl.log(1 - u)))
    score = tl.reshape(tl.where(position >= 0, score, 0.0), (SCORES, SCORE_TILE))
    best = tl.max(score, 1)
    first = tl.min(tl.where(score == best[:, None], tl.reshape(token, (SCORES, SCORE_TILE)), 0x7FFFFFFF), 1)
    at = tile * SCORES + tl.arange(0, SCORES)
    tl.store(value_ptr + row * num_scores + at, best, mask=at < num_scores)
    tl.store(id_ptr + row * num_scores + at, first, mask=at < num_scores)


@triton.jit
def _log_probs_kernel(
    y_ptr, cut_ptr, top_ptr, total_ptr, rows_ptr, seq_ptr, position_ptr, temperature_ptr, value_ptr, id_ptr,
    log_probs_ptr, vocab, num_scores, SCORES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot, _position = place_of(rows_ptr, seq_ptr, position_ptr, row)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    y = tl.load(y_ptr + row * vocab + token, mask=inside, other=float("-inf"))
    top = tl.load(top_ptr + row)
    if (tl.load(temperature_ptr + slot) > 0) & (top > float("-inf")):
        log_prob = tl.where(y >= tl.load(cut_ptr + row), y - top - tl.log(tl.load(total_ptr + row)), float("-inf"))
    else:
        at = tl.arange(0, SCORES)
        best = tl.load(value_ptr + row * num_scores + at, mask=at < num_scores, other=float("-inf"))
        index = tl.load(id_ptr + row * num_scores + at, mask=at < num_scores, other=0x7FFFFFFF)
        choice = tl.min(tl.where(best == tl.max(best, 0), index, 0x7FFFFFFF), 0)
        log_prob = tl.where(token == choice, 0.0, float("-inf"))
    tl.store(log_probs_ptr + row * vocab + token, log_prob, mask=inside)


def process_logits(logits, rows, logit_rows, sampling, cache_seqlens, purpose, partials, *, log_probs=None):
    """Scores of which the largest is a row's choice; :func:`orthrus_rt.ops.process_logits` defines them step by step.

    Contract:
        logits: fp32 ``[n, vocab]``, contiguous, MUTATED whole: edited and scaled.
        rows: a row plan (``token``, ``position``, ``seq`` int32 on the device); logit_rows: int32 ``[n]``, within it.
        sampling: per slot ``[num_slots]``, temperature, top_p and min_p fp32, top_k int32, seed int64; its edits, if
            any, as :class:`orthrus_rt.state.SlotEdits` has them. cache_seqlens: int32 ``[num_slots]``. Not mutated.
        partials: fp32 and int32 ``[n, ceil(vocab / 128)]``, contiguous, MUTATED whole.
        log_probs: fp32 ``[n, vocab]``, MUTATED whole; or None.
        No rows: no launch. All fp32, nothing is rounded; division is IEEE; exp and log may differ in the last bits from
        other implementations, the uniforms do not. Probability is summed as integers, exact in any order, and a program
        works on one row: deterministic, row-invariant. Five launches, graph-safe; the workspace, some 70 KB a row, is
        from torch's allocator. Reads the logits twice and writes them once; with top-k or top-p 2 more reads, an exp a
        token, and reads of the few candidates, or of all tokens if there are more than filter_cut.MOST_FOUND
        candidates. Without edits some 5 FLOPs a token; two logs and Philox for all 4,096 tokens of a tile that has a
        kept one. (log_probs: one launch and two reads more.)
        Method: Philox (Salmon, Moraes, Dror, Shaw 2011) for noise that depends on (seed, position, purpose, token)
        alone; Gumbel-max for the draw.
    """
    num_rows, vocab = logits.shape
    if not num_rows:
        return
    num_tiles = triton.cdiv(vocab, BLOCK)
    device = logits.device
    tile_top = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=device)
    value, index = partials
    num_scores = value.shape[1]
    place = (logit_rows, rows.seq, rows.position)
    edits = sampling.edits
    edited = (None,) * 6
    if edits is not None:
        edited = (
            edits.penalties, edits.token_counts, edits.bias_ids, edits.bias_values, edits.stop_ids, edits.min_position,
        )  # fmt: skip

    def launch(kernel, grid, *args, **options):
        pdl.launch(kernel, grid, device, *args, num_warps=8, **options)

    launch(
        _scale_kernel, (num_rows, num_tiles),
        logits, tile_top, *place, rows.token, cache_seqlens, sampling.temperature, *edited, rows.num_rows_ar, vocab,
        num_tiles, edits.bias_ids.shape[1] if edits else 0, edits.stop_ids.shape[1] if edits else 0,
        HAS_EDITS=edits is not None, BLOCK=BLOCK,
    )  # fmt: skip
    cut, top, total = find_cuts(launch, logits, tile_top, place, sampling, BLOCK, with_total=log_probs is not None)
    launch(
        _draw_kernel, (num_rows, num_tiles),
        logits, cut, *place, sampling.temperature, sampling.seed, value, index, purpose, vocab, num_scores,
        SCORE_TILE=SCORE_TILE, BLOCK=BLOCK,
    )  # fmt: skip
    if log_probs is not None:
        launch(
            _log_probs_kernel, (num_rows, num_tiles),
            logits, cut, top, total, *place, sampling.temperature, value, index, log_probs, vocab, num_scores,
            SCORES=triton.next_power_of_2(num_scores), BLOCK=BLOCK,
        )  # fmt: skip
