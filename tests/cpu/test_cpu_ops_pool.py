"""The threads of the native CPU ops: sharing between callers, forks, and lack of memory for them."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orthrus_rt import dispatch, ops, weights
from tests import apart
from tests.native_cpu import poison, randn, threads
from tests.native_layer import Layer


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
            ops.row_linear(x, weight, out.fill_(torch.nan))  # long enough for two to overlap
            assert torch.equal(out, product)

    with threads(2), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, layers, outs))
    assert all(torch.equal(layer.logits, want.logits) for layer in layers)


def test_a_short_op_does_not_wait_for_a_long_one():
    """While another Python thread's op has the pool, it runs on the calling thread alone."""
    weight, x = weights.pack(randn(4096, 2048, seed=1).float(), impl="cpu"), randn(2000, 2048, seed=2).float()
    small, y, out = weights.pack(randn(640, 64, seed=3), impl="cpu"), randn(9, 64, seed=4), poison(9, 640)
    product = poison(2000, 4096, dtype=torch.float32)
    long = threading.Thread(target=ops.row_linear, args=(x, weight, product))
    with threads(2):
        long.start()
        time.sleep(0.02)
        ops.row_linear(y, small, out)
        assert bool(product.isnan().any())
        long.join()
    assert not bool(product.isnan().any())


def test_more_threads_than_stretches():
    """With more than 256 threads, some share a stretch."""
    code = """
import torch
from orthrus_rt import ops, weights
from tests.native_cpu import poison, randn
packed, x = weights.pack(randn(40000, 8, seed=1), impl="cpu"), randn(1, 8, seed=2)
got, want = poison(1, 40000), poison(1, 40000)
ops.row_linear(x, packed, want)
torch.get_num_threads = lambda: 300  # to set it would start threads of torch's
for _ in range(20):
    ops.row_linear(x, packed, got.fill_(torch.nan))
    assert torch.equal(got, want)
"""
    apart.run(code)


def test_ops_run_in_a_forked_child():
    """The pool's threads do not survive a fork: the child starts its own."""
    code = """
import os
from tests.native_layer import Layer
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
    """As many threads as torch has, even if they were asleep before."""
    apart.run(WHO_TAKES_PART)


@accounts
def test_who_takes_part_in_a_forked_child():
    """Threads of the child's own, even if an op of another thread was running."""
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
    """While an op, a replay, or the conversion of a weight to 12 bits takes its time."""
    cpu = dispatch.extension().cpu
    weight, x = weights.pack(randn(2048, 2048, seed=1).float(), impl="cpu"), randn(300, 2048, seed=2).float()
    plain, coded = randn(4 * 64 * 2048, 64, seed=3), torch.empty(4 * 64 * 2048 * 64).bfloat16()
    out, encoder, tape = torch.empty(300, 2048), cpu.WeightEncoder(plain.data_ptr(), 4 * 2048, 64, 12), cpu.Tape()

    def op():
        ops.row_linear(x, weight, out)

    with tape:
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
    calls["encode"] = lambda: cpu.WeightEncoder(plain.data_ptr(), 4 * 2048, 64, 12)
    with threads(1):
        for name, call in calls.items():
            turns = [turns_beside(call) for _ in range(9)]
            assert sorted(turns)[4] > 2, (name, turns)


def test_a_worker_without_memory():
    """No room for a row's scratch: the op raises once all threads have left it, and the next op is complete."""
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
    """No room for the rows that the caller widens: the op raises before any other thread begins."""
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
    """The op raises and says so; those that were started stay, and with memory again it runs on all threads."""
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
