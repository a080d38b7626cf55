"""Requirements of the ops on their arguments (shape, dtype, device and layout), in uniform wording.

Each raises ValueError naming op, argument, expected and got.
"""

from __future__ import annotations

import torch

from orthrus_rt import state as st
from orthrus_rt.pages import PAGE_SIZE
from orthrus_rt.rows import Rows


def require(op: str, what: str, expected, got) -> None:
    if expected != got:
        raise ValueError(f"{op}: {what} must be {expected}, got {got}")


def kind_of(op: str, name: str, t: torch.Tensor) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of the tensor that the others have to match."""
    if not isinstance(t, torch.Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {'None' if t is None else type(t).__name__}")
    return t.dtype, t.device


def check_tensor(op: str, name: str, t: torch.Tensor, shape: tuple, dtype, device) -> None:
    """Check one tensor; None in ``shape`` allows any size."""
    if t is None:
        raise ValueError(f"{op}: {name} must be a tensor, got None")
    have = t.shape
    fits = have == shape or (
        len(have) == len(shape) and all(s is None or s == n for s, n in zip(shape, have, strict=True))
    )
    if fits and t.dtype is dtype and t.device == device and t.is_contiguous():
        return  # the fast path, taken a thousand times per pass; what follows only builds the message
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
    if rows.max_group_rows * rows.num_groups < n:  # as far as the host can check if group_start is on a GPU
        raise ValueError(
            f"{op}: rows.max_group_rows must be enough for {n} rows in {rows.num_groups} groups, got "
            f"{rows.max_group_rows}"
        )
    if rows.blocks_per_seq != 1:
        num_blocks = rows.num_groups - rows.num_groups_ar
        if rows.blocks_per_seq < 1 or num_blocks % rows.blocks_per_seq:
            raise ValueError(
                f"{op}: rows.blocks_per_seq must be a divisor of the {num_blocks} diffusion groups, got "
                f"{rows.blocks_per_seq}"
            )
        if rows.num_rows_diff != num_blocks * rows.max_group_rows:
            raise ValueError(
                f"{op}: {num_blocks} blocks that share sequences (rows.blocks_per_seq) must have "
                f"{rows.max_group_rows} (rows.max_group_rows) rows each, got {rows.num_rows_diff} in all"
            )


def check_pages(op: str, k_pages, v_pages, page_table, head_dim, dtype, device) -> None:
    check_tensor(op, "k_pages", k_pages, (None, None, PAGE_SIZE, head_dim), dtype, device)
    check_tensor(op, "v_pages", v_pages, tuple(k_pages.shape), dtype, device)
    check_tensor(op, "page_table", page_table, (None, None), torch.int32, device)


def check_scratch(op: str, scratch_k, scratch_v, rows: Rows, num_heads_kv, head_dim, dtype, device) -> None:
    if rows.num_rows_diff:
        shape = (rows.num_rows_diff, num_heads_kv, head_dim)
        check_tensor(op, "scratch_k", scratch_k, shape, dtype, device)
        check_tensor(op, "scratch_v", scratch_v, shape, dtype, device)


def check_state(op: str, state: st.SlotState, device) -> None:
    i32, f32 = torch.int32, torch.float32
    check_tensor(op, "state.cache_seqlens", state.cache_seqlens, (None,), i32, device)
    check_tensor(op, "state.block_tokens", state.block_tokens, (state.num_slots, None), i32, device)
    slots, block = state.block_tokens.shape
    for name in ("num_drafts", "num_verified", "num_accepted", "limit", "finish", "num_output"):
        check_tensor(op, f"state.{name}", getattr(state, name), (slots,), i32, device)
    for name, shape, dtype in (
        ("stop_ids", (slots, None), i32), ("output", (slots, None), i32), ("hypotheses", (slots, None, 2), i32),
        ("runner_up", (slots, block, st.CANDIDATES - 1), i32), ("draft_prob", (slots, block, st.CANDIDATES), f32),
    ):  # fmt: skip
        check_tensor(op, f"state.{name}", getattr(state, name), shape, dtype, device)
    if state.output.shape[1] < 1:
        raise ValueError(f"{op}: state.output.shape[1] must be >= 1 (output_capacity), got 0")


def check_choices(op: str, partials, step: int, slots: int, block_len: int, fan_out: int, device) -> None:
    """Check the choices that ``consensus`` takes."""
    one_pass = block_len * (1 + fan_out)
    rows_per_slot = {
        st.STEP_DRAFT: (0, block_len - 1),
        st.STEP_VERIFY: (1, block_len),
        st.STEP_STAGE: None,
        st.STEP_VERIFY_AND_DRAFT: (one_pass, one_pass),
    }
    if step not in rows_per_slot:
        raise ValueError(f"{op}: step must be one of {', '.join(map(str, rows_per_slot))}, got {step}")
    if step == st.STEP_STAGE:
        return
    value, index = partials
    check_tensor(op, "partials[1]", index, (None, None), torch.int32, device)
    rows, num_partials = index.shape
    if slots and rows % slots:
        raise ValueError(
            f"{op}: partials[1].shape must be [{slots} * rows_per_slot, num_partials], got {list(index.shape)}"
        )
    if num_partials < 1:
        raise ValueError(f"{op}: partials[1].shape[1] must be >= 1 (num_partials), got 0")
    check_tensor(op, "partials[0]", value, (rows, num_partials), torch.float32, device)
    low, high = rows_per_slot[step]
    if slots and not low <= rows // slots <= high:
        want = f"within [{low}, {high}] for block_len {block_len}"
        raise ValueError(f"{op}: rows per slot must be {want}, got {rows // slots}")


def check_edits(op: str, edits: st.SlotEdits, slots: int, vocab: int | None, device) -> None:
    f32, i32 = torch.float32, torch.int32
    bias = edits.bias_ids.shape[-1]
    for name, shape, dtype in (
        ("penalties", (slots, 3), f32), ("token_counts", (slots, vocab), i32), ("num_counted", (slots,), i32),
        ("bias_ids", (slots, None), i32), ("bias_values", (slots, bias), f32), ("stop_ids", (slots, None), i32),
        ("min_position", (slots,), i32),
    ):  # fmt: skip
        check_tensor(op, f"edits.{name}", getattr(edits, name), shape, dtype, device)
