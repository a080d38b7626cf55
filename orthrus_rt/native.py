"""Launchers of the native module, which turn tensors into parameter structs, and the workspace that they need.

Requirements common to all implementations are checked in checks.py, those of these kernels alone here.
"""

from __future__ import annotations

import torch

from orthrus_rt import dispatch
from orthrus_rt.device import device_scope
from orthrus_rt.rows import Rows
from orthrus_rt.state import SlotEdits, SlotState

EPILOGUE = {"none": 0, "residual": 1, "silu_mul": 2, "logits": 3, "argmax": 4}


def ptr(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def struct(name: str, dtype: torch.dtype):
    """The class ``name`` of the native module for weights, activations or cache of ``dtype``."""
    return getattr(dispatch.extension(), name + {torch.bfloat16: "", torch.float32: "F32"}[dtype])


def rows_struct(rows: Rows):
    return dispatch.extension().Rows(
        token=ptr(rows.token),
        position=ptr(rows.position),
        seq=ptr(rows.seq),
        prefix_len=ptr(rows.prefix_len),
        group_start=ptr(rows.group_start),
        num_rows=rows.num_rows,
        num_rows_ar=rows.num_rows_ar,
        num_groups=rows.num_groups,
        num_groups_ar=rows.num_groups_ar,
        max_group_rows=rows.max_group_rows,
        blocks_per_seq=rows.blocks_per_seq,
    )


def kv_struct(k_pages, v_pages, page_table):
    return struct("PagedKv", k_pages.dtype)(
        k_pages=ptr(k_pages),
        v_pages=ptr(v_pages),
        page_table=ptr(page_table),
        max_pages=page_table.shape[1],
        num_heads_kv=k_pages.shape[1],
        head_dim=k_pages.shape[3],
    )


def state_struct(state: SlotState):
    return dispatch.extension().SlotState(
        **{name: ptr(tensor) for name, tensor in vars(state).items()},  # both use the same names
        num_slots=state.num_slots,
        max_block_len=state.max_block_len,
        max_fan_out=state.max_fan_out,
        max_stop_ids=state.stop_ids.shape[1],
        output_capacity=state.output.shape[1],
    )


def _launch(op: str, params, device: torch.device) -> None:
    if device.type == "cuda":
        with device_scope(device):
            getattr(dispatch.extension().cuda, op)(params, torch.cuda.current_stream(device).cuda_stream)
    else:
        cpu = dispatch.extension().cpu
        cpu.set_num_threads(torch.get_num_threads())
        getattr(cpu, op)(params)


def check_head_dim(op: str, head_dim: int, device_type: str) -> None:
    """Refuse a head_dim that the native kernel of ``op`` does not support."""
    if device_type == "cuda" and head_dim not in (64, 128):
        raise ValueError(f"{op}: head_dim must be in (64, 128) on CUDA, got {head_dim}")
    if op == "qkv_commit" and head_dim % 2:
        raise ValueError(f"{op}: head_dim must be even (its halves rotate), got {head_dim}")
    if op == "dual_attn" and device_type == "cpu" and (head_dim % 16 or head_dim > 256):
        other = f"ORTHRUS_BACKEND={op}=reference takes any"
        raise ValueError(f"{op}: head_dim must be a multiple of 16 up to 256 on the CPU, got {head_dim}; {other}")


def row_linear_workspace_bytes(device: torch.device, dtype: torch.dtype, max_rows: int, shapes) -> int:
    """The most that ``row_linear`` needs, for weights of these ``(in_features, out_features)``."""
    if dtype is not torch.bfloat16 or dispatch.select("row_linear", device, dtype) != "cuda":
        return 0
    with device_scope(device):
        return max(dispatch.extension().cuda.row_linear_workspace(max_rows, k, n) for k, n in shapes)


def dual_attn_workspace_bytes(
    device: torch.device, dtype: torch.dtype, max_rows: int, num_heads_q: int, head_dim: int, max_seq_len: int
) -> int:
    """The most that ``dual_attn`` needs."""
    if dtype is not torch.bfloat16 or dispatch.select("dual_attn", device, dtype) != "cuda":
        return 0
    with device_scope(device):
        return dispatch.extension().cuda.dual_attn_workspace(max_rows, num_heads_q, head_dim, max_seq_len)


def embed(token, table, out):
    params = struct("EmbedParams", table.dtype)(
        token=ptr(token), table=ptr(table), out=ptr(out),
        num_rows=token.shape[0], hidden=table.shape[1], vocab_size=table.shape[0],
    )  # fmt: skip
    _launch("embed", params, out.device)


def rms_norm(x, weight, eps, out, row_index=None):
    params = struct("RmsNormParams", x.dtype)(
        x=ptr(x), weight=ptr(weight), row_index=ptr(row_index), out=ptr(out),
        num_rows=out.shape[0], hidden=x.shape[1], eps=eps,
    )  # fmt: skip
    _launch("rms_norm", params, out.device)


def row_linear(
    x,
    weight,
    out,
    *,
    weight_diff=None,
    num_rows_ar=None,
    residual=None,
    epilogue="none",
    workspace=None,
    next_weight=None,
    exact=True,
):
    value, index = out if epilogue == "argmax" else (None, None)
    if weight.impl == "cuda" and x.dtype is torch.bfloat16:
        with device_scope(x.device):
            need = dispatch.extension().cuda.row_linear_workspace(x.shape[0], weight.in_features, weight.out_features)
        have = 0 if workspace is None else workspace.nbytes
        if have < need:
            raise ValueError(f"row_linear: workspace must be at least {need} bytes for {x.shape[0]} rows, got {have}")
    params = struct("RowLinearParams", x.dtype)(
        x=ptr(x),
        weight=ptr(weight.data),
        weight_diff=ptr(weight_diff.data) if weight_diff is not None else 0,
        weight_bits=weight.bits,
        weight_diff_bits=weight_diff.bits if weight_diff else 0,
        leading_only=not exact,
        residual=ptr(residual),
        out=0 if epilogue == "argmax" else ptr(out),
        partial_value=ptr(value),
        partial_id=ptr(index),
        workspace=ptr(workspace),
        workspace_bytes=0 if workspace is None else workspace.nbytes,
        num_rows=x.shape[0],
        num_rows_ar=x.shape[0] if num_rows_ar is None else num_rows_ar,
        in_features=weight.in_features,
        out_features=weight.out_features,
        num_partials=weight.num_partials,
        epilogue=EPILOGUE[epilogue],
        next_weight=ptr(next_weight and next_weight.data),
        next_in_features=next_weight.in_features if next_weight else 0,
        next_out_features=next_weight.out_features if next_weight else 0,
        next_weight_bits=next_weight.bits if next_weight else 0,
    )
    _launch("row_linear", params, x.device)


def qkv_commit(qkv, rows, cos_sin, norms, eps, k_pages, v_pages, page_table, scratch_k, scratch_v, q_out):
    check_head_dim("qkv_commit", q_out.shape[2], qkv.device.type)
    q_norm, k_norm, q_norm_diff, k_norm_diff = norms or (None,) * 4
    params = struct("QkvCommitParams", qkv.dtype)(
        qkv=ptr(qkv),
        cos_sin=ptr(cos_sin),
        q_norm=ptr(q_norm),
        k_norm=ptr(k_norm),
        q_norm_diff=ptr(q_norm_diff),
        k_norm_diff=ptr(k_norm_diff),
        q_out=ptr(q_out),
        scratch_k=ptr(scratch_k),
        scratch_v=ptr(scratch_v),
        rows=rows_struct(rows),
        kv=kv_struct(k_pages, v_pages, page_table),
        num_heads_q=q_out.shape[1],
        eps=eps,
    )
    _launch("qkv_commit", params, qkv.device)


def dual_attn(
    q, k_pages, v_pages, page_table, scratch_k, scratch_v, rows, softmax_scale, out, *, max_seq_len, workspace=None
):
    check_head_dim("dual_attn", q.shape[2], q.device.type)
    params = struct("DualAttnParams", q.dtype)(
        q=ptr(q),
        scratch_k=ptr(scratch_k),
        scratch_v=ptr(scratch_v),
        out=ptr(out),
        workspace=ptr(workspace),
        workspace_bytes=0 if workspace is None else workspace.nbytes,
        rows=rows_struct(rows),
        kv=kv_struct(k_pages, v_pages, page_table),
        num_heads_q=q.shape[1],
        max_seq_len=max_seq_len,
        softmax_scale=softmax_scale,
    )
    _launch("dual_attn", params, q.device)


def consensus(state, partials, step, next_pass, rows_next, mask_token_id, block_len, fan_out):
    value, index = partials
    params = dispatch.extension().ConsensusParams(
        partial_value=ptr(value),
        partial_id=ptr(index),
        state=state_struct(state),
        next_token=ptr(rows_next.token) if rows_next else 0,
        next_position=ptr(rows_next.position) if rows_next else 0,
        next_seq=ptr(rows_next.seq) if rows_next else 0,
        next_prefix_len=ptr(rows_next.prefix_len) if rows_next else 0,
        rows_per_slot=0 if index is None else index.shape[0] // max(state.num_slots, 1),
        block_len=block_len,
        fan_out=fan_out,
        num_partials=0 if index is None else index.shape[1],
        mask_token_id=mask_token_id,
        step=step,
        next_pass=next_pass,
    )
    _launch("consensus", params, state.finish.device)


def edits_struct(edits: SlotEdits | None):
    if edits is None:
        return dispatch.extension().SlotEdits()
    return dispatch.extension().SlotEdits(
        penalties=ptr(edits.penalties),
        token_counts=ptr(edits.token_counts),
        bias_ids=ptr(edits.bias_ids),
        bias_values=ptr(edits.bias_values),
        stop_ids=ptr(edits.stop_ids),
        min_position=ptr(edits.min_position),
        max_bias=edits.bias_ids.shape[1],
        max_stop_ids=edits.stop_ids.shape[1],
    )


def process_logits(logits, rows, logit_rows, sampling, cache_seqlens, purpose, partials, *, log_probs=None):
    params = dispatch.extension().ProcessLogitsParams(
        logits=ptr(logits),
        logit_rows=ptr(logit_rows),
        cache_seqlens=ptr(cache_seqlens),
        temperature=ptr(sampling.temperature),
        top_k=ptr(sampling.top_k),
        top_p=ptr(sampling.top_p),
        min_p=ptr(sampling.min_p),
        seed=ptr(sampling.seed),
        partial_value=ptr(partials[0]),
        partial_id=ptr(partials[1]),
        log_probs=ptr(log_probs),
        edits=edits_struct(sampling.edits),
        rows=rows_struct(rows),
        num_rows=logits.shape[0],
        vocab_size=logits.shape[1],
        purpose=purpose,
    )
    _launch("process_logits", params, logits.device)


def count_tokens(state, edits):
    params = dispatch.extension().CountTokensParams(
        token_counts=ptr(edits.token_counts),
        num_counted=ptr(edits.num_counted),
        state=state_struct(state),
        vocab_size=edits.token_counts.shape[1],
    )
    _launch("count_tokens", params, state.finish.device)
