"""One engine shared by coroutines: streams that are slow, cancelled, refused, failing or closed, and all others."""

import asyncio
import gc
import logging
import threading
import time
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from orthrus_rt.aio import AsyncEngine
from orthrus_rt.engine import Engine
from orthrus_rt.model import Activations
from orthrus_rt.outputs import Stats
from orthrus_rt.sampling import SamplingParams
from tests.engines import a_beginning_each
from tests.failing import exhausted
from tests.shared_engine import GREEDY, LONG, collect, collect_rest, make, run, slowly

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

SHORT = SamplingParams(max_new_tokens=8, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=20, temperature=0.8, seed=3, ignore_eos=True)


def test_bad_requests_end_alone(folder, alone, monkeypatch, caplog):
    """They disturb no other request, however many there are."""

    async def use(shared):
        monkeypatch.setattr(Activations, "logits", exhausted)
        jobs = [([1, 2], GREEDY), *([([3, 4], SAMPLED)] * 4), ([5], GREEDY)]
        got = await asyncio.gather(*(collect(shared, *job) for job in jobs))
        assert got == [(alone(*job), "length") if job[1] is GREEDY else ([], "error") for job in jobs]

    with caplog.at_level(logging.ERROR, logger="orthrus_rt"):
        run(folder, use)
    assert caplog.text.count("ends: out of memory while making room for logits") == 4


@pytest.mark.parametrize("what", ("prefill", "decode", "begin"))
def test_what_fails_again_and_again_reaches_every_stream(folder, monkeypatch, what):
    async def use(shared):
        await collect(shared, [9], GREEDY)  # these cycles come before the failures, not between them
        monkeypatch.setattr(shared.engine.runner, what, lambda *_: 1 / 0)
        streams = (collect(shared, [i], GREEDY) for i in range(3))
        got = await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 20)
        assert [type(error) for error in got] == [ZeroDivisionError] * 3
        with pytest.raises(ZeroDivisionError):  # the next stream fails too
            await asyncio.wait_for(collect(shared, [1], GREEDY), 20)
        monkeypatch.undo()
        assert (await collect(shared, [1], GREEDY))[1] == "length"

    run(folder, use)


def test_a_slow_reader_of_the_last_piece_costs_nothing(folder):
    async def use(shared):
        steps, real = [], shared.engine.step
        shared.engine.step = lambda: (steps.append(1), real())[1]
        stream = shared.stream([1, 2], GREEDY)
        async for out in stream:
            if out.finished:
                before = len(steps)
                await asyncio.sleep(0.1)
                assert len(steps) <= before + 1  # only the step that was running

    run(folder, use)


def test_cancelled_streams_leave_nothing_to_do(folder):
    async def use(shared):
        waiting = [asyncio.create_task(collect(shared, [i], GREEDY)) for i in range(6)]
        stream = shared.stream([1, 2], LONG)
        await anext(stream)
        for task in waiting:
            task.cancel()
        await stream.aclose()
        just_submitted = asyncio.create_task(collect(shared, [9], GREEDY))
        await asyncio.sleep(0)
        just_submitted.cancel()
        while shared.engine.has_unfinished() or shared._steps:
            await asyncio.sleep(0.01)
        assert shared.engine.kv.num_free_pages == shared.engine.kv.num_pages

    async def within_a_minute(shared):
        await asyncio.wait_for(use(shared), 60)

    run(folder, within_a_minute)


def test_arguments_are_checked_at_the_call(folder):
    async def use(shared):
        with pytest.raises(ValueError, match="prompt_ids must be token ids, got text"):
            shared.stream("text")
        with pytest.raises(ValueError, match="request_id must be a string that is not empty, or None, got ''"):
            shared.stream([1], request_id="")
        with a_beginning_each(shared.engine):
            first = shared.stream([1], GREEDY, request_id="mine")
            assert (await anext(first)).request_id == "mine"
            with pytest.raises(ValueError, match="request_id must be unused, got 'mine' twice"):
                await anext(shared.stream([1], GREEDY, request_id="mine"))
        assert [out.finish_reason async for out in first][-1] == "length"

    run(folder, use)


@pytest.mark.parametrize("kind", (list, np.array, torch.tensor, iter))
def test_a_prompt_may_change_behind_the_call(folder, alone, monkeypatch, kind):
    """For example a buffer that is reused: the worker submits the request later, after the step that is running."""

    async def use(shared):
        slowly(shared, monkeypatch)
        busy = asyncio.create_task(collect(shared, [9], GREEDY))
        await asyncio.sleep(0.05)
        prompt = kind([1, 2, 3])
        first = shared.stream(prompt, GREEDY)
        if kind is not iter:
            prompt[:] = kind([4, 5, 6])
        assert [t async for out in first for t in out.new_token_ids] == alone([1, 2, 3], GREEDY)
        await busy

    run(folder, use)


def test_a_name_is_free_when_its_stream_has_ended(folder, alone):
    """Whether the stream has been read to its end or not, or was cancelled a moment ago."""

    async def use(shared):
        slow = shared.stream([1, 2], GREEDY, request_id="mine")
        tokens = (await anext(slow)).new_token_ids
        while shared._waiting:  # the engine has finished it, its reader has not
            await asyncio.sleep(0.01)
        again = shared.stream([3, 4], GREEDY, request_id="mine")
        first = (await anext(again)).new_token_ids
        assert tokens + await collect_rest(slow) == alone([1, 2], GREEDY)
        assert first + await asyncio.wait_for(collect_rest(again), 20) == alone([3, 4], GREEDY)
        cancelled = shared.stream([5], LONG, request_id="mine")
        await anext(cancelled)
        await cancelled.aclose()
        assert await collect_rest(shared.stream([6], GREEDY, request_id="mine")) == alone([6], GREEDY)

    run(folder, use)


def test_a_name_is_found_without_a_look_at_the_others(folder):
    """With thousands of clients, starting or aborting a stream costs no more than with a few."""
    compared = []

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

    async def use(shared):
        names = [Name(f"client {i}") for i in range(30)]
        streams = [asyncio.create_task(shared.generate([i], GREEDY, name)) for i, name in enumerate(names)]
        await asyncio.sleep(0)
        await asyncio.gather(*map(shared.abort, names))
        await asyncio.gather(*streams)

    run(folder, use)
    assert len(compared) < 30


def test_streams_of_a_closed_engine_end_with_an_error(folder):
    async def use(shared):
        with a_beginning_each(shared.engine):
            stream = shared.stream([1, 2], LONG)
            await anext(stream)
            await shared.close()
        with pytest.raises(RuntimeError, match="this engine is closed"):
            async for _ in stream:
                pass
        with pytest.raises(RuntimeError, match="this engine is closed"):
            shared.stream([1, 2])

    run(folder, use)


@pytest.mark.parametrize("how", ("fails", "is cancelled"))
def test_close_ends_everything_even_if_it(folder, monkeypatch, how):
    async def main():
        shared, begun, free = AsyncEngine(make(folder)), threading.Event(), threading.Event()
        with a_beginning_each(shared.engine):
            stream = shared.stream([1, 2], LONG)
            await anext(stream)
            if how == "fails":
                monkeypatch.setattr(shared.engine.runner, "drop_cycles", lambda: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    await shared.close()
            else:
                shared.engine.step = lambda: begun.set() or (free.wait(60) and [])
                while not begun.is_set():
                    await asyncio.sleep(0.001)
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(shared.close(), 0.01)
                free.set()
                await shared.close()
        assert shared.engine.closed
        with pytest.raises(RuntimeError, match="this engine is closed"):
            async for _ in stream:
                pass

    asyncio.run(main())


@pytest.mark.parametrize("failures", (1, 100))
def test_an_abort_that_fails_is_tried_again(folder, alone, monkeypatch, failures):
    async def use(shared):
        failing, real = iter([True] * failures), shared.engine._abort_named
        monkeypatch.setattr(shared.engine, "_abort_named", lambda i: 1 / 0 if next(failing, False) else real(i))
        with a_beginning_each(shared.engine):
            stream = shared.stream([1, 2], LONG)
            await anext(stream)
            await stream.aclose()
        assert await collect(shared, [3], GREEDY) == (alone([3], GREEDY), "length")
        assert not shared.engine.has_unfinished() and shared.engine.metrics.finished["abort"] == 1

    run(folder, use)


def test_what_a_reader_has_not_come_to_is_one_output(folder, alone):
    """However long the reader takes, outputs do not pile up."""

    async def use(shared):
        with a_beginning_each(shared.engine):
            stream = shared.stream([1, 2], LONG)
            tokens = (await anext(stream)).new_token_ids
        while shared._waiting:
            await asyncio.sleep(0.001)
        (rest,) = [out async for out in stream]
        assert rest.finish_reason == "length" and rest.stats.tokens == 100
        assert tokens + rest.new_token_ids == alone([1, 2], LONG)

    run(folder, use)


def test_nobody_else_calls_an_engine_that_is_shared(folder, alone):
    """Direct calls would take tokens that belong to its streams."""

    async def use(shared):
        engine = shared.engine
        stream = shared.stream([1, 2], GREEDY)
        tokens = (await anext(stream)).new_token_ids
        calls = (engine.step, lambda: engine.submit([1]), lambda: engine.abort("x"), lambda: engine.generate([1]))
        others = (lambda: next(engine.stream([1])), engine.close, lambda: AsyncEngine(engine), engine.memory_report)
        for call in (*calls, *others, engine.explain):
            with pytest.raises(RuntimeError, match="this engine belongs to an AsyncEngine until that is closed"):
                call()
        engine.check([1]), engine.has_unfinished()
        assert engine.metrics.as_dict()["tokens"]
        assert tokens + await collect_rest(stream) == alone([1, 2], GREEDY)
        assert engine.metrics.finished["abort"] == 0  # the refused calls submitted nothing

    run(folder, use)


def test_what_a_stream_does_not_tell_is_asked_for_between_two_steps(folder, alone):
    async def use(shared):
        assert await shared.call(Engine.warmup) is None
        with a_beginning_each(shared.engine):
            stream = shared.stream([1, 2], GREEDY)
            tokens = (await anext(stream)).new_token_ids
            assert (await shared.call(Engine.memory_report))["total"] > 0
            with pytest.raises(RuntimeError, match="warmup: no request may be running"):
                await shared.call(Engine.warmup)
        assert tokens + await collect_rest(stream) == alone([1, 2], GREEDY)

    run(folder, use)


def test_a_request_arrives_when_it_is_asked_for(folder):
    """Its times count from the call, not from when the engine has finished what it is doing."""

    async def use(shared):
        asked = threading.Event()
        busy = asyncio.create_task(shared.call(lambda _: (asked.wait(60), time.sleep(0.3))))
        await asyncio.sleep(0)  # so that the call is under way
        waits = asyncio.create_task(shared.generate([1, 2], GREEDY))
        await asyncio.sleep(0)
        asked.set()
        out = await waits
        await busy
        assert out.stats.queue_seconds > 0.2
        assert shared.engine.metrics.as_dict()["first_token"]["seconds"] > 0.2

    run(folder, use)


@pytest.mark.parametrize(
    ("function", "args", "instead"),
    [
        (Engine.submit, ([1],), "stream"),
        (Engine.stream, ([1],), "stream"),
        (Engine.step, (), "stream"),
        (Engine.generate, ([1],), "generate"),
        (Engine.abort, ("x",), "abort"),
        (Engine.close, (), "close"),
        (partial(Engine.submit, prompt_ids=[1]), (), "stream"),
        (Engine.__exit__, (), "close"),
    ],
)
def test_calls_that_would_disturb_the_streams_are_refused(folder, function, args, instead):
    async def use(shared):
        name = getattr(function, "func", function).__name__
        message = rf"Engine\.{name} would disturb the streams; use AsyncEngine\.{instead}\(\)"
        with pytest.raises(ValueError, match=message):
            await shared.call(function, *args)
        with pytest.raises(TypeError, match=r"call: pass Engine\.explain, which gets the engine as its argument"):
            await shared.call(shared.engine.explain)

    run(folder, use)


def test_a_call_that_submits_all_the_same_is_served_and_one_that_closes_ends_the_streams(folder):
    async def main():
        shared = AsyncEngine(make(folder))
        await shared.call(lambda engine: engine.submit([1, 2], GREEDY))
        while not await shared.call(lambda engine: engine.metrics.finished["length"]):  # although no stream is open
            pass
        waiting = asyncio.create_task(collect(shared, [3], LONG))
        await asyncio.sleep(0)
        await shared.call(lambda engine: engine.close())
        with pytest.raises(RuntimeError, match="this engine is closed"):
            await waiting
        await shared.close()

    asyncio.run(main())


def test_an_engine_outlives_a_shared_one_that_nobody_closed(folder, alone):
    engine = make(folder)
    shared = AsyncEngine(engine)
    assert asyncio.run(collect(shared, [1, 2], GREEDY))[0] == alone([1, 2], GREEDY)
    gone = weakref.ref(shared)
    del shared
    end = time.monotonic() + 60
    while gone() is not None and time.monotonic() < end:  # its thread may still be leaving the last step
        gc.collect()
    assert engine.generate([1, 2], GREEDY).token_ids == alone([1, 2], GREEDY)
    engine.close()
    with pytest.raises(RuntimeError, match="this engine is closed"):
        AsyncEngine(engine)


def test_a_call_that_an_interrupt_has_ended_is_not_in_the_way(folder):
    engine = make(folder)

    def interrupted():
        engine.turn.__enter__()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    asyncio.run(AsyncEngine(engine).close())
    assert engine.closed


def test_outputs_that_cannot_be_handed_out_end_the_streams(folder, alone, monkeypatch):
    async def use(shared):
        with monkeypatch.context() as patch:
            patch.setattr(Stats, "copy", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(collect(shared, [1, 2], GREEDY), 20)
            while await shared.call(Engine.has_unfinished):  # the abort of the stream makes an output too
                await asyncio.sleep(0.01)
        assert (await collect(shared, [1, 2], GREEDY))[0] == alone([1, 2], GREEDY)

    run(folder, use)


def test_a_busy_event_loop_does_not_stall_decoding(folder, alone):
    async def use(shared):
        stream = shared.stream([1, 2], GREEDY)
        tokens, end = (await anext(stream)).new_token_ids, time.monotonic() + 60
        while shared.engine.has_unfinished():  # the loop runs nothing else and never gives up the GIL by itself
            assert time.monotonic() < end
        assert tokens + await collect_rest(stream) == alone([1, 2], GREEDY)

    run(folder, use)


def test_a_loop_that_is_never_idle_does_not_starve_decoding(folder, alone, monkeypatch):
    """It releases the GIL all the time, but never for long enough."""

    async def use(shared):
        slowly(shared, monkeypatch)  # in every step, its sleep releases the GIL
        stream, turns = asyncio.create_task(collect(shared, [1, 2], SHORT)), 0
        while not stream.done():
            for _ in range(2000):
                pass
            turns += 1
            await asyncio.sleep(0)
        assert (await stream)[0] == alone([1, 2], SHORT)
        assert turns < 60_000

    run(folder, use)


def test_statistics_of_a_piece_stay_as_they_were(folder):
    """Even though the engine continues, in another thread."""

    async def use(shared):
        with a_beginning_each(shared.engine):
            stream = shared.stream([1, 2], GREEDY)
            first = await anext(stream)
        noted, tokens = first.stats.copy(), len(first.new_token_ids)
        while shared._waiting:
            await asyncio.sleep(0.001)
        assert first.stats == noted and noted.tokens == tokens < 20 and noted.cycles == sum(noted.plans.values())
        (rest,) = [out async for out in stream]
        assert rest.stats.tokens == 20 and rest.stats.cycles > noted.cycles

    run(folder, use)
