"""Every Triton kernel, as its launcher launches it at real model shapes, compiled for every architecture."""

import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from orthrus_rt.prefill import prefill_rows
from orthrus_rt.rows import Layout, empty_rows
from orthrus_rt.state import SlotEdits, SlotSampling, SlotState, empty_partials, num_score_tiles
from orthrus_rt.triton_kernels import count_tokens, dual_attn, embed, process_logits, rms_norm, sum_words
from tests.compile import cubins
from tests.compile.recorder import record

# Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS = 65536


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    """Compiled kernels are kept in the build folder under a hash of their source."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(Path(__file__).resolve().parents[2] / "build" / "triton"))


def int32(*shape):
    return torch.empty(shape, dtype=torch.int32)


def fp32(*shape):
    return torch.empty(shape)


def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


def call_rms_norm(hidden, with_index, dtype=torch.bfloat16):
    x = torch.empty(4, hidden, dtype=dtype)
    return rms_norm.rms_norm, (x, fp32(hidden), 1e-6, x, int32(4) if with_index else None), {}


def call_embed(hidden, dtype=torch.bfloat16):
    return embed.embed, (int32(4), torch.empty(100, hidden, dtype=dtype), torch.empty(4, hidden, dtype=dtype)), {}


def call_dual_attn(heads_q, heads_kv, head_dim, blocks):
    rows = empty_rows(Layout(2, 4, blocks, 16), "cpu")
    q, pages = bf16(rows.num_rows, heads_q, head_dim), bf16(8, heads_kv, 64, head_dim)
    scratch = bf16(rows.num_rows_diff, heads_kv, head_dim) if blocks else None
    return dual_attn.dual_attn, (q, pages, pages, int32(2, 4), scratch, scratch, rows, 0.1, q), {}


def call_process_logits(vocab, extras):
    n = 2
    i64 = torch.empty(n, dtype=torch.int64)
    edits = SlotEdits.allocate(n, vocab, 5, int32(n, 3)) if extras else None
    sampling = SlotSampling(fp32(n), int32(n), fp32(n), fp32(n), i64, edits)
    rows = prefill_rows([([0] * n, 0, 0)], "cpu")
    args = fp32(n, vocab), rows, int32(n), sampling, int32(n), 1, empty_partials(n, num_score_tiles(vocab), "cpu")
    return process_logits.process_logits, args, {"log_probs": fp32(n, vocab)} if extras else {}


def call_count_tokens(block_len):
    state = SlotState.allocate(2, block_len, max(64, 4 * block_len), 3, "cpu")
    return count_tokens.count_tokens, (state, SlotEdits.allocate(2, 49152, 5, state.stop_ids)), {}


CALLS = {
    "count_tokens-16": call_count_tokens(16),
    "count_tokens-32": call_count_tokens(32),
    "rms_norm-576": call_rms_norm(576, False),
    "rms_norm-2048-index": call_rms_norm(2048, True),
    "rms_norm-4096": call_rms_norm(4096, False),
    "rms_norm-4096-fp32": call_rms_norm(4096, False, torch.float32),
    "embed-576": call_embed(576),
    "embed-4096": call_embed(4096),
    "embed-4096-fp32": call_embed(4096, torch.float32),
    "dual_attn-9-3-64": call_dual_attn(9, 3, 64, 2),
    "dual_attn-32-8-128": call_dual_attn(32, 8, 128, 2),
    "dual_attn-16-8-128-ar": call_dual_attn(16, 8, 128, 0),
    "process_logits-49152": call_process_logits(49152, True),
    "process_logits-151936": call_process_logits(151936, False),
    "sum_words": (sum_words.sum_words, (int32(1 << 20), int32(16)), {}),
}


def call_cycle_logits(slots):
    rows = empty_rows(Layout(slots, 3, slots * 2, 3), "cpu")
    n = rows.num_rows
    i64 = torch.empty(64, dtype=torch.int64)
    sampling = SlotSampling(fp32(64), int32(64), fp32(64), fp32(64), i64)
    args = fp32(n, 300), rows, int32(n), sampling, int32(64), 1, empty_partials(n, num_score_tiles(300), "cpu")
    return process_logits.process_logits, args, {"log_probs": fp32(n, 300)}


def call_cycle_embed(slots):
    rows = empty_rows(Layout(slots, 3, slots * 2, 3), "cpu")
    return embed.embed, (rows.token, bf16(100, 64), bf16(rows.num_rows, 64)), {}


def call_cycle_attention(slots):
    rows = empty_rows(Layout(slots, 3, slots * 2, 3), "cpu")
    q, pages, scratch = bf16(rows.num_rows, 4, 64), bf16(8, 2, 64, 64), bf16(rows.num_rows_diff, 2, 64)
    return dual_attn.dual_attn, (q, pages, pages, int32(64, 4), scratch, scratch, rows, 0.125, q), {}


@pytest.mark.parametrize("call", (call_cycle_logits, call_cycle_embed, call_cycle_attention))
def test_one_version_serves_any_number_of_rows(call, monkeypatch):
    """Otherwise another version would be compiled in the middle of decoding, at the first batch of that size."""
    kinds = []
    for slots in (1, 2, 3, 8, 16, 17):
        launcher, args, kwargs = call(slots)
        with monkeypatch.context() as patch:
            kinds.append([launch.specialisation() for launch in record(patch, launcher, *args, **kwargs)])
    assert all(kind == kinds[0] for kind in kinds)


def test_counts_are_read_before_any_warp_writes_them(monkeypatch):
    """Nothing else orders what warps of one program do to num_counted, so there is only one."""
    launcher, args, kwargs = CALLS["count_tokens-32"]
    (launch,) = record(monkeypatch, launcher, *args, **kwargs)
    assert launch.options["num_warps"] == 1


# By default all of them for sm_90, and each kernel in its largest form for every architecture; all of both in --full.
LARGEST = ("count_tokens-32", "rms_norm-4096", "embed-4096", "dual_attn-32-8-128", "process_logits-49152", "sum_words")
GRID = [
    pytest.param(name, arch, marks=() if arch == 90 or name in LARGEST else pytest.mark.full)
    for name in CALLS
    for arch in SHARED_LIMIT
]


@pytest.mark.parametrize("name, arch", GRID)
def test_compiles_within_the_chip(name, arch, monkeypatch):
    launcher, args, kwargs = CALLS[name]
    launches = record(monkeypatch, launcher, *args, **kwargs)
    assert launches
    for launch in launches:
        used = launch.resources(arch)
        what = f"{launch.fn.__name__} sm_{arch}: {used}"
        assert launch.options["enable_fp_fusion"] is False, what
        assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {what}"
        threads = 32 * launch.options["num_warps"]
        assert threads * -(-used["REG"] // 8) * 8 <= REGISTERS, f"registers: {what}"
        assert used["SHARED"] <= SHARED_LIMIT[arch], f"shared memory: {what}"


@pytest.mark.parametrize("arch", (90, 100))
def test_what_copies_bring_is_no_operand_of_the_async_proxy(arch, monkeypatch):
    """Triton before 3.7.1 leaves out the fence between the two."""
    launcher, args, kwargs = CALLS["dual_attn-32-8-128"]
    (launch,) = record(monkeypatch, launcher, *args, **kwargs)
    ptx = launch.compile(arch).asm["ptx"]
    assert ("wgmma.mma_async" in ptx or "tcgen05.mma" in ptx) and "cp.async" not in ptx


def test_logits_are_divided_as_in_ieee(monkeypatch):
    """An approximate quotient differs in the last bit, and with it choices from those of a CPU."""
    launcher, args, kwargs = CALLS["process_logits-49152"]
    for launch in record(monkeypatch, launcher, *args, **kwargs):
        kinds = set(re.findall(r"\bdiv\.[a-z]+\.f\d+|\brcp\S+", launch.compile(90).asm["ptx"]))
        assert kinds <= {"div.rn.f32", "div.rn.f64"}, launch.fn.__name__


@pytest.mark.parametrize("name", ["rms_norm-576", "rms_norm-2048-index", "rms_norm-4096", "embed-576", "embed-4096"])
def test_fits_beside_two_row_linears(name, monkeypatch):
    """Otherwise the second one, which loads its weights while the first one ends, would wait for this kernel."""
    launcher, args, kwargs = CALLS[name]
    for launch in record(monkeypatch, launcher, *args, **kwargs):
        used = cubins.quarter_of_registers(launch.options["num_warps"], launch.resources(90)["REG"])
        assert used <= cubins.LEFT_BESIDE_ROW_LINEAR
