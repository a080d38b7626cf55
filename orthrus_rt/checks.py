"""What the ops ask of their arguments: shape, dtype, device and layout, in one wording.

Each raises ValueError naming op, argument, expected and got.
"""

from __future__ import annotations

import torch

from orthrus_rt import state as st
from orthrus_rt.plan import Rows

PAGE_SIZE = 64  # tokens


def require(op: str, what: str, expected, got) -> None:
    if expected != got:
        raise ValueError(f"{op}: {what} must be {expected}, got {got}")


def check_tensor(op: str, name: str, t: torch.Tensor, shape: tuple, dtype, device) -> None:
    """Check one tensor; None in ``shape`` admits any size."""
    have = t.shape
    fits = have == shape or (
        len(have) == len(shape) and all(s is None or s == n for s, n in zip(shape, have, strict=True))
    )
    if fits and t.dtype is dtype and t.device == device and t.is_contiguous():
        return  # a thousand times a pass: what follows only words the complaint
    if not fits:
        text = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{op}: {name}.shape must be [{text}], got {list(have)}")
    require(op, f"{name}.dtype", dtype, t.dtype)
    require(op, f"{name}.device", device, t.device)
    raise ValueError(f"{op}: {name} must be contiguous, got strides {t.stride()} for shape {list(have)}")


def check_rows(op: str, rows: Rows, device) -> None:
    n = rows.num_rows
    check_tensor(op, "rows.token", rows.token, (n,), torch.int32, device)
    check_tensor(op, "rows.position", rows.position, (n,), torch.int32, device)
    check_tensor(op, "rows.seq", rows.seq, (n,), torch.int32, device)
    check_tensor(op, "rows.prefix_len", rows.prefix_len, (n,), torch.int32, device)
    check_tensor(op, "rows.group_start", rows.group_start, (rows.num_groups + 1,), torch.int32, device)
    if not 0 <= rows.num_rows_ar <= n:
        raise ValueError(f"{op}: rows.num_rows_ar must be within [0, {n}], got {rows.num_rows_ar}")
    if not 0 <= rows.num_groups_ar <= rows.num_groups:
        raise ValueError(f"{op}: rows.num_groups_ar must be within [0, {rows.num_groups}], got {rows.num_groups_ar}")


def check_pages(op: str, k_pages, v_pages, page_table, head_dim, dtype, device) -> None:
    check_tensor(op, "k_pages", k_pages, (None, None, PAGE_SIZE, head_dim), dtype, device)
    check_tensor(op, "v_pages", v_pages, tuple(k_pages.shape), dtype, device)
    check_tensor(op, "page_table", page_table, (None, None), torch.int32, device)


def check_scratch(op: str, scratch_k, scratch_v, rows: Rows, num_heads_kv, head_dim, dtype, device) -> None:
    if rows.num_rows_diff:
        shape = (rows.num_rows_diff, num_heads_kv, head_dim)
        check_tensor(op, "scratch_k", scratch_k, shape, dtype, device)
        check_tensor(op, "scratch_v", scratch_v, shape, dtype, device)


def check_edits(op: str, edits: st.SlotEdits, slots: int, vocab: int | None, device) -> None:
    f32, i32 = torch.float32, torch.int32
    bias = edits.bias_ids.shape[-1]
    for name, shape, dtype in (
        ("penalties", (slots, 3), f32), ("token_counts", (slots, vocab), i32), ("num_counted", (slots,), i32),
        ("bias_ids", (slots, None), i32), ("bias_values", (slots, bias), f32), ("stop_ids", (slots, None), i32),
        ("min_position", (slots,), i32),
    ):  # fmt: skip
        check_tensor(op, f"edits.{name}", getattr(edits, name), shape, dtype, device)
