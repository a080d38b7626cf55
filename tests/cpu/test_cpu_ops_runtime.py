"""The machinery under the CPU ops: the tape, threads, forks and the choice of the ISA variant."""

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orthrus_rt import dispatch, ops, recording, weights
from tests import apart
from tests.native_cpu import poison, randn, threads
from tests.rows import ar, diff, make_rows


class Layer:
    """One layer's ops over fixed buffers: 20 AR rows of slot 0, a block of 4 rows of slot 1."""

    def __init__(self):
        self.rows = make_rows([ar(0, 60, 20), diff(1, 5, 4)])
        n = self.rows.num_rows
        self.rows.token.copy_(torch.arange(n))
        self.table = randn(40, 64, seed=1)
        self.norm = torch.rand(64, generator=torch.Generator().manual_seed(2))
        self.cos_sin = torch.rand(128, 32, generator=torch.Generator().manual_seed(3))
        self.qkv_weight = weights.pack(randn(4 * 32, 64, seed=4, scale=0.1), impl="cpu")
        self.head = weights.pack(randn(40, 64, seed=5), impl="cpu")
        self.pages = randn(2, 5, 1, 64, 32, seed=6)
        self.page_table = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
        self.hidden, self.normed = poison(n, 64), poison(n, 64)
        self.qkv, self.q, self.attn = poison(n, 128), poison(n, 2, 32), poison(n, 2, 32)
        self.sk, self.sv = poison(4, 1, 32), poison(4, 1, 32)
        self.logits = poison(n, 40, dtype=torch.float32)

    def run(self):
        cache = (*self.pages, self.page_table, self.sk, self.sv)
        ops.embed(self.rows.token, self.table, self.hidden)
        ops.rms_norm(self.hidden, self.norm, 1e-5, self.normed)
        ops.row_linear(self.normed, self.qkv_weight, self.qkv)
        ops.qkv_commit(self.qkv, self.rows, self.cos_sin, None, 1e-5, *cache, self.q)
        ops.dual_attn(self.q, *cache, self.rows, 32**-0.5, self.attn, max_seq_len=128)
        flat = self.attn.view(self.rows.num_rows, 64)
        ops.row_linear(flat, self.head, self.logits, epilogue="logits")


def test_tape_replays_what_eager_runs(isa, element):
    """Recording runs nothing; a replay reads what the pointers hold by then and gives eager's bits."""
    eager, taped = Layer(), Layer()
    tape = dispatch.extension().cpu.Tape()
    with tape.record():
        taped.run()
    assert len(tape) == 6
    assert bool(taped.logits.isnan().all())
    for shift in range(3):
        for layer in (eager, taped):
            layer.rows.token.copy_((torch.arange(24) + shift) % 40)
        eager.run()
        tape.replay()
        assert torch.equal(taped.logits, eager.logits)
        assert torch.equal(taped.pages, eager.pages)


def test_a_recording_runs_on_the_threads_that_torch_has_then(monkeypatch):
    seen, layer = [], Layer()  # which the tape points into
    tape = recording.taped(layer.run)
    monkeypatch.setattr(dispatch.extension().cpu, "set_num_threads", seen.append)
    for count in (3, 1):
        with threads(count):
            recording.replay(tape)
    assert seen == [3, 1]


def test_a_tape_takes_in_what_another_replays(isa):
    eager, taped = Layer(), Layer()
    inner, outer = dispatch.extension().cpu.Tape(), dispatch.extension().cpu.Tape()
    with inner.record():
        taped.run()
    with outer.record():
        inner.replay()
        taped.run()
    assert (len(inner), len(outer)) == (6, 12) and bool(taped.logits.isnan().all())
    del inner
    eager.run()
    outer.replay()
    assert torch.equal(taped.logits, eager.logits) and torch.equal(taped.pages, eager.pages)


def filling(out, value):
    """An op that fills ``out`` with ``value``."""
    table, token = torch.full((1, out.shape[1]), float(value)), torch.zeros(len(out), dtype=torch.int32)
    return (lambda: ops.embed(token, table, out)), (table, token)


def test_a_tape_keeps_the_order_and_forgets_what_it_held():
    out = torch.zeros(1, 8)
    (first, _kept), (last, _too) = (filling(out, value) for value in (1, 2))
    inner, outer = dispatch.extension().cpu.Tape(), dispatch.extension().cpu.Tape()
    for begin, end, want in ((first, last, 2), (last, first, 1)):
        with inner.record():
            end()
        with outer.record():
            begin()
            inner.replay()
        assert (len(inner), len(outer)) == (1, 2)
        outer.replay()
        assert out.eq(want).all()


def test_a_tape_records_its_own_thread_alone():
    out, tape = torch.zeros(1, 8), dispatch.extension().cpu.Tape()
    op, _kept = filling(out, 3)
    with tape.record():
        other = threading.Thread(target=op)
        other.start()
        other.join()
    assert len(tape) == 0 and out.eq(3).all()


def test_tape_misuse():
    cpu = dispatch.extension().cpu
    tape = cpu.Tape()
    with tape.record():
        with pytest.raises(RuntimeError, match="another tape is recording"), cpu.Tape().record():
            pass
        with pytest.raises(RuntimeError, match="this tape is recording"):
            tape.replay()
    with pytest.raises(KeyError), tape.record():
        raise KeyError
    tape.replay()
    assert len(tape) == 0


def test_threads_of_python_share_the_pool():
    """Four Python threads inside ops at once: each gets the bits it gets alone."""
    want = Layer()
    want.run()
    layers = [Layer() for _ in range(4)]
    weight, x = weights.pack(randn(640, 640, seed=1), impl="cpu"), randn(64, 640, seed=2)
    product, outs = poison(64, 640), [poison(64, 640) for _ in layers]
    ops.row_linear(x, weight, product)

    def work(layer, out):
        for _ in range(50):
            layer.run()
            ops.row_linear(x, weight, out.fill_(torch.nan))  # long enough for two to meet
            assert torch.equal(out, product)

    with threads(2), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, layers, outs))
    assert all(torch.equal(layer.logits, want.logits) for layer in layers)


def test_ops_run_in_a_forked_child():
    """The pool's threads do not survive a fork: the child starts its own."""
    code = """
import os
from tests.cpu.test_cpu_ops_runtime import Layer
from tests.native_cpu import threads
import torch
with threads(2):
    layer, child = Layer(), Layer()
    layer.run()
    if (pid := os.fork()) == 0:
        child.run()
        os._exit(0 if torch.equal(child.logits, layer.logits) else 3)
    assert os.waitpid(pid, 0)[1] == 0
    child.run()
"""
    apart.run(code)


WHO_TAKES_PART = """
import collections, os, signal, threading, time, torch, traceback
from orthrus_rt import ops, weights
from tests.native_cpu import randn
weight, x = weights.pack(randn(2048, 1024, seed=1).float(), impl="cpu"), randn(1024, 1024, seed=2).float()
out = torch.empty(1024, 2048)

first = threading.Thread(target=int)  # beside which a sanitizer starts one of its own
first.start()
first.join()

def tasks():
    return {int(task) for task in os.listdir("/proc/self/task")}

def time_of(task):
    with open(f"/proc/self/task/{task}/schedstat") as file:
        return int(file.read().split()[0])  # ns

def run(count):
    torch.get_num_threads = lambda: count  # to set it would start threads of torch's
    ops.row_linear(x, weight, out)

def check():
    before = tasks()
    run(4)
    workers = sorted(tasks() - before)
    assert len(workers) == 3, workers
    for count in (4, 3, 2, 4):
        worked, wanted = collections.Counter(), set(workers[: count - 1])
        for _ in range(100):
            time.sleep(0.01)  # until they sleep
            then = {worker: time_of(worker) for worker in workers}
            run(count)
            worked.update(worker for worker in workers if time_of(worker) - then[worker] > 2e6)
            if wanted <= set(worked):
                break
        assert wanted <= set(worked), (count, workers, worked)
        assert all(worked[worker] <= 1 for worker in set(workers) - wanted), (count, workers, worked)  # once by chance

check()
"""


accounts = pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="no time of each thread in /proc")


@accounts
def test_who_takes_part():
    """As many threads as torch has, though they fell asleep before."""
    apart.run(WHO_TAKES_PART)


@accounts
def test_who_takes_part_in_a_forked_child():
    """Threads of its own, also if an op of another thread was under way."""
    code = """
begun, ended = threading.Event(), threading.Event()

def work():
    while not ended.is_set():
        run(2)
        begun.set()

busy = threading.Thread(target=work)
busy.start()
begun.wait()
time.sleep(0.01)
if (pid := os.fork()) == 0:
    signal.alarm(100)
    try:
        check()
    except BaseException:
        traceback.print_exc()
        os._exit(3)
    os._exit(0)
status = os.waitpid(pid, 0)[1]
ended.set()
busy.join()
assert status == 0
"""
    apart.run(WHO_TAKES_PART + code)


def test_other_threads_run_meanwhile():
    """While an op, a replay, or a weight on its way into 12 bits takes its time."""
    cpu = dispatch.extension().cpu
    weight, x = weights.pack(randn(2048, 2048, seed=1).float(), impl="cpu"), randn(300, 2048, seed=2).float()
    plain, coded = randn(4 * 64 * 2048, 64, seed=3), torch.empty(4 * 64 * 2048 * 64).bfloat16()
    out, encoder, tape = torch.empty(300, 2048), cpu.WeightEncoder(plain.data_ptr(), 4 * 2048, 64), cpu.Tape()

    def op():
        ops.row_linear(x, weight, out)

    with tape.record():
        op()

    def turns_beside(call):
        begun, ended, turns = threading.Event(), threading.Event(), 0

        def work():
            begun.set()
            call()
            ended.set()

        worker = threading.Thread(target=work)
        worker.start()
        begun.wait()
        while not ended.is_set():
            time.sleep(1e-3)
            turns += 1
        worker.join()
        return turns

    calls = {"op": op, "replay": tape.replay, "write": lambda: encoder.write(coded.data_ptr())}
    calls["encode"] = lambda: cpu.WeightEncoder(plain.data_ptr(), 4 * 2048, 64)
    with threads(1):
        for name, call in calls.items():
            turns = [turns_beside(call) for _ in range(9)]
            assert sorted(turns)[4] > 2, (name, turns)


def test_a_worker_without_memory():
    """No room for a row's scratch: the op raises once all threads are out of it, and the next one is whole."""
    code = """
import pytest, torch
from orthrus_rt import native, ops, weights
from tests.logits_cases import with_filters
from tests.native_cpu import AddressSpace, randn, threads
case = with_filters(torch.rand(2, 12_000_000), [(1.0, 0, 1.0, 0.0)])  # 48 MB of scratch: more than malloc ever keeps
tiles = -(-case.logits.shape[1] // 128)
best = torch.empty(2, tiles), torch.empty(2, tiles, dtype=torch.int32)
small, y = weights.pack(randn(64, 32, seed=2), impl="cpu"), randn(9, 32, seed=4)
want, got = torch.empty(9, 64).bfloat16(), torch.empty(9, 64).bfloat16()

def process():
    native.process_logits(case.logits, case.rows, case.logit_rows, case.sampling, case.cache_seqlens, 2, best)

with threads(2):
    ops.row_linear(y, small, want)
    space = AddressSpace()
    for _ in range(20):
        with space.and_only(4), pytest.raises(MemoryError):
            process()
        ops.row_linear(y, small, got)
        assert torch.equal(got, want)
    process()
"""
    apart.run(code)


def test_a_caller_without_memory():
    """No room for the rows that it widens: the op raises before any other thread begins."""
    code = """
import pytest, torch
from orthrus_rt import dispatch, ops, weights
from tests.native_cpu import AddressSpace, randn, threads
dispatch.extension().cpu.set_isa("portable")
wide, x = weights.pack(randn(64, 240000, seed=1), impl="cpu"), randn(48, 240000, seed=3)  # 46 MB as floats
out = torch.empty(48, 64).bfloat16()
with threads(2):
    with AddressSpace().and_only(4), pytest.raises(MemoryError):
        ops.row_linear(x, wide, out)
    ops.row_linear(x, wide, out)
"""
    apart.run(code)


def test_threads_started_without_memory():
    """The op raises and says so; those that were started stay, and with memory again it runs on all of them."""
    code = """
import os, pytest, torch
from orthrus_rt import ops, weights
from tests.native_cpu import AddressSpace, randn
weight, x = weights.pack(randn(640, 64, seed=1), impl="cpu"), randn(9, 64, seed=2)
want, got = torch.empty(9, 640).bfloat16(), torch.empty(9, 640).bfloat16()
torch.set_num_threads(2)
ops.row_linear(x, weight, want)
before = len(os.listdir("/proc/self/task"))  # one of the pool's among them
space = AddressSpace()
torch.set_num_threads(30)
for mebibytes in (1, 2, 4, 12, 40):
    for _ in range(3):
        with space.and_only(mebibytes), pytest.raises(RuntimeError) as raised:
            ops.row_linear(x, weight, got)
        told = str(raised.value)
        assert told.startswith("the CPU ops cannot have 30 threads (torch.set_num_threads): the system started "), told
        assert "Resource temporarily unavailable" in told, told
        torch.set_num_threads(2)
        ops.row_linear(x, weight, got.zero_())
        assert torch.equal(got, want)
        torch.set_num_threads(30)
ops.row_linear(x, weight, got.zero_())
assert torch.equal(got, want)
assert len(os.listdir("/proc/self/task")) >= before + 28
"""
    apart.run(code)


def test_flushing_of_subnormal_numbers_changes_no_bit():
    """Neither the caller's nor that of the thread which started a worker, be it for an op or to pack a weight; and the
    caller's own mode stays.
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
dispatch.extension().cpu.WeightEncoder(plain.data_ptr(), 8, 32)
torch.set_flush_denormal(False)
assert check(torch.float32)
check(torch.bfloat16)  # some instructions take such numbers for zeros, always
"""
    apart.run(code)


def test_numbers_of_threads_by_turns(isa):
    """More than there are cores, fewer and one: the pool keeps the others for later."""
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
    assert tiles.stdout == "amx_bf16\n" or re.search("this machine does not offer|got amx_bf16", tiles.stderr)


def test_torch_and_the_ops_take_turns(isa):
    """torch's own bf16 products shape the same tile registers on the same threads."""
    want = Layer()
    want.run()
    a, b = randn(64, 96, seed=7), randn(96, 80, seed=8)
    product, layer = a @ b, Layer()
    for _ in range(20):
        layer.run()
        assert torch.equal(a @ b, product)
        assert torch.equal(layer.logits, want.logits)


def test_avx512_rounds_as_avx2_does(element):
    """To the bit: what tests pin for one of them holds for both."""
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
