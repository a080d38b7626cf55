"""The kernel surface: one validated signature per op, whichever implementation runs it.

Every op writes into tensors that the caller allocates and takes any number of rows (with none it does nothing). It is
deterministic and, except for ``reference``, row-invariant to the bit: a row's result depends on its own inputs only.
Shapes and rounding points are in ``csrc/include/orthrus/params.h``, the oracles in :mod:`orthrus_rt.reference`.
:mod:`orthrus_rt.dispatch` chooses the implementation, and :mod:`orthrus_rt.checks` checks the arguments.

Floating-point tensors whose dtype is not named here all have the same one: bfloat16 or float32, in ``reference`` any.
A tensor of another shape, dtype, device or layout raises ValueError, which names op, argument, expected and got. If an
implementation that ORTHRUS_BACKEND requests is missing, RuntimeError is raised. The caller keeps ids, indices,
positions and lengths in range: out of range, any memory may be read or written.
"""

from __future__ import annotations

import functools

import torch

from orthrus_rt import dispatch, native, nvtx, reference
from orthrus_rt import state as st
from orthrus_rt.checks import (
    check_choices,
    check_edits,
    check_pages,
    check_rows,
    check_scratch,
    check_state,
    check_tensor,
    kind_of,
    require,
)
from orthrus_rt.coded_blocks import DRAFT_BITS
from orthrus_rt.cycle_plan import MAX_BLOCK_LEN
from orthrus_rt.device import device_scope
from orthrus_rt.pages import PAGE_SIZE, num_pages
from orthrus_rt.rows import Rows
from orthrus_rt.weights import PackedWeight


def _choose(op: str, device: torch.device, dtype: torch.dtype):
    """The chosen implementation's function for ``op``; it runs on ``device``, whichever device is current."""
    impl = dispatch.select(op, device, dtype)
    if impl == "reference":
        return getattr(reference, op)
    if impl == "triton":
        return functools.partial(_launch_on, device, getattr(dispatch.triton_module(op), op))
    return getattr(native, op)


def _launch_on(device: torch.device, kernel, *args, **kwargs) -> None:
    with device_scope(device):
        kernel(*args, **kwargs)


@nvtx.ranged("embed")
def embed(token: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """``out[r] = table[token[r]]``.

    Args:
        token: int32 ``[num_rows]``, ids within the vocabulary (the engine checks prompts).
        table: ``[vocab_size, hidden]``.
        out: ``[num_rows, hidden]``, MUTATED.
    """
    op, (dtype, device) = "embed", kind_of("embed", "table", table)
    check_tensor(op, "token", token, (None,), torch.int32, device)
    check_tensor(op, "table", table, (None, None), dtype, device)
    check_tensor(op, "out", out, (token.shape[0], table.shape[1]), dtype, device)
    if token.shape[0]:
        _choose(op, device, dtype)(token, table, out)


@nvtx.ranged("rms_norm")
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, row_index=None) -> None:
    """``out = round(x * rsqrt(mean(x^2) + eps) * weight)``, fp32 inside, one rounding.

    Args:
        x: ``[num_rows_in, hidden]``.
        eps: added to the mean square.
        weight: fp32 ``[hidden]``. Triton's kernel may read it before earlier work of the stream is done: an ordinary
            kernel, a copy or a synchronisation must lie between writing it and the first of this project's kernels.
        out: ``[num_rows, hidden]``, MUTATED.
        row_index: int32 ``[num_rows]``, the row of ``x`` for each output row; None for all rows in order.
    """
    op, (dtype, device) = "rms_norm", kind_of("rms_norm", "x", x)
    check_tensor(op, "x", x, (None, None), dtype, device)
    check_tensor(op, "weight", weight, (x.shape[1],), torch.float32, device)
    if row_index is not None:
        check_tensor(op, "row_index", row_index, (None,), torch.int32, device)
    num_rows = (x if row_index is None else row_index).shape[0]
    check_tensor(op, "out", out, (num_rows, x.shape[1]), dtype, device)
    if num_rows:
        _choose(op, device, dtype)(x, weight, eps, out, row_index)


@nvtx.ranged("row_linear")
def row_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    out,
    *,
    weight_diff: PackedWeight | None = None,
    num_rows_ar: int | None = None,
    residual: torch.Tensor | None = None,
    epilogue: str = "none",
    workspace: torch.Tensor | None = None,
    next_weight: PackedWeight | None = None,
    exact: bool = True,
) -> None:
    """``y[r] = x[r] @ W(r)^T`` with fp32 accumulation, then one epilogue; both views' rows in one launch.

    Args:
        x: ``[num_rows, in_features]``.
        weight: W of rows ``[0, num_rows_ar)``; of all rows if ``weight_diff`` is None.
        weight_diff: W of the other rows, which are the diffusion view's; of the same layout as ``weight``, on CUDA
            coded if that is. See :func:`orthrus_rt.weights.pack_views`.
        num_rows_ar: the number of AR rows, which come first; required with ``weight_diff``.
        epilogue: ``none``, ``residual``, ``silu_mul``, ``logits`` or ``argmax``.
        out: MUTATED. ``none`` and ``residual``: ``[num_rows, out_features]``. ``silu_mul``:
            ``[num_rows, out_features / 2]``. ``logits``: like ``none``, but fp32 and never rounded.
            ``argmax``: a pair ``(value fp32, id int32)``, each ``[num_rows, weight.num_partials]``, the maximum and its
            lowest id per vocabulary tile.
        residual: ``[num_rows, out_features]``, added before rounding; may be ``out``. (``out`` must not be ``x``.)
        workspace: uint8, of :func:`orthrus_rt.native.row_linear_workspace_bytes`, zeroed once; CUDA only.
        next_weight: the weight of the next ``row_linear``, unless its epilogue is logits or argmax: a prefetch hint. On
            Hopper, if the rows fit one tile, its beginning is fetched into L2 while this call ends, or before it
            begins if its own steps are few. No result depends on it.
        exact: False lets an implementation do without the last four mantissa bits of bfloat16 weights, if it then reads
            less: for drafts, which need no exact weights. The CPU's and CUDA's do so where weights are coded in 12
            bits; csrc/cpu/coded_weight.h and csrc/cuda/coded_block.cuh say what stands for these bits. True refuses a
            ``weight`` in 8 bits, which lacks them, though not such a ``weight_diff``.
    """
    op, (dtype, device) = "row_linear", kind_of("row_linear", "x", x)
    if not isinstance(weight, PackedWeight):
        got = type(weight).__name__
        raise ValueError(f"{op}: weight must be a PackedWeight (orthrus_rt.weights.pack), got {got}")
    check_tensor(op, "x", x, (None, weight.in_features), dtype, device)
    n = x.shape[0]
    if epilogue not in native.EPILOGUE:
        raise ValueError(f"{op}: epilogue must be one of {', '.join(native.EPILOGUE)}, got {epilogue!r}")
    require(op, "weight.data.dtype", dtype, weight.data.dtype)
    require(op, "weight.data.device", device, weight.data.device)
    if weight.impl not in ("reference", device.type):
        require(op, "weight.impl", dispatch.select(op, device, dtype), weight.impl)
    require(op, "weight.gate_up", epilogue == "silu_mul", weight.gate_up)
    if exact and weight.bits == DRAFT_BITS:
        raise ValueError(f"{op}: weight must have all its bits unless exact is False, got {DRAFT_BITS}, for drafts")
    if weight_diff is not None:
        facts = ("out_features", "in_features", "impl", "gate_up", *(["coded"] if weight.impl == "cuda" else []))
        require(op, "weight_diff", *({f: getattr(w, f) for f in facts} for w in (weight, weight_diff)))
        require(op, "weight_diff.data.dtype", dtype, weight_diff.data.dtype)
        require(op, "weight_diff.data.device", device, weight_diff.data.device)
        if num_rows_ar is None or not 0 <= num_rows_ar <= n:
            raise ValueError(f"{op}: num_rows_ar must be within [0, {n}] where weight_diff is given, got {num_rows_ar}")
    if epilogue == "argmax":
        check_tensor(op, "out[0]", out[0], (n, weight.num_partials), torch.float32, device)
        check_tensor(op, "out[1]", out[1], (n, weight.num_partials), torch.int32, device)
    else:
        width = weight.out_features // 2 if epilogue == "silu_mul" else weight.out_features
        check_tensor(op, "out", out, (n, width), torch.float32 if epilogue == "logits" else dtype, device)
    if (residual is not None) != (epilogue == "residual"):
        raise ValueError(f"{op}: residual must be given for the residual epilogue alone, got epilogue {epilogue!r}")
    if residual is not None:
        check_tensor(op, "residual", residual, (n, weight.out_features), dtype, device)
    if next_weight is not None:
        require(op, "next_weight.impl", weight.impl, next_weight.impl)
        require(op, "next_weight.data.dtype", dtype, next_weight.data.dtype)
        require(op, "next_weight.data.device", device, next_weight.data.device)
    if workspace is not None:
        check_tensor(op, "workspace", workspace, (None,), torch.uint8, device)
    if not n:
        return
    kwargs = dict(num_rows_ar=num_rows_ar, residual=residual, epilogue=epilogue)
    if weight.impl == "reference":
        reference.row_linear(x, weight.data, out, weight_diff=weight_diff and weight_diff.data, **kwargs)
    else:
        native.row_linear(
            x, weight, out, weight_diff=weight_diff, workspace=workspace, next_weight=next_weight, exact=exact, **kwargs
        )


@nvtx.ranged("qkv_commit")
def qkv_commit(
    qkv: torch.Tensor,
    rows: Rows,
    cos_sin: torch.Tensor,
    norms: tuple | None,
    eps: float,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    scratch_k: torch.Tensor | None,
    scratch_v: torch.Tensor | None,
    q_out: torch.Tensor,
) -> None:
    """QK RMSNorm (Qwen3), half-split RoPE and the in-place cache write; fp32 inside, one rounding. A V element that is
    not finite is written as 0, and as NaN in the same place of K: that spoils the rows that see the key, and no others.

    Args:
        qkv: ``[num_rows, (num_heads_q + 2 * num_heads_kv) * head_dim]``, q then k then v heads.
        cos_sin: fp32 ``[max_positions, head_dim]``, cosines of the half dims, then sines.
        rows: the rows of the pass, as many as ``qkv`` has.
        eps: added to the mean square in the norms.
        norms: None, or fp32 ``(q_norm, k_norm, q_norm_diff, k_norm_diff)``, each ``[head_dim]``; CUDA's kernel may read
            them early, as Triton's does the weight of :func:`rms_norm`.
        k_pages, v_pages: ``[num_pages, num_heads_kv, 64, head_dim]``; MUTATED at the AR rows' positions. Invalid
            rows write nothing, or, in the reference, to page 0.
        page_table: int32 ``[num_slots, max_pages]``, the page numbers of every slot in order of position.
        scratch_k, scratch_v: ``[num_rows_diff, num_heads_kv, head_dim]``, all MUTATED; None without diffusion rows.
        q_out: ``[num_rows, num_heads_q, head_dim]``, MUTATED.
    """
    op, (dtype, device) = "qkv_commit", kind_of("qkv_commit", "qkv", qkv)
    check_rows(op, rows, device)
    check_tensor(op, "q_out", q_out, (rows.num_rows, None, None), dtype, device)
    n, num_heads_q, head_dim = q_out.shape
    check_pages(op, k_pages, v_pages, page_table, head_dim, dtype, device)
    num_heads_kv = k_pages.shape[1]
    check_tensor(op, "qkv", qkv, (n, (num_heads_q + 2 * num_heads_kv) * head_dim), dtype, device)
    check_tensor(op, "cos_sin", cos_sin, (None, head_dim), torch.float32, device)
    for name, norm in zip(("q_norm", "k_norm", "q_norm_diff", "k_norm_diff"), norms or (), strict=norms is not None):
        check_tensor(op, name, norm, (head_dim,), torch.float32, device)
    check_scratch(op, scratch_k, scratch_v, rows, num_heads_kv, head_dim, dtype, device)
    if n:
        args = (qkv, rows, cos_sin, norms, eps, k_pages, v_pages, page_table, scratch_k, scratch_v, q_out)
        _choose(op, device, dtype)(*args)


@nvtx.ranged("dual_attn")
def dual_attn(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    scratch_k: torch.Tensor | None,
    scratch_v: torch.Tensor | None,
    rows: Rows,
    softmax_scale: float,
    out: torch.Tensor,
    *,
    max_seq_len: int,
    workspace: torch.Tensor | None = None,
) -> None:
    """Attention of every row over ``kv < prefix_len[row] or same block``; rows that see nothing get zeros.

    Args:
        q: ``[num_rows, num_heads_q, head_dim]``.
        k_pages, v_pages, page_table: the paged cache, as in :func:`qkv_commit`; entries that no row sees are not used.
        scratch_k, scratch_v: the diffusion rows' own keys and values, as :func:`qkv_commit` leaves them; None without
            diffusion rows.
        rows: the rows of the pass, as many as ``q`` has.
        softmax_scale: factor of the scores before the softmax, usually ``head_dim ** -0.5``.
        out: like ``q``, MUTATED.
        max_seq_len: the upper bound of ``prefix_len``.
        workspace: uint8, of :func:`orthrus_rt.native.dual_attn_workspace_bytes`; CUDA only.
    """
    op, (dtype, device) = "dual_attn", kind_of("dual_attn", "q", q)
    check_rows(op, rows, device)
    check_tensor(op, "q", q, (rows.num_rows, None, None), dtype, device)
    n, num_heads_q, head_dim = q.shape
    check_pages(op, k_pages, v_pages, page_table, head_dim, dtype, device)
    num_heads_kv = k_pages.shape[1]
    if num_heads_q % num_heads_kv:
        raise ValueError(f"{op}: num_heads_q must be a multiple of num_heads_kv ({num_heads_kv}), got {num_heads_q}")
    if page_table.shape[1] * PAGE_SIZE < max_seq_len:
        raise ValueError(
            f"{op}: page_table.shape[1] must be >= {num_pages(max_seq_len)} "
            f"(max_seq_len {max_seq_len} / page_size {PAGE_SIZE}), got {page_table.shape[1]}"
        )
    check_scratch(op, scratch_k, scratch_v, rows, num_heads_kv, head_dim, dtype, device)
    check_tensor(op, "out", out, (n, num_heads_q, head_dim), dtype, device)
    if workspace is not None:
        check_tensor(op, "workspace", workspace, (None,), torch.uint8, device)
    if not n:
        return
    args = (q, k_pages, v_pages, page_table, scratch_k, scratch_v, rows, softmax_scale, out)
    run = _choose(op, device, dtype)
    if run is native.dual_attn:
        run(*args, max_seq_len=max_seq_len, workspace=workspace)
    else:
        run(*args)


@nvtx.ranged("consensus")
def consensus(
    state: st.SlotState,
    partials: tuple[torch.Tensor, torch.Tensor] | tuple[None, None],
    step: int,
    next_pass: int,
    rows_next: Rows | None,
    mask_token_id: int,
    block_len: int,
    fan_out: int = 0,
) -> None:
    """Apply a pass's choices to the slots' state and stage the next pass's rows; one launch.

    In a running slot, a row's choice is the id of its largest partial maximum, the lowest one on ties. NaN counts as
    -inf, and a row with nothing else has no choice (as a draft it gives its first id, since any id may be drafted).
    ``STEP_DRAFT``: the choices of rows 0 ... m-1 become the drafts d1 ... dm, m = min(rows, limit - 1 - cache_seqlens).
    ``STEP_VERIFY``: with a = length of the longest prefix of drafts equal to the choices, choices 0 ... a are emitted,
    cut after the first stop id and at ``limit`` tokens. ``cache_seqlens`` grows by their number (that is the commit),
    the last one becomes the known next token, and ``num_accepted`` counts the drafts among them. A row without a choice
    accepts and emits nothing: the slot finishes with NO_CHOICE and the tokens that the rows before it emit.
    ``STEP_VERIFY_AND_DRAFT``: the same with the first ``block_len`` choices of a slot. Then the choices of the block
    whose hypothesis came true become the drafts, with their runners-up and probabilities
    (csrc/include/orthrus/hypotheses.h); if none did, the drafts behind the rejected one do.
    ``STEP_STAGE``: no choices; drafts that the next pass cannot verify are dropped.
    Rows of the next pass whose position reaches ``limit``, and all rows of slots that do not run, are staged invalid.

    Args:
        state: MUTATED.
        partials: ``(value fp32, id int32)``, each ``[num_slots * rows_per_slot, num_partials]``, slot by slot;
            ``(None, None)`` for STEP_STAGE.
        step: one of STEP_* in :mod:`orthrus_rt.state`.
        next_pass: one of NEXT_* there.
        rows_next: rows of the next pass, slot by slot (NEXT_ONE_PASS: first every slot's ``block_len`` AR rows, then
            every slot's ``fan_out`` blocks); all but ``group_start`` MUTATED. None for NEXT_NONE.
        mask_token_id: token of a block's draft rows after the first.
        block_len: K of this cycle, at most ``state.max_block_len``.
        fan_out: blocks per slot of NEXT_ONE_PASS and STEP_VERIFY_AND_DRAFT, at most ``state.max_fan_out``.
    """
    op, (_, device) = "consensus", kind_of("consensus", "state.finish", state.finish)
    check_state(op, state, device)
    slots, most = state.num_slots, min(state.max_block_len, MAX_BLOCK_LEN)
    if not 1 <= block_len <= most:
        raise ValueError(f"{op}: block_len must be within [1, {most}], got {block_len}")
    if not 0 <= fan_out <= state.max_fan_out:
        raise ValueError(f"{op}: fan_out must be within [0, {state.max_fan_out}] (the state's), got {fan_out}")
    check_choices(op, partials, step, slots, block_len, fan_out, device)
    staged = {
        st.NEXT_NONE: 0, st.NEXT_DRAFT: block_len, st.NEXT_VERIFY: block_len, st.NEXT_AR: 1,
        st.NEXT_ONE_PASS: block_len * (1 + fan_out),
    }  # fmt: skip
    if next_pass not in staged:
        raise ValueError(f"{op}: next_pass must be one of {', '.join(map(str, staged))}, got {next_pass}")
    if next_pass != st.NEXT_NONE:
        if rows_next is None:
            raise ValueError(f"{op}: rows_next must be given for every next_pass but NEXT_NONE, got None")
        check_rows(op, rows_next, device)
        require(op, "rows_next.num_rows", slots * staged[next_pass], rows_next.num_rows)
    if slots:
        run = _choose(op, device, torch.int32)
        run(state, partials, step, next_pass, rows_next, mask_token_id, block_len, fan_out)


@nvtx.ranged("process_logits")
def process_logits(
    logits: torch.Tensor,
    rows: Rows,
    logit_rows: torch.Tensor,
    sampling: st.SlotSampling,
    cache_seqlens: torch.Tensor,
    purpose: int,
    partials: tuple[torch.Tensor, torch.Tensor],
    *,
    log_probs: torch.Tensor | None = None,
) -> None:
    """Compute scores. A row's largest is its choice: a draw from its filtered distribution, or greedy the best logit.

    Row i of ``logits`` belongs to row r = ``logit_rows[i]`` of the pass, uses the parameters of its slot
    ``rows.seq[r]`` and chooses the token at ``rows.position[r] + 1``. Steps, all in fp32: NaN counts as -inf; the
    slot's edits (penalties, bias, stop mask); division by the temperature; keep the ``top_k`` largest (0: all); of
    those the shortest sorted prefix with mass >= ``top_p`` (1: all); of those the tokens at least ``min_p`` times as
    likely as the best. Values equal to the last kept one are kept too. The score of a kept token is its logit plus
    Gumbel noise, a function of (seed, position, purpose, token id) alone: see
    :func:`orthrus_rt.reference.exponential`. At temperature 0 every token's score is its edited logit. Penalties count
    what the slot has committed and, for an AR row, the drafts before the position: the tokens of its own and earlier
    rows from position ``cache_seqlens + 1`` on.

    Args:
        logits: fp32 ``[n, vocab_size]``; its contents are undefined afterwards.
        rows: the rows of the pass. A row at position -1 yields scores 0.
        logit_rows: int32 ``[n]``, indices of rows of the pass.
        sampling: the parameters of every slot.
        cache_seqlens: int32 ``[num_slots]``, read where there are penalties.
        purpose: int within [0, 2**31), part of the noise's key; choices that must not share noise have different ones.
        partials: ``(value fp32, id int32)``, each ``[n, ceil(vocab_size / 128)]``, MUTATED: per 128 tokens the largest
            score and its lowest id; -inf and the first id where none is kept. Scores that cannot be the row's largest,
            because the likeliest token's is more than 23 above the logit, may be left out.
        log_probs: None, or fp32 like ``logits``, MUTATED: log of the filtered distribution. Only tests ask for it.
    """
    op, (_, device) = "process_logits", kind_of("process_logits", "logits", logits)
    f32, i32 = torch.float32, torch.int32
    check_tensor(op, "logits", logits, (None, None), f32, device)
    n, vocab = logits.shape
    check_rows(op, rows, device)
    check_tensor(op, "logit_rows", logit_rows, (n,), i32, device)
    slots = sampling.seed.shape[0]
    dtypes = dict(temperature=f32, top_k=i32, top_p=f32, min_p=f32, seed=torch.int64)
    for name, dtype in dtypes.items():
        check_tensor(op, f"sampling.{name}", getattr(sampling, name), (slots,), dtype, device)
    if sampling.edits is not None:
        check_edits(op, sampling.edits, slots, vocab, device)
    check_tensor(op, "cache_seqlens", cache_seqlens, (slots,), i32, device)
    if not 0 <= purpose < 1 << 31:
        raise ValueError(f"{op}: purpose must be within [0, 2**31), got {purpose}")
    tiles = st.num_score_tiles(vocab)
    check_tensor(op, "partials[0]", partials[0], (n, tiles), f32, device)
    check_tensor(op, "partials[1]", partials[1], (n, tiles), i32, device)
    if log_probs is not None:
        check_tensor(op, "log_probs", log_probs, (n, vocab), f32, device)
    if n:
        run = _choose(op, device, f32)
        run(logits, rows, logit_rows, sampling, cache_seqlens, purpose, partials, log_probs=log_probs)


@nvtx.ranged("count_tokens")
def count_tokens(state: st.SlotState, edits: st.SlotEdits) -> None:
    """Count the tokens that each slot's output ring received since the last call; of more than the ring's length, the
    last ones.

    Args:
        state: ``num_output`` and ``output`` are read.
        edits: of at least as many slots; ``token_counts`` and ``num_counted`` MUTATED.
    """
    op, (_, device) = "count_tokens", kind_of("count_tokens", "state.finish", state.finish)
    check_state(op, state, device)
    check_edits(op, edits, edits.num_counted.shape[0], None, device)
    if edits.num_counted.shape[0] < state.num_slots:
        raise ValueError(f"{op}: edits must have >= {state.num_slots} slots, got {edits.num_counted.shape[0]}")
    if state.num_slots:
        _choose(op, device, torch.int32)(state, edits)


def check_head_dim(head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse, before any weight is packed, a head_dim that the chosen attention kernels do not support.

    Raises:
        ValueError: it is not supported; the message names the op and its limit.
    """
    for op in ("qkv_commit", "dual_attn"):
        if dispatch.select(op, device, dtype) in ("cpu", "cuda"):
            native.check_head_dim(op, head_dim, device.type)
