"""Memory traffic of every kernel at the shapes of Qwen3-8B: ``python -m tests.ptx.traffic``.

The widths are real except in row_linear, where fewer CTAs have as many units of work each as an H100's 132.
"""

import json
import os
from importlib.metadata import version

import pytest
import torch

from bench.bench_consensus import Case as ConsensusCase
from bench.bench_process_logits import EDITED, FILTERS
from bench.bench_process_logits import Case as LogitsCase
from orthrus_rt import native
from orthrus_rt import state as st
from tests import consensus_states
from tests.attention_pass import Heads, Pass
from tests.cpu import test_row_linear_on_host as rl
from tests.rows import ar, diff, make_rows

pytest.importorskip("triton")
from orthrus_rt.triton_kernels import count_tokens, embed, pdl, process_logits, rms_norm
from tests.triton_pass import TritonPass

ARCH = os.environ.get("PTX_ARCH", "")
HIDDEN, VOCABULARY, SMS = 4096, 151936, 132
HEADS = Heads(32, 8, 128)
ROWS = (1, 4, 16, 64, 128)
# Allowed sectors beyond the minimum, as a share of it: half-filled sectors of outputs, weights of 4 bytes with
# rows of 2, loads under a mask of any length, columns of small tables.
EXCESS = {"dual_attn_fold": 0.21, "rms_norm": 0.51, "_cut_kernel": 3.0, "consensus": 0.17}
NEWER = tuple(map(int, version("triton").split(".")[:2])) >= (3, 8)  # older ones convert layouts with bank conflicts
PDL = {"PDL": True, "launch_pdl": True} if ARCH == "90a" else {"PDL": False}


@pytest.fixture(autouse=True)
def shapes(host, request, monkeypatch):
    """Counts the kernels of each test separately, and checks for few excess sectors and no bank conflicts."""
    from tests.ptx import traffic
    from tests.ptx.plugin import LIBRARY

    host.num_sms = SMS
    monkeypatch.setenv("ORTHRUS_CUDA_ISA", "sm90" if ARCH == "90a" else "sm80")
    monkeypatch.setattr(pdl, "launch_options", lambda device: PDL)
    LIBRARY.ptx_traffic(1)
    yield
    for name, counts in LIBRARY.traffic().items():
        allowed = next((share for part, share in EXCESS.items() if part in name), 0.1)
        assert traffic.figures_of(counts)["excess sectors %"] <= 100 * allowed, name
        if name.startswith("_Z") or NEWER:  # C++, or a newer Triton
            assert traffic.figures_of(counts)["bank conflicts"] == "none", name
    if path := os.environ.get("PTX_COUNTS"):
        with open(path, "a") as file:
            file.write(json.dumps([request.node.name.removeprefix("test_"), LIBRARY.traffic()]) + "\n")
    LIBRARY.ptx_traffic(0)


# in_features, out_features, SMs: 24 units per CTA in cut tiles of two blocks, as in qkv (23), o (16) and down (47).
CUT = (1024, 3072, 16)
TILE_OF_MANY = {190: 192, 200: 128}  # one tile of 192 rows, or two of 128, for 24 pairs of blocks
QKV = (4096, 6144, 132)
# Whole tiles of two blocks, as for the vocabulary, with 32 units instead of 64.
WHOLE = (2048, 3200, 25)


@pytest.mark.parametrize("rows", [*ROWS, 112, *TILE_OF_MANY])
@pytest.mark.parametrize("epilogue", ["none", "residual", "silu_mul"])
def test_row_linear_cut(epilogue, rows):
    if epilogue != "none" and rows not in (1, 16, 128):
        pytest.skip("one epilogue has all rows")
    k, n, sms = CUT
    residual = rl.tensor(rows, n) if epilogue == "residual" else None
    rl.run(rl.tensor(rows, k), rl.tensor(n, k), epilogue, residual=residual, sms=sms)
    if ARCH == "90a" and rows in TILE_OF_MANY:
        from tests.ptx.plugin import LIBRARY

        assert any(f"Li{TILE_OF_MANY[rows]}ELb1ELb0" in name for name in LIBRARY.traffic())


@pytest.mark.parametrize("rows", [*ROWS, 200])
def test_row_linear_coded(rows, monkeypatch):
    k, n, sms = CUT
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
    rl.run(rl.tensor(rows, k), rl.tensor(n, k), sms=sms)


@pytest.mark.parametrize("rows", [1, 16])
def test_row_linear_draft(rows, monkeypatch):
    """What trails in coded blocks, a third of the bytes, is not read; x and partial sums are."""
    from tests.ptx import traffic
    from tests.ptx.plugin import LIBRARY

    k, n, sms = CUT
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
    weight = rl.pack(rl.tensor(n, k))
    rl.run(rl.tensor(rows, k), weight, sms=sms, exact=False)
    (counts,) = LIBRARY.traffic().values()
    assert 0.67 * weight.nbytes < counts["distinct_read"] * traffic.SECTOR < 0.71 * weight.nbytes


@pytest.mark.parametrize("rows", [2, 16])
def test_row_linear_drafts_beside_exact_rows(rows, monkeypatch):
    """All of the weight of the exact rows, and of the diffusion view's as many bytes as drafts need."""
    from tests.ptx import traffic
    from tests.ptx.plugin import LIBRARY

    k, n, sms = CUT
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
    weight, short = rl.pack(rl.tensor(n, k, seed=1)), rl.pack(rl.tensor(n, k, seed=2), bits=8)
    assert 0.66 * weight.nbytes < short.nbytes < 0.68 * weight.nbytes
    rl.run(rl.tensor(rows, k), weight, diff=short, num_rows_ar=rows // 2, sms=sms)
    (counts,) = LIBRARY.traffic().values()
    both = weight.nbytes + short.nbytes
    assert both < counts["distinct_read"] * traffic.SECTOR < 1.05 * both


def test_row_linear_qkv():
    k, n, sms = QKV
    rl.run(rl.tensor(16, k), rl.tensor(n, k), sms=sms)


@pytest.mark.parametrize(("rows", "epilogue"), [(1, "argmax"), (16, "argmax"), (256, "argmax"), (16, "logits")])
def test_row_linear_whole(rows, epilogue):
    k, n, sms = WHOLE
    rl.run(rl.tensor(rows, k), rl.tensor(n, k), epilogue, sms=sms)
    if ARCH == "90a" and rows == 256:
        from tests.ptx.plugin import LIBRARY

        assert any("Li256ELb0ELb0" in name for name in LIBRARY.traffic())


def test_row_linear_of_two_views():
    k, n, sms = CUT
    rl.run(rl.tensor(32, k), rl.tensor(n, k, seed=1), diff=rl.tensor(n, k, seed=2), num_rows_ar=16, sms=sms)


PASSES = {
    **{f"{n}-rows": [ar(0, 500, n)] for n in ROWS},
    "16-drafts": [diff(0, 500, 16)],
    "16-sequences": [ar(s, 300 + 16 * s, 1) for s in range(16)],
    "one-pass": [ar(0, 500, 16), *(diff(0, 500 + k, 16) for k in range(4))],
    "prompt-of-300": [ar(0, 0, 300)],
}


@pytest.mark.parametrize("name", PASSES)
def test_dual_attn(name, host):
    if name.startswith("prompt"):
        host.num_sms = 8  # more units than SMs, as with a long prompt
    Pass(HEADS, PASSES[name], "cpu", blocks_per_seq=4 if name == "one-pass" else 1).run()
    if name == "one-pass" and ARCH == "90a":
        from tests.ptx import traffic
        from tests.ptx.plugin import LIBRARY

        split = next(counts for kernel, counts in LIBRARY.traffic().items() if "split" in kernel)
        assert traffic.figures_of(split)["read so often"] < 3.4  # block by block it would be 4.9


@pytest.mark.parametrize("name", ["1-rows", "64-rows"])
def test_triton_dual_attn(name):
    TritonPass(HEADS, PASSES[name], "cpu").run()


@pytest.mark.parametrize("rows", ROWS)
def test_qkv_commit(rows):
    plan = make_rows([ar(0, 100, rows - rows // 2), diff(0, 100 + rows, rows // 2)] if rows > 1 else [ar(0, 100, 1)])
    heads, width = HEADS.q + 2 * HEADS.kv, HEADS.dim
    pages = [torch.empty(8, HEADS.kv, 64, width, dtype=torch.bfloat16) for _ in range(2)]
    scratch = [torch.empty(rows, HEADS.kv, width, dtype=torch.bfloat16) for _ in range(2)]
    weights = tuple(torch.ones(width) for _ in range(4))
    native.qkv_commit(
        rl.tensor(rows, heads * width), plan, torch.ones(400, width), weights, 1e-6, *pages,
        torch.arange(8, dtype=torch.int32)[None], *scratch, torch.empty(rows, HEADS.q, width, dtype=torch.bfloat16),
    )  # fmt: skip


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("block_len", [1, 16])
def test_consensus(block_len, slots):
    ConsensusCase(slots, block_len, SMS, "cpu").call()


def test_consensus_of_one_pass():
    generator = torch.Generator().manual_seed(0)
    slots, block_len, fan_out = 4, 16, 4
    state = consensus_states.random_state(generator, slots, block_len, fan_out)
    partials = consensus_states.random_partials(generator, slots * block_len * (1 + fan_out), SMS, ties=False)
    rows = consensus_states.staged_rows(slots, block_len, st.NEXT_ONE_PASS, fan_out)
    native.consensus(
        state, partials, st.STEP_VERIFY_AND_DRAFT, st.NEXT_ONE_PASS, rows, consensus_states.MASK, block_len, fan_out
    )


@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(rows):
    x = rl.tensor(rows, HIDDEN)
    rms_norm.rms_norm(x, torch.ones(HIDDEN), 1e-6, torch.empty_like(x))


@pytest.mark.parametrize("rows", ROWS)
def test_embed(rows):
    token = torch.arange(rows, dtype=torch.int32) * 7 % 150
    embed.embed(token, rl.tensor(150, HIDDEN), torch.empty(rows, HIDDEN, dtype=torch.bfloat16))


@pytest.mark.parametrize("filters", [*FILTERS, EDITED])
def test_process_logits(filters):
    case = LogitsCase(2, VOCABULARY, FILTERS.get(filters, FILTERS["top-p 0.95"]), "cpu", edited=filters == EDITED)
    case._run(process_logits.process_logits, case.logits, case.partials)


def test_count_tokens():
    state = st.SlotState.allocate(4, 16, 64, 8, "cpu")
    state.output.copy_(torch.arange(256).view(4, 64))
    state.num_output.fill_(40)
    edits = st.SlotEdits.allocate(4, VOCABULARY, 32, torch.full((4, 8), -1, dtype=torch.int32))
    edits.num_counted.fill_(30)
    count_tokens.count_tokens(state, edits)
