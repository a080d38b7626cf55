"""The native CPU ops with other numbers of threads and other instruction sets."""

import os
import re
import subprocess
import sys

import pytest
import torch

from orthrus_rt import dispatch, ops, weights
from tests import apart
from tests.native_cpu import poison, randn, threads
from tests.native_layer import Layer
from tests.rows import ar, make_rows


def test_flushing_of_subnormal_numbers_changes_no_bit():
    """Neither in the caller's mode nor in that of the thread which started a worker, be it for an op or to pack a
    weight; and the caller's own mode stays.
    """
    code = """
import torch
from orthrus_rt import dispatch, ops, weights
tiny = torch.tensor([8e-39])

def check(dtype):
    generator = torch.Generator().manual_seed(1)
    weight = weights.pack(torch.randn(256, 64, generator=generator).to(dtype), impl="cpu")
    x = (torch.randn(20, 64, generator=generator) * tiny).to(dtype)
    want, got = torch.empty(20, 256), torch.empty(20, 256)
    torch.set_num_threads(1)
    ops.row_linear(x, weight, want, epilogue="logits")
    for num_threads, flush in ((1, True), (2, True), (2, False), (3, False), (3, True)):
        torch.set_num_threads(num_threads)
        try:
            torch.set_flush_denormal(flush)
            for _ in range(40):
                ops.row_linear(x, weight, got.fill_(7), epilogue="logits")
                assert torch.equal(got.view(torch.int32), want.view(torch.int32)), (dtype, num_threads, flush)
            assert bool((tiny * 0.5).view(torch.int32)) != flush
        finally:
            torch.set_flush_denormal(False)
    return bool(want.any())

if not torch.set_flush_denormal(True):  # not on this machine
    raise SystemExit
plain = torch.ones(256, 64, dtype=torch.bfloat16)
dispatch.extension().cpu.set_num_threads(2)
dispatch.extension().cpu.WeightEncoder(plain.data_ptr(), 8, 32, 12)
torch.set_flush_denormal(False)
assert check(torch.float32)
check(torch.bfloat16)  # some instructions take such numbers for zeros, always
"""
    apart.run(code)


def test_numbers_of_threads_by_turns(isa):
    """More threads than there are cores, fewer and one: the pool keeps the others for later."""
    want = Layer()
    want.run()
    layer = Layer()
    for count in (1, 5, 2, 3, 1, 4, 5, 2) * 5:
        with threads(count):
            layer.logits.fill_(torch.nan)
            layer.run()
        assert torch.equal(layer.logits, want.logits), count


def isa_of(**env):
    code = "from orthrus_rt import _native; print(_native.cpu.isa())"
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)


def test_isa_override():
    assert isa_of(ORTHRUS_CPU_ISA="portable").stdout == "portable\n"
    assert isa_of(ORTHRUS_CPU_ISA="").returncode == 0  # as if it were not set
    wrong = isa_of(ORTHRUS_CPU_ISA="sse9")
    assert wrong.returncode
    assert re.search(r"ORTHRUS_CPU_ISA: must be one of (\w+, )+portable, got sse9", wrong.stderr)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        dispatch.extension().cpu.set_isa(None)
    tiles = isa_of(ORTHRUS_CPU_ISA="amx_bf16")
    assert tiles.stdout == "amx_bf16\n" or "got amx_bf16" in tiles.stderr


def test_torch_and_the_ops_take_turns(isa):
    """torch's own bf16 products configure the same tile registers on the same threads."""
    want = Layer()
    want.run()
    a, b = randn(64, 96, seed=7), randn(96, 80, seed=8)
    product, layer = a @ b, Layer()
    for _ in range(20):
        layer.run()
        assert torch.equal(a @ b, product)
        assert torch.equal(layer.logits, want.logits)


def test_avx512_rounds_as_avx2_does(element):
    """They agree to the bit: what tests pin for one of them holds for both."""
    cpu = dispatch.extension().cpu
    before, got = cpu.isa(), {}
    for isa in ("avx2", "avx512"):
        try:
            cpu.set_isa(isa)
        except RuntimeError as error:
            pytest.skip(str(error))
        try:
            got[isa] = some_of_everything()
        finally:
            cpu.set_isa(before)
    for mine, other in zip(got["avx512"], got["avx2"], strict=True):
        assert torch.equal(mine, other) and not bool(mine.isnan().any())


def some_of_everything():
    """Outputs of every op that rounds: odd shapes, all epilogues, attention over several splits."""
    layer = Layer()
    layer.run()
    x, weight, gates = randn(23, 97, seed=9), randn(70, 97, seed=10), randn(70, 97, seed=11)
    packed, silu = weights.pack(weight, impl="cpu"), weights.pack(gates, gate_up=True, impl="cpu")
    added, gated = randn(23, 70, seed=12), poison(23, 35)
    ops.row_linear(x, packed, added, residual=added, epilogue="residual")
    ops.row_linear(x, silu, gated, epilogue="silu_mul")
    best = torch.empty(23, 1), torch.empty(23, 1, dtype=torch.int32)
    ops.row_linear(x, packed, best, epilogue="argmax")
    rows = make_rows([ar(0, 1100, 17)])
    pages, table = randn(2, 19, 2, 64, 64, seed=13), torch.arange(1, 19, dtype=torch.int32).view(1, 18)
    q, none, attended = randn(17, 6, 64, seed=14), randn(0, 2, 64), poison(17, 6, 64)
    with threads(2):
        ops.dual_attn(q, *pages, table, none, none, rows, 0.125, attended, max_seq_len=1152)
    return [layer.logits, layer.pages, added, gated, *best, attended]
