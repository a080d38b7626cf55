"""Attention under the mixed mask over paged KV: the portable implementation.

Online softmax in tiles (FlashAttention-2: Dao, arXiv 2307.08691). Weights are summed before they are rounded for their
product with the values.
"""

import math

import triton
import triton.language as tl

# Rows x query heads of one program. Constant, so that one row runs through the same dot as a thousand.
BLOCK_M = 64


@triton.jit
def _fold(q, k, v, visible, scale, top, total, acc):
    """Fold one tile of keys into the running softmax. A tile that a row does not see leaves its bits unchanged."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf: the row has seen nothing yet
    weight = tl.exp2(scores - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weight, 1)
    acc = acc * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return new_top, total, acc


@triton.jit(do_not_specialize=["num_rows_ar", "num_groups_ar"])
def dual_attn_kernel(
    q_ptr, k_ptr, v_ptr, page_table_ptr, scratch_k_ptr, scratch_v_ptr, out_ptr,
    position_ptr, seq_ptr, prefix_len_ptr, group_start_ptr,
    max_pages, num_rows_ar, num_groups_ar, num_heads_q, num_heads_kv, scale,
    HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_M // HEADS_PER_KV
    group = tl.program_id(2)
    head_kv = tl.program_id(1)
    first = tl.load(group_start_ptr + group)
    end = tl.load(group_start_ptr + group + 1)
    start = first + tl.program_id(0) * ROWS
    if start >= end:
        return

    m = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, HEAD_DIM)
    key = tl.arange(0, PAGE_SIZE)
    row = start + m // HEADS_PER_KV
    head_q = head_kv * HEADS_PER_KV + m % HEADS_PER_KV
    mine = (m < ROWS * HEADS_PER_KV) & (row < end)
    q_offset = (row.to(tl.int64) * num_heads_q + head_q) * HEAD_DIM
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=mine[:, None], other=0.0)
    prefix_len = tl.load(prefix_len_ptr + row, mask=mine, other=0)
    valid = tl.load(position_ptr + row, mask=mine, other=-1) >= 0

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    # One tile is one page, so tiles start at absolute positions whatever else the pass contains.
    longest = tl.max(prefix_len, 0)
    pages = page_table_ptr + tl.load(seq_ptr + first).to(tl.int64) * max_pages
    for tile in range(0, tl.cdiv(longest, PAGE_SIZE)):
        page = tl.load(pages + tile).to(tl.int64)
        kv = tile * PAGE_SIZE + key
        offset = ((page * num_heads_kv + head_kv) * PAGE_SIZE + key[:, None]) * HEAD_DIM + dim[None, :]
        # Entries that no row of the tile sees may hold anything, including NaN: 0 * NaN must not reach the sums.
        used = (kv < longest)[:, None]
        k = tl.load(k_ptr + offset, mask=used, other=0.0)
        v = tl.load(v_ptr + offset, mask=used, other=0.0)
        visible = kv[None, :] < prefix_len[:, None]
        top, total, acc = _fold(q, k, v, visible, scale, top, total, acc)

    if group >= num_groups_ar:
        for at in range(first, end, PAGE_SIZE):
            source = at + key
            used = tl.load(position_ptr + source, mask=source < end, other=-1) >= 0
            offset = ((source - num_rows_ar).to(tl.int64) * num_heads_kv + head_kv)[:, None] * HEAD_DIM + dim[None, :]
            k = tl.load(scratch_k_ptr + offset, mask=used[:, None], other=0.0)
            v = tl.load(scratch_v_ptr + offset, mask=used[:, None], other=0.0)
            visible = used[None, :] & valid[:, None]
            top, total, acc = _fold(q, k, v, visible, scale, top, total, acc)

    out = tl.where(total[:, None] == 0, 0.0, acc / total[:, None])  # NaN stays
    tl.store(out_ptr + q_offset[:, None] + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=mine[:, None])


def dual_attn(q, k_pages, v_pages, page_table, scratch_k, scratch_v, rows, softmax_scale, out):
    """Softmax attention of each row over ``kv < prefix_len[row]`` of its sequence, then its own block's keys.

    Contract:
        q, out: ``[num_rows, num_heads_q, head_dim]`` bf16, contiguous; out MUTATED whole. (fp32 spills.)
        k_pages, v_pages: ``[num_pages, num_heads_kv, 64, head_dim]``, contiguous, 64-bit offsets. Entries
            beyond a group's longest prefix are never read, nor are the page_table entries of such pages.
        page_table: int32 ``[num_slots, max_pages]``, contiguous.
        scratch_k, scratch_v: ``[num_rows_diff, num_heads_kv, head_dim]``, contiguous; None without diffusion rows.
        rows: a row plan (``position``, ``seq``, ``prefix_len``, ``group_start`` int32 on the device).
        head_dim is a power of two >= 16; at most 64 query heads share a KV head.
        No rows: no launch. Rows that see nothing: 0. Scores, weights' sum and output accumulate in fp32; the
        weights are rounded to V's dtype before P @ V; one rounding at the store. A row's keys come in tiles at
        absolute positions, its block's own tiles last; deterministic, row-invariant, graph-safe.
        Reads each group's KV once per 64 // (num_heads_q // num_heads_kv) rows; 4 * head_dim FLOPs a visible pair.
        Method: online softmax (Milakov & Gimelshein 2018) over tiles, as in FlashAttention (Dao et al. 2022).

    Raises:
        ValueError: a shape that the kernel cannot take.
    """
    num_heads_q, head_dim = q.shape[1:]
    num_heads_kv, page_size = k_pages.shape[1:3]
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"dual_attn: head_dim must be a power of two >= 16 for triton, got {head_dim}")
    heads_per_kv = num_heads_q // num_heads_kv
    if heads_per_kv > BLOCK_M:
        raise ValueError(f"dual_attn: num_heads_q / num_heads_kv must be <= {BLOCK_M}, got {heads_per_kv}")
    if not rows.num_rows:
        return
    if scratch_k is None:
        scratch_k = scratch_v = k_pages  # a pointer that the kernel does not follow without diffusion groups
    # maxnreg: without it some versions of ptxas spill for an occupancy that shared memory rules out anyway. num_stages:
    # with more, keys are loaded by cp.async, and before 3.7.1 (triton, pull request 10537) Triton puts no fence between
    # those loads and the wgmma that reads them.
    grid = (triton.cdiv(rows.max_group_rows, BLOCK_M // heads_per_kv), num_heads_kv, rows.num_groups)
    dual_attn_kernel[grid](
        q, k_pages, v_pages, page_table, scratch_k, scratch_v, out,
        rows.position, rows.seq, rows.prefix_len, rows.group_start,
        page_table.shape[1], rows.num_rows_ar, rows.num_groups_ar, num_heads_q, num_heads_kv,
        softmax_scale * math.log2(math.e),
        HEADS_PER_KV=heads_per_kv, HEAD_DIM=head_dim, PAGE_SIZE=page_size, BLOCK_M=BLOCK_M,
        num_warps=8, num_stages=1, maxnreg=255, enable_fp_fusion=False,
    )  # fmt: skip
