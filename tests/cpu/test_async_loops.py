"""An AsyncEngine and several event loops: one at a time, one after the other, and loops that are left or closed; and
the thread and stream on which a prompt is read.
"""

import asyncio
import threading
import time

import pytest
import torch

from orthrus_rt.aio import AsyncEngine
from orthrus_rt.breaks import Breaks
from tests.engines import a_beginning_each
from tests.shared_engine import GREEDY, LONG, collect, collect_rest, make, slowly

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]


def test_one_event_loop_at_a_time(folder, alone):
    want, errors, shared = alone([1, 2], GREEDY), [], AsyncEngine(make(folder))
    for _ in range(2):
        assert asyncio.run(collect(shared, [1, 2], GREEDY))[0] == want

    def elsewhere():
        for use in (collect(shared, [3], GREEDY), shared.close()):
            try:
                asyncio.run(use)
            except RuntimeError as error:
                errors.append(str(error))

    async def main():
        stream = shared.stream([1, 2], GREEDY)
        tokens = (await anext(stream)).new_token_ids
        await asyncio.wait_for(asyncio.to_thread(elsewhere), 20)
        assert tokens + [t async for out in stream for t in out.new_token_ids] == want
        await shared.close()

    asyncio.run(main())
    assert errors == ["this AsyncEngine is in use by another event loop"] * 2


def test_a_loop_that_is_left_without_being_closed(folder, alone):
    """A step may still be running when run_until_complete returns."""
    shared, loops = AsyncEngine(make(folder)), [asyncio.new_event_loop() for _ in range(2)]
    for loop in (*loops, *loops):
        got = loop.run_until_complete(asyncio.wait_for(collect(shared, [1, 2], GREEDY), 20))
        assert got[0] == alone([1, 2], GREEDY)
    loops[1].run_until_complete(shared.close())
    for loop in loops:
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_streams_of_a_loop_that_another_one_takes_over_from_end_with_an_error(folder, alone, monkeypatch):
    """No tokens are lost silently, and what still waits or runs in the first loop disturbs no other stream."""
    shared, (first, second, third) = AsyncEngine(make(folder)), [asyncio.new_event_loop() for _ in range(3)]
    slowly(shared, monkeypatch)
    long = LONG
    stream, left, want = shared.stream([1, 2], long), shared.stream([3], long), alone([1, 2], long)
    with a_beginning_each(shared.engine):
        got = first.run_until_complete(anext(stream)).new_token_ids
        waits = first.create_task(collect_rest(left))
        first.run_until_complete(asyncio.sleep(0))
        other = shared.stream([1, 2], long)
        also = second.run_until_complete(anext(other)).new_token_ids
    first.run_until_complete(asyncio.sleep(0.05))  # what was on its way to this loop reaches no reader
    also += second.run_until_complete(collect_rest(other))
    assert got == want[: len(got)] and also == want
    for task in (collect_rest(stream), waits):
        with pytest.raises(RuntimeError, match="another event loop has taken this AsyncEngine over"):
            first.run_until_complete(task)
    assert not shared._waiting and not shared._known_as

    with a_beginning_each(shared.engine):
        waits = first.create_task(anext(shared.stream([3], long)))
        first.run_until_complete(asyncio.sleep(0))
        first.close()
        last = shared.stream([1, 2], long)
        got = third.run_until_complete(anext(last)).new_token_ids
    assert got + third.run_until_complete(collect_rest(last)) == want
    third.run_until_complete(shared.close())
    assert shared.engine.metrics.finished["abort"] == 3
    for loop in (second, third):
        loop.close()


@pytest.mark.parametrize("wait", (0, 0.5), ids=("at once", "later"))
def test_a_close_whose_loop_ends_before_it_is_through(folder, caplog, wait):
    """The worker thread still ends, and closing once more, in another loop, is harmless."""
    shared = AsyncEngine(make(folder))
    step, worker, begun, free = shared.engine.step, shared._worker, threading.Event(), threading.Event()
    shared.engine.step = lambda: (begun.set(), free.wait(60), step())[2]

    async def closing():
        stream = asyncio.create_task(shared.generate([1, 2], GREEDY))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(shared.close(), 0.01)
        stream.cancel()

    asyncio.run(closing())
    free.set()
    time.sleep(wait)
    for _ in range(2):
        asyncio.run(asyncio.wait_for(shared.close(), 20))
    for thread in worker._threads:
        thread.join(20)
        assert not thread.is_alive()
    # Tasks that other tests left in closed loops cause complaints whenever they are collected.
    said = [record.getMessage() for record in caplog.records]
    assert shared.engine.closed and all(what.startswith("Task was destroyed") for what in said)


def test_streams_of_a_loop_that_stands_still_hear_of_a_close_that_ends_meanwhile(folder):
    shared, loop = AsyncEngine(make(folder)), asyncio.new_event_loop()
    waits = loop.create_task(collect(shared, [1, 2], LONG))
    step, free = shared.engine.step, threading.Event()
    shared.engine.step = lambda: (free.wait(60), step())[1]
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.create_task(shared.close())
    loop.run_until_complete(asyncio.sleep(0))
    free.set()
    asyncio.run(asyncio.wait_for(shared.close(), 20))
    with pytest.raises(RuntimeError, match="this engine is closed"):
        loop.run_until_complete(asyncio.wait_for(waits, 20))
    loop.close()


def test_what_is_left_to_a_loop_that_is_closed_is_aborted(folder):
    shared, loop = AsyncEngine(make(folder)), asyncio.new_event_loop()
    stream = shared.stream([1, 2], LONG)
    step, free = shared.engine.step, threading.Event()
    begun = threading.Event()
    shared.engine.step = lambda: (step(), begun.set(), free.wait(60))[0]
    left = loop.create_task(anext(stream))
    loop.run_until_complete(asyncio.sleep(0))
    assert begun.wait(60)
    loop.close()
    free.set()
    end = time.monotonic() + 60
    while shared.engine.has_unfinished() and time.monotonic() < end:
        time.sleep(0.001)
    assert shared.engine.metrics.finished == {"stop": 0, "length": 0, "abort": 1, "error": 0}
    del left
    asyncio.run(shared.close())


@pytest.mark.parametrize("what", ("steps", "thread"))
def test_failures_that_a_loop_was_to_hear_of_reach_no_stream_of_the_next(folder, alone, monkeypatch, what):
    """This covers failures of steps, which go to the streams in them, and of the thread, which go to all that wait."""
    shared, (first, second) = AsyncEngine(make(folder)), [asyncio.new_event_loop() for _ in range(2)]
    left = first.create_task(anext(shared.stream([3], GREEDY)))
    with monkeypatch.context() as patch:
        failed, enough = [], 3 if what == "steps" else 1
        where = (shared.engine, "_advance") if what == "steps" else (shared, "_step_once")
        patch.setattr(*where, lambda: failed.append(1) or 1 / 0)
        first.run_until_complete(asyncio.sleep(0))
        while len(failed) < enough:
            time.sleep(0.001)
        shared._worker.submit(lambda: None).result(20)  # the last failure has been reported
        assert shared.engine.metrics.finished["error"] == (what == "steps")
    stream = shared.stream([1, 2], GREEDY)
    waits = second.create_task(anext(stream))
    second.run_until_complete(asyncio.sleep(0))
    first.run_until_complete(asyncio.sleep(0.01))
    tokens = second.run_until_complete(asyncio.wait_for(waits, 20)).new_token_ids
    assert tokens + second.run_until_complete(collect_rest(stream)) == alone([1, 2], GREEDY)
    with pytest.raises((RuntimeError, ZeroDivisionError)):  # whichever came first
        first.run_until_complete(left)
    second.run_until_complete(shared.close())
    for loop in (first, second):
        loop.close()


def test_a_tensors_ids_are_read_by_the_caller(folder, alone):
    """In the caller's thread, on whose stream they were computed, before the engine makes its own stream current."""
    reads = []

    class Ids(torch.Tensor):
        def cpu(self):
            reads.append((threading.get_ident(), dict(engine.turn.holder)))
            return self.as_subclass(torch.Tensor)

        def tolist(self):
            return self.cpu().tolist()

    engine, prompt = make(folder), torch.tensor([1, 2, 3]).as_subclass(Ids)
    engine.abort(engine.submit(prompt, GREEDY))
    engine.step()
    engine.next_logits(prompt)

    async def main():
        async with AsyncEngine(engine) as shared:
            assert (await collect(shared, prompt, GREEDY))[0] == alone([1, 2, 3], GREEDY)

    asyncio.run(main())
    assert reads == [(threading.get_ident(), {})] * 3


def test_loops_of_two_threads_take_over_one_after_the_other(folder, alone, monkeypatch):
    """Otherwise both would own the AsyncEngine, and one would change what the other is about to clear."""
    shared, taking, most, together = AsyncEngine(make(folder)), [], [], threading.Barrier(2)
    asyncio.run(collect(shared, [1, 2], GREEDY))
    fail = shared._fail

    def slowly_fail(error):
        taking.append(error)
        most.append(len(taking))
        time.sleep(0.1)
        fail(error)
        taking.remove(error)

    monkeypatch.setattr(shared, "_fail", slowly_fail)
    got = []

    def use():
        together.wait()
        try:
            got.append(asyncio.run(collect(shared, [1, 2], GREEDY))[0])
        except RuntimeError as error:
            got.append(str(error))

    threads = [threading.Thread(target=use) for _ in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    monkeypatch.undo()
    asyncio.run(shared.close())
    right = alone([1, 2], GREEDY)
    assert max(most) == 1 and right in got
    assert all(it in (right, "this AsyncEngine is in use by another event loop") for it in got)


def test_a_call_that_raises_what_no_future_takes(folder):
    async def main():
        async with AsyncEngine(make(folder)) as shared:
            with pytest.raises(RuntimeError, match="raised StopIteration"):
                await asyncio.wait_for(shared.call(lambda engine: next(iter([]))), 20)

    asyncio.run(main())


def test_a_drain_from_another_loop_is_refused_and_begins_nothing(folder):
    shared = AsyncEngine(make(folder))

    async def main():
        await anext(shared.stream([1, 2], GREEDY))
        with pytest.raises(RuntimeError, match="in use by another event loop"):
            await asyncio.to_thread(lambda: asyncio.run(shared.close(drain=True)))
        assert (await shared.generate([3], GREEDY)).finish_reason == "length"
        await shared.close()

    asyncio.run(main())


def test_every_loop_takes_breaks_of_its_own(folder, monkeypatch):
    shared, begun, begin = AsyncEngine(make(folder)), [], Breaks.begin
    monkeypatch.setattr(Breaks, "begin", lambda breaks: (begun.append(breaks._loop), begin(breaks)))

    async def use():
        await shared.generate([1, 2], GREEDY)
        assert begun.pop() is asyncio.get_running_loop()

    for _ in range(2):
        asyncio.run(use())
    asyncio.run(shared.close())
