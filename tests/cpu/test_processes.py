"""An engine in forked children and among threads, each in a process of its own that has a time limit."""

import subprocess
import sys

import pytest

from tests import apart

pytestmark = pytest.mark.native

FORK = """
import os, sys, time, torch, orthrus_rt
torch.set_num_threads(2)
make = lambda: orthrus_rt.Engine.from_pretrained({folder!r}, device="cpu", mode="two_pass", max_seq_len=64)
params = orthrus_rt.SamplingParams(12, ignore_eos=True, repetition_penalty=1.2, temperature=0.7, seed=1)
engine = make()
decoded = lambda e: (out := e.generate([1, 2, 3], params), (out.token_ids, out.stats.cycles))[1]
want = decoded(engine)
torch.ones(500, 500) @ torch.ones(500, 500)  # by all threads of torch's pool, which no child has
child = os.fork()
if not child:
    os._exit(any(decoded(e) != want for e in (engine, make())))
for _ in range(600):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the child hangs")
"""

THREADS = """
import orthrus_rt, threading
engine = orthrus_rt.Engine.from_pretrained({folder!r}, device="cpu", max_seq_len=64)
seen, together = [], threading.Barrier(8)
def look():
    together.wait()
    seen.append(engine.tokenizer)
threads = [threading.Thread(target=look) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert len(seen) == 8 and len(set(map(id, seen))) == 1
"""


ASYNC_FORK = """
import asyncio, os, sys, orthrus_rt
shared = orthrus_rt.AsyncEngine(orthrus_rt.Engine.from_pretrained({folder!r}, device="cpu", max_seq_len=64))
params = orthrus_rt.SamplingParams(4)
asyncio.run(shared.generate([1, 2], params))
child = os.fork()
if not child:
    try:
        asyncio.run(asyncio.wait_for(shared.generate([1, 2], params), 20))
    except RuntimeError as error:
        os._exit("another process" not in str(error))
    os._exit(2)
asyncio.run(shared.close())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
# What a thread holds at the fork is never released in the child, where that thread does not exist.
HELD = """
import os, signal, sys, threading, orthrus_rt
from orthrus_rt import capture, engine as module, huge_pages
make = lambda: orthrus_rt.Engine.from_pretrained({folder!r}, device="cpu", max_seq_len=64)
engine, held, through = make(), threading.Event(), threading.Event()
want, one = engine.generate([1, 2, 3]).token_ids, orthrus_rt.SamplingParams(1)
def hold():
    with module._loading_a_tokenizer.held(), huge_pages.arena.lock.held(), capture._one_at_a_time.held(), engine.turn:
        held.set()
        through.wait()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(100)
    with capture._one_at_a_time.held():
        right = engine.generate([1, 2, 3]).token_ids == want == make().generate([1, 2, 3]).token_ids
    os._exit(not right or not engine.tokenizer("a").input_ids)
status = os.waitpid(child, 0)[1]
try:
    engine.generate([1], one)
    sys.exit("the turn was not held")
except RuntimeError as error:
    assert "in use by another thread" in str(error), error
through.set()
sys.exit(os.waitstatus_to_exitcode(status))
"""

ATEXIT = """
import asyncio, atexit, orthrus_rt
shared = orthrus_rt.AsyncEngine(orthrus_rt.Engine.from_pretrained({folder!r}, device="cpu", max_seq_len=64))
asyncio.run(shared.generate([1, 2], orthrus_rt.SamplingParams(4)))
@atexit.register
def close():
    for _ in range(2):
        asyncio.run(shared.close())
    print("closed", shared.engine.closed)
"""

CODES = {
    "a forked child": FORK, "a tokenizer's first users": THREADS, "a shared engine in a child": ASYNC_FORK,
    "locks that were held at a fork": HELD,
}  # fmt: skip


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_in_a_process_of_its_own(text_folder, code):
    apart.run(code.format(folder=text_folder))


def test_closed_as_the_process_ends(text_folder):
    """In a subprocess, as children of multiprocessing do not run exit handlers."""
    code = ATEXIT.format(folder=text_folder)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed True\n", "")
