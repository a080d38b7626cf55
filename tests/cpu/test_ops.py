"""The signatures' checks: errors name op, argument, expected and got."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orthrus_rt import dispatch, native, ops, weights
from orthrus_rt import state as st
from orthrus_rt.engine import Engine
from orthrus_rt.prefill import prefill_rows
from orthrus_rt.rows import Layout, empty_rows
from orthrus_rt.state import SlotEdits, SlotSampling, SlotState, empty_partials
from orthrus_rt.weights import pack
from tests import checkpoints

ROOT = Path(__file__).parents[2]
F32, I32 = torch.float32, torch.int32
ROWS, HEADS_Q, HEADS_KV, DIM = 3, 4, 2, 64


def f32(*shape):
    return torch.zeros(shape)


def i32(*shape):
    return torch.zeros(shape, dtype=I32)


def meta(*shape):
    return torch.empty(shape, device="meta")


def attention(**changes):
    """A dual_attn call over three AR rows, with some arguments changed."""
    arguments = dict(
        q=f32(ROWS, HEADS_Q, DIM),
        k_pages=f32(5, HEADS_KV, 64, DIM),
        v_pages=f32(5, HEADS_KV, 64, DIM),
        page_table=i32(1, 12),
        scratch_k=None,
        scratch_v=None,
        rows=prefill_rows([([0] * ROWS, 0, 0)], "cpu"),
        softmax_scale=1.0,
        out=f32(ROWS, HEADS_Q, DIM),
        max_seq_len=768,
    )
    ops.dual_attn(**(arguments | changes))


def commit(**changes):
    arguments = dict(
        qkv=f32(ROWS, (HEADS_Q + 2 * HEADS_KV) * DIM),
        rows=prefill_rows([([0] * ROWS, 0, 0)], "cpu"),
        cos_sin=f32(64, DIM),
        norms=None,
        eps=1e-6,
        k_pages=f32(5, HEADS_KV, 64, DIM),
        v_pages=f32(5, HEADS_KV, 64, DIM),
        page_table=i32(1, 12),
        scratch_k=None,
        scratch_v=None,
        q_out=f32(ROWS, HEADS_Q, DIM),
    )
    ops.qkv_commit(**(arguments | changes))


def linear(**changes):
    arguments = dict(x=f32(ROWS, 8), weight=pack(f32(6, 8)), out=f32(ROWS, 6))
    ops.row_linear(**(arguments | changes))


def consensus(**changes):
    arguments = dict(
        state=SlotState.allocate(2, 4, 16, 2, "cpu"),
        partials=(f32(8, 1), i32(8, 1)),
        step=st.STEP_VERIFY,
        next_pass=st.NEXT_DRAFT,
        rows_next=empty_rows(Layout(0, 0, 2, 4), "cpu"),
        mask_token_id=9,
        block_len=4,
    )
    ops.consensus(**(arguments | changes))


def changed(**tensors):
    """A state of two slots with some tensors replaced."""
    return replace(SlotState.allocate(2, 4, 16, 2, "cpu"), **tensors)


def count(**changes):
    arguments = dict(state=changed(), edits=SlotEdits.allocate(2, 300, 4, i32(2, 3)))
    ops.count_tokens(**(arguments | changes))


def logits(**changes):
    sampling = SlotSampling.allocate(2, "cpu")
    sampling.edits = SlotEdits.allocate(2, 300, 4, i32(2, 3))
    for name in set(changes) & set(vars(sampling)):
        setattr(sampling, name, changes.pop(name))
    for name in set(changes) & set(vars(sampling.edits)):
        setattr(sampling.edits, name, changes.pop(name))
    arguments = dict(
        logits=f32(3, 300), rows=prefill_rows([([0] * 4, 0, 0)], "cpu"), logit_rows=i32(3), sampling=sampling,
        cache_seqlens=i32(2), purpose=0, partials=empty_partials(3, 3, "cpu"),
    )  # fmt: skip
    ops.process_logits(**(arguments | changes))


CASES = [
    (linear, {"weight": f32(6, 8)}, "row_linear: weight must be a PackedWeight (orthrus_rt.weights.pack), got Tensor"),
    (linear, {"x": f32(ROWS, 8).bfloat16(), "out": f32(ROWS, 6).bfloat16()},
     "row_linear: weight.data.dtype must be torch.bfloat16, got torch.float32"),
    (linear, {"weight_diff": replace(pack(f32(6, 8)), data=f32(1).bfloat16()), "num_rows_ar": 1},
     "row_linear: weight_diff.data.dtype must be torch.float32, got torch.bfloat16"),
    (attention, {"page_table": i32(1, 8)},
     "dual_attn: page_table.shape[1] must be >= 12 (max_seq_len 768 / page_size 64), got 8"),
    (attention, {"page_table": i32(1, 11)}, "dual_attn: page_table.shape[1] must be >= 12 "),
    (attention, {"v_pages": f32(4, HEADS_KV, 64, DIM)}, "dual_attn: v_pages.shape must be [5, 2, 64, 64], got [4,"),
    (commit, {"v_pages": f32(4, HEADS_KV, 64, DIM)}, "qkv_commit: v_pages.shape must be [5, 2, 64, 64], got [4,"),
    (attention, {"out": f32(ROWS, HEADS_Q, 32)}, "dual_attn: out.shape must be [3, 4, 64], got [3, 4, 32]"),
    (attention, {"q": f32(2, HEADS_Q, DIM)}, "dual_attn: q.shape must be [3, any, any], got [2, 4, 64]"),
    (attention, {"k_pages": f32(5, 3, 64, DIM), "v_pages": f32(5, 3, 64, DIM)},
     "dual_attn: num_heads_q must be a multiple of num_heads_kv (3), got 4"),
    (attention, {"k_pages": f32(5, HEADS_KV, 16, DIM)}, "dual_attn: k_pages.shape must be [any, any, 64, 64]"),
    (attention, {"page_table": torch.zeros(1, 12)}, "dual_attn: page_table.dtype must be torch.int32"),
    (attention, {"out": f32(HEADS_Q, ROWS, DIM).transpose(0, 1)}, "dual_attn: out must be contiguous, got strides"),
    (attention, {"rows": empty_rows(Layout(0, 0, 1, 3), "cpu"), "scratch_k": f32(1, HEADS_KV, DIM)},
     "dual_attn: scratch_k.shape must be [3, 2, 64], got [1, 2, 64]"),
    (attention, {"rows": empty_rows(Layout(0, 0, 1, 3), "cpu"), "scratch_k": f32(3, HEADS_KV, DIM),
                 "scratch_v": f32(1, HEADS_KV, DIM)},
     "dual_attn: scratch_v.shape must be [3, 2, 64], got [1, 2, 64]"),
    (attention, {"q": f32(ROWS, DIM)}, "dual_attn: q.shape must be [3, any, any], got [3, 64]"),
    (attention, {"rows": empty_rows(Layout(0, 0, 1, 3), "cpu")}, "dual_attn: scratch_k must be a tensor, got None"),
    (attention, {"rows": replace(prefill_rows([([0] * ROWS, 0, 0)], "cpu"), max_group_rows=0)},
     "dual_attn: rows.max_group_rows must be enough for 3 rows in 1 groups, got 0"),
    (attention, {"rows": empty_rows(Layout(0, 0, 3, 1, 2), "cpu")},
     "dual_attn: rows.blocks_per_seq must be a divisor of the 3 diffusion groups, got 2"),
    (attention, {"rows": replace(empty_rows(Layout(1, 1, 2, 1, 2), "cpu"), max_group_rows=2)},
     "dual_attn: 2 blocks that share sequences (rows.blocks_per_seq) must have 2 (rows.max_group_rows) rows each, got"),
    (commit, {"q_out": f32(ROWS, HEADS_Q * DIM)}, "qkv_commit: q_out.shape must be [3, any, any], got [3, 256]"),
    (commit, {"k_pages": f32(5)}, "qkv_commit: k_pages.shape must be [any, any, 64, 64], got [5]"),
    (commit, {"qkv": f32(ROWS, 100)}, "qkv_commit: qkv.shape must be [3, 512], got [3, 100]"),
    (commit, {"norms": (f32(DIM), f32(DIM), f32(DIM), f32(8))}, "qkv_commit: k_norm_diff.shape must be [64], got [8]"),
    (commit, {"cos_sin": f32(64, 32)}, "qkv_commit: cos_sin.shape must be [any, 64], got [64, 32]"),
    (linear, {"x": f32(ROWS, 9)}, "row_linear: x.shape must be [any, 8], got [3, 9]"),
    (linear, {"x": f32(ROWS, 9)[:, :8]}, "row_linear: x must be contiguous, got strides (9, 1) for shape [3, 8]"),
    (linear, {"x": meta(ROWS, 8), "out": meta(ROWS, 6)}, "row_linear: weight.data.device must be meta, got cpu"),
    (linear, {"weight": replace(pack(f32(6, 8)), data=meta(6, 8))},
     "row_linear: weight.data.device must be cpu, got meta"),
    (linear, {"x": meta(ROWS, 8), "out": meta(ROWS, 6), "weight": replace(pack(meta(6, 8)), impl="cpu")},
     "row_linear: weight.impl must be reference, got cpu"),
    (linear, {"weight_diff": replace(pack(f32(6, 8)), data=meta(6, 8)), "num_rows_ar": 1},
     "row_linear: weight_diff.data.device must be cpu, got meta"),
    (linear, {"next_weight": replace(pack(f32(6, 8)), data=meta(6, 8))},
     "row_linear: next_weight.data.device must be cpu, got meta"),
    (linear, {"epilogue": "gelu"}, "row_linear: epilogue must be one of none, residual, silu_mul, logits, argmax"),
    (linear, {"epilogue": "silu_mul"}, "row_linear: weight.gate_up must be True, got False"),
    (linear, {"epilogue": "residual"}, "row_linear: residual must be given for the residual epilogue alone"),
    (linear, {"weight_diff": pack(f32(6, 8))},
     "row_linear: num_rows_ar must be within [0, 3] where weight_diff is given, got None"),
    (linear, {"weight_diff": pack(f32(5, 8)), "num_rows_ar": 1}, "row_linear: weight_diff must be"),
    (linear, {"next_weight": replace(pack(f32(6, 8)), data=f32(1).bfloat16())},
     "row_linear: next_weight.data.dtype must be torch.float32, got torch.bfloat16"),
    (linear, {"next_weight": replace(pack(f32(6, 8)), impl="cuda")}, "row_linear: next_weight.impl must be"),
    (linear, {"out": f32(ROWS, 5)}, "row_linear: out.shape must be [3, 6], got [3, 5]"),
    (consensus, {"partials": (f32(7, 1), i32(7, 1))},
     "consensus: partials[1].shape must be [2 * rows_per_slot, num_partials], got [7, 1]"),
    (consensus, {"partials": (None, i32(8, 1))}, "consensus: partials[0] must be a tensor, got None"),
    (consensus, {"partials": (f32(8, 1), i32(8, 2))}, "consensus: partials[0].shape must be [8, 2], got [8, 1]"),
    (consensus, {"partials": (f32(10, 1), i32(10, 1))},
     "consensus: rows per slot must be within [1, 4] for block_len 4, got 5"),
    (consensus, {"step": st.STEP_DRAFT}, "consensus: rows per slot must be within [0, 3] for block_len 4, got 4"),
    (consensus, {"state": SlotState.allocate(2, 4, 16, 2, "cpu", max_fan_out=1), "fan_out": 1,
                 "step": st.STEP_VERIFY_AND_DRAFT},
     "consensus: rows per slot must be within [8, 8] for block_len 4, got 4"),
    (consensus, {"block_len": 5}, "consensus: block_len must be within [1, 4], got 5"),
    (consensus, {"state": SlotState.allocate(2, 257, 1028, 2, "cpu"), "block_len": 257},
     "consensus: block_len must be within [1, 256], got 257"),
    (consensus, {"fan_out": 1}, "consensus: fan_out must be within [0, 0] (the state's), got 1"),
    (consensus, {"step": st.STEP_VERIFY_AND_DRAFT, "partials": (None, i32(8, 1))},
     "consensus: partials[0] must be a tensor, got None"),
    (consensus, {"rows_next": empty_rows(Layout(0, 0, 2, 3), "cpu")}, "consensus: rows_next.num_rows must be 8, got 6"),
    (consensus, {"partials": (f32(8, 0), i32(8, 0))},
     "consensus: partials[1].shape[1] must be >= 1 (num_partials), got 0"),
    (consensus, {"partials": (f32(8), i32(8))}, "consensus: partials[1].shape must be [any, any], got [8]"),
    (consensus, {"partials": (None, None)}, "consensus: partials[1] must be a tensor, got None"),
    (consensus, {"step": 7}, "consensus: step must be one of 0, 1, 2, 3, got 7"),
    (consensus, {"next_pass": 5}, "consensus: next_pass must be one of 0, 1, 2, 3, 4, got 5"),
    (consensus, {"rows_next": None}, "consensus: rows_next must be given for every next_pass but NEXT_NONE, got None"),
    (consensus, {"state": SlotState.allocate(2, 4, 0, 2, "cpu")},
     "consensus: state.output.shape[1] must be >= 1 (output_capacity), got 0"),
    (consensus, {"state": changed(limit=i32(2).long())},
     "consensus: state.limit.dtype must be torch.int32, got torch.int64"),
    (consensus, {"state": changed(num_drafts=i32(3))}, "consensus: state.num_drafts.shape must be [2], got [3]"),
    (consensus, {"state": changed(runner_up=i32(2, 3, 2))},
     "consensus: state.runner_up.shape must be [2, 4, 2], got [2, 3, 2]"),
    (consensus, {"state": changed(draft_prob=i32(2, 4, 3))},
     "consensus: state.draft_prob.dtype must be torch.float32, got torch.int32"),
    (consensus, {"state": changed(draft_prob=f32(2, 4, 2))},
     "consensus: state.draft_prob.shape must be [2, 4, 3], got [2, 4, 2]"),
    (consensus, {"state": changed(block_tokens=i32(4, 2).T)}, "consensus: state.block_tokens must be contiguous"),
    (count, {"state": SlotState.allocate(2, 4, 0, 2, "cpu")},
     "count_tokens: state.output.shape[1] must be >= 1 (output_capacity), got 0"),
    (logits, {"logits": f32(300)}, "process_logits: logits.shape must be [any, any], got [300]"),
    (logits, {"top_k": f32(2)}, "process_logits: sampling.top_k.dtype must be torch.int32, got torch.float32"),
    (logits, {"min_p": f32(3)}, "process_logits: sampling.min_p.shape must be [2], got [3]"),
    (logits, {"purpose": -1}, "process_logits: purpose must be within [0, 2**31), got -1"),
    (logits, {"purpose": 1 << 31}, "process_logits: purpose must be within [0, 2**31), got 2147483648"),
    (logits, {"logit_rows": i32(2)}, "process_logits: logit_rows.shape must be [3], got [2]"),
    (logits, {"partials": empty_partials(3, 1, "cpu")}, "process_logits: partials[0].shape must be [3, 3], got [3, 1]"),
    (logits, {"bias_values": f32(2, 3)}, "process_logits: edits.bias_values.shape must be [2, 4], got [2, 3]"),
    (logits, {"min_position": i32(3)}, "process_logits: edits.min_position.shape must be [2], got [3]"),
    (logits, {"token_counts": i32(2, 299)},
     "process_logits: edits.token_counts.shape must be [2, 300], got [2, 299]"),
    (logits, {"cache_seqlens": i32(1)}, "process_logits: cache_seqlens.shape must be [2], got [1]"),
    (linear, {"workspace": f32(8)}, "row_linear: workspace.dtype must be torch.uint8, got torch.float32"),
    (attention, {"workspace": torch.zeros(8, dtype=torch.uint8, device="meta")},
     "dual_attn: workspace.device must be cpu, got meta"),
    (linear, {"x": None}, "row_linear: x must be a tensor, got None"),
    (attention, {"q": [1.0]}, "dual_attn: q must be a tensor, got list"),
    (commit, {"qkv": None}, "qkv_commit: qkv must be a tensor, got None"),
    (logits, {"logits": None}, "process_logits: logits must be a tensor, got None"),
    (consensus, {"state": changed(finish=None)}, "consensus: state.finish must be a tensor, got None"),
    (count, {"state": changed(finish=None)}, "count_tokens: state.finish must be a tensor, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "changes", "message"), CASES, ids=[c[2][:60] for c in CASES])
def test_messages(call, changes, message):
    call()
    with pytest.raises(ValueError) as error:
        call(**changes)
    assert message in str(error.value)


def numbers(*files: str) -> dict[str, int]:
    """Constants and the members of enumerations: ``kPageSize``, ``NextPass.kDraft``."""
    text = "".join((ROOT / file).read_text() for file in files)
    found = re.findall(r"^constexpr \w+ (k\w+) = (\d+);", text, re.M)
    for name, members in re.findall(r"^enum class (\w+) : int32_t \{(.*?)\};", text, re.M | re.S):
        found += [(f"{name}.{member}", value) for member, value in re.findall(r"(k\w+) = (-?\d+)", members)]
    return {name: int(value) for name, value in found}


def test_numbers_are_the_same_in_python_and_in_the_kernels():
    native_ones = numbers("csrc/include/orthrus/params.h", "csrc/cpu/row_linear.h")
    python_ones = {"kPageSize": ops.PAGE_SIZE, "kScoreTile": st.SCORE_TILE, "kCandidates": st.CANDIDATES}
    python_ones |= {"kMaxBlockLen": ops.MAX_BLOCK_LEN, "kArgmaxTile": weights.CPU_ARGMAX_TILE}
    of_triton = re.search(r"^SCORE_TILE = (\d+)", (ROOT / "triton_kernels/process_logits.py").read_text(), re.M)[1]
    assert int(of_triton) == st.SCORE_TILE
    assert {name: native_ones[name] for name in python_ones} == python_ones
    enums = {"Epilogue": native.EPILOGUE, "ConsensusStep": {}, "NextPass": {}, "FinishReason": {}}
    for name, value in vars(st).items():
        for prefix, enum in (("STEP_", "ConsensusStep"), ("NEXT_", "NextPass")):
            if name.startswith(prefix):
                enums[enum][name.removeprefix(prefix)] = value
    enums["FinishReason"] = {n: getattr(st, n) for n in ("EMPTY", "RUNNING", "STOP", "LENGTH", "NO_CHOICE")}
    for enum, members in enums.items():
        camel = {f"{enum}.k{name.title().replace('_', '')}": value for name, value in members.items()}
        assert camel == {name: value for name, value in native_ones.items() if name.startswith(f"{enum}.")}


def test_small_ops_name_their_arguments():
    with pytest.raises(ValueError, match=r"embed: out.shape must be \[3, 8\], got \[3, 7\]"):
        ops.embed(i32(3), f32(10, 8), f32(3, 7))
    with pytest.raises(ValueError, match=r"rms_norm: weight.dtype must be torch.float32, got torch.bfloat16"):
        ops.rms_norm(f32(3, 8), torch.ones(8, dtype=torch.bfloat16), 1e-6, f32(3, 8))


def test_nothing_to_do_is_done(monkeypatch):
    """No rows, no slots: no error, and no implementation is called."""
    monkeypatch.setattr(ops, "_choose", lambda *what: pytest.fail(f"{what} was chosen"))
    empty = prefill_rows([], "cpu")
    attention(q=f32(0, HEADS_Q, DIM), out=f32(0, HEADS_Q, DIM), rows=empty)
    commit(qkv=f32(0, 512), q_out=f32(0, HEADS_Q, DIM), rows=empty)
    linear(x=f32(0, 8), out=f32(0, 6))
    ops.embed(i32(0), f32(10, 8), f32(0, 8))
    ops.rms_norm(f32(0, 8), torch.ones(8), 1e-6, f32(0, 8))
    logits(logits=f32(0, 300), logit_rows=i32(0), partials=empty_partials(0, 3, "cpu"))
    none = SlotState.allocate(0, 4, 16, 2, "cpu")
    consensus(state=none, partials=empty_partials(0, 3, "cpu"), next_pass=st.NEXT_NONE, rows_next=None)
    count(state=none)


@pytest.mark.native
@pytest.mark.parametrize(
    ("group_start", "changes", "message"),
    [
        ([0, 5, 6], {"max_group_rows": 4}, "group 0 must have 0 ... 4 (rows.max_group_rows) rows, got 5"),
        ([0, 5, 4, 6], {"num_groups_ar": 3}, "group 1 must have 0 ... 5 (rows.max_group_rows) rows, got -1"),
        ([1, 5, 6], {}, "rows.group_start[0] must be 0, got 1"),
        ([0, 3, 5], {}, "rows.group_start[2] must be 6, got 5"),
        ([0, 5, 6], {"num_groups_ar": 1}, "rows.group_start[1] must be 6, got 5"),
        ([0, 5, 5], {"num_groups_ar": 1, "num_rows_ar": 5}, "rows.group_start[2] must be 6, got 5"),
    ],
)
def test_groups_that_would_leave_rows_out(group_start, changes, message):
    """On the CPU. A replay checks what the rows hold at that time."""
    rows = prefill_rows([([0] * 5, 0, 0), ([0], 0, 0)], "cpu")
    pages, table = f32(5, HEADS_KV, 64, DIM), i32(1, 12)
    arguments = dict(
        q=f32(6, HEADS_Q, DIM), k_pages=pages, v_pages=pages, page_table=table, out=f32(6, HEADS_Q, DIM), rows=rows
    )
    attention(**arguments)
    bad = replace(rows, group_start=torch.tensor(group_start, dtype=I32), **changes)
    scratch = f32(6 - bad.num_rows_ar, HEADS_KV, DIM)
    with pytest.raises(ValueError) as error:
        attention(**(arguments | {"rows": bad, "scratch_k": scratch, "scratch_v": scratch}))
    assert str(error.value) == f"dual_attn: {message}"
    tape = dispatch.extension().cpu.Tape()
    with tape:
        attention(**arguments)
    tape.replay()
    rows.group_start[1] = 7
    with pytest.raises(ValueError, match=r"group 0 must have 0 \.\.\. 5 \(rows.max_group_rows\) rows, got 7"):
        tape.replay()


@pytest.mark.native
def test_blocks_that_do_not_share_a_sequence():
    """Refused on the CPU, which can check it, so that a GPU's kernels may rely on it."""
    rows = empty_rows(Layout(1, 2, 4, 2, 2), "cpu")
    rows.seq[6:] = 1
    arguments = dict(q=f32(10, HEADS_Q, DIM), out=f32(10, HEADS_Q, DIM), rows=rows)
    arguments |= dict.fromkeys(("scratch_k", "scratch_v"), f32(8, HEADS_KV, DIM))
    arguments |= dict.fromkeys(("k_pages", "v_pages"), f32(5, HEADS_KV, 64, DIM)) | {"page_table": i32(2, 12)}
    attention(**arguments)
    rows.seq[8] = 0
    with pytest.raises(ValueError) as error:
        attention(**arguments)
    want = "dual_attn: group 4 must be of sequence 1, as the blocks before it (rows.blocks_per_seq), got 0"
    assert str(error.value) == want


def test_pack_refuses_what_the_kernels_do_not_take():
    for impl in ("cpu", "reference"):
        with pytest.raises(ValueError, match="row_linear: out_features of gate and up must be even, got 65"):
            pack(f32(65, 8), gate_up=True, impl=impl)
    with pytest.raises(ValueError, match=r"row_linear: weight.dtype must be one of .* for cpu, got torch.float16"):
        pack(f32(6, 8).half(), impl="cpu")


def test_head_dims_without_a_kernel_are_refused_at_load(tmp_path, monkeypatch):
    """Before anything is packed, and for CUDA too (choosing its kernels needs no device)."""
    folder = checkpoints.make(tmp_path, "llama", dtype=torch.bfloat16, head_dim=24)
    if dispatch.extension() is not None:
        monkeypatch.setattr("orthrus_rt.weights.pack", None)
        with pytest.raises(ValueError, match="dual_attn: head_dim must be a multiple of 16 up to 256 on the CPU"):
            Engine.from_pretrained(str(folder), device="cpu", mode="two_pass")
    cuda, impl = torch.device("cuda"), {torch.bfloat16: "cuda", torch.float32: "cuda", torch.float16: "reference"}
    monkeypatch.setattr(dispatch, "select", lambda op, device, dtype: impl[dtype])
    for dtype in dispatch.ELEMENTS:
        with pytest.raises(ValueError, match=r"qkv_commit: head_dim must be in \(64, 128\) on CUDA, got 80"):
            ops.check_head_dim(80, cuda, dtype)
    for head_dim, dtype in ((64, torch.bfloat16), (128, torch.float32), (80, torch.float16)):
        ops.check_head_dim(head_dim, cuda, dtype)
