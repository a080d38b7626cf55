"""How requests of an AsyncEngine end: all tokens at once, aborted by name, or run to their end before it closes."""

import asyncio
import contextlib
import gc
import threading
import time
import weakref

import pytest

from orthrus_rt.aio import AsyncEngine
from tests.engines import a_beginning_each
from tests.shared_engine import GREEDY, LONG, collect, collect_rest, make, run

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]


def test_what_is_no_engine():
    with pytest.raises(TypeError, match=r"engine must be an Engine \(Engine.from_pretrained .*\), got 'smollm2-135m'"):
        AsyncEngine("smollm2-135m")


def test_generate_is_the_whole_stream(folder, alone):
    cycles = [make(folder).generate([i], GREEDY).stats.cycles for i in (1, 2, 3)]

    async def use(shared):
        outs = await asyncio.gather(*(shared.generate([i], GREEDY, f"name {i}") for i in (1, 2, 3)))
        assert [out.token_ids for out in outs] == [alone([i], GREEDY) for i in (1, 2, 3)]
        assert [out.stats.cycles for out in outs] == cycles
        assert [(out.request_id, out.finished, out.finish_reason) for out in outs] == [
            (f"name {i}", True, "length") for i in (1, 2, 3)
        ]
        with pytest.raises(ValueError, match="at least one token"):
            await shared.generate([])

    run(folder, use)


def test_generate_that_is_cancelled_aborts(folder):
    async def use(shared):
        with a_beginning_each(shared.engine):
            asked = asyncio.create_task(shared.generate([1, 2], LONG))
            while not shared.engine.metrics.tokens:
                await asyncio.sleep(0.001)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            while shared.engine.has_unfinished():
                await asyncio.sleep(0.001)
        assert shared.engine.metrics.finished["abort"] == 1

    run(folder, use)


def test_a_request_is_aborted_by_its_name(folder, alone):
    async def use(shared):
        with a_beginning_each(shared.engine):
            mine, other = (shared.stream([1, 2], LONG, request_id=name) for name in ("mine", "other"))
            tokens, others = (await anext(mine)).new_token_ids, (await anext(other)).new_token_ids
            whole = asyncio.create_task(shared.generate([3], LONG, "whole"))
            await asyncio.sleep(0)
            for name in ("mine", "whole", "nobody"):
                assert await shared.abort(name) is None
        rest = [out async for out in mine]
        assert rest[-1].request_id == "mine" and rest[-1].finish_reason == "abort"
        tokens += [t for out in rest for t in out.new_token_ids]
        assert tokens == alone([1, 2], LONG)[: len(tokens)] and len(tokens) < 100
        assert (await whole).finish_reason == "abort"
        await shared.abort("mine")  # ignored: it has ended already
        assert (await collect(shared, [3], GREEDY))[1] == "length"
        assert others + await collect_rest(other) == alone([1, 2], LONG)
        assert shared.engine.metrics.finished["abort"] == 2

    run(folder, use)


def test_an_abort_may_come_after_the_end_of_all(folder):
    engine = make(folder)

    async def use():
        async with AsyncEngine(engine) as shared:
            await shared.generate([1, 2], GREEDY, "mine")
        await shared.abort("mine")

    asyncio.run(use())
    assert engine.closed
    engine.abort("mine")


def test_an_abort_that_is_cancelled_aborts(folder):
    async def use(shared):
        with a_beginning_each(shared.engine):
            stream = shared.stream([1, 2], LONG, request_id="mine")
            await anext(stream)
            abort = asyncio.create_task(shared.abort("mine"))
            await asyncio.sleep(0)  # the abort waits for the step that is running
            abort.cancel()
            assert [out.finish_reason async for out in stream][-1] == "abort"

    run(folder, use)


def test_an_aborted_name_is_free_at_once(folder, alone):
    async def use(shared):
        with a_beginning_each(shared.engine):
            for _ in range(2):
                stream = shared.stream([1, 2], LONG, request_id="mine")
                await anext(stream)
                await stream.aclose()
        assert (await shared.generate([1, 2], GREEDY, "mine")).token_ids == alone([1, 2], GREEDY)

    run(folder, use)


def test_close_that_drains_lets_what_runs_come_to_its_end(folder, alone):
    async def use(shared):
        message = "this engine is closing: it accepts no new requests"
        with a_beginning_each(shared.engine):
            stream, unasked = shared.stream([1, 2], GREEDY), shared.stream([3], GREEDY)
            running = asyncio.create_task(collect(shared, [4], GREEDY))
            gone = asyncio.create_task(collect(shared, [5], LONG))
            tokens = (await anext(stream)).new_token_ids
            closing = asyncio.create_task(shared.close(drain=True))
            await asyncio.sleep(0)
            for new in (lambda: shared.stream([3]), lambda: anext(unasked), lambda: shared.generate([3])):
                with pytest.raises(RuntimeError, match=message):
                    await new()
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            await asyncio.wrap_future(shared._worker.submit(int))  # queued after the abort of the cancelled one
        await closing
        assert shared.engine.closed and shared.engine.metrics.finished["length"] == 2
        assert await running == (alone([4], GREEDY), "length")
        assert tokens + await collect_rest(stream) == alone([1, 2], GREEDY)
        await shared.close(drain=True)  # harmless

    run(folder, use)


def test_draining_may_end_early(folder):
    async def use(shared):
        with a_beginning_each(shared.engine, 40):
            with a_beginning_each(shared.engine):
                stream = shared.stream([1, 2], LONG)
                await anext(stream)
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(shared.close(drain=True), 0.05)
            assert not shared.engine.closed and (await anext(stream)).new_token_ids
            await shared.close()
        with pytest.raises(RuntimeError, match="this engine is closed"):
            await collect_rest(stream)

    run(folder, use)


def test_an_engine_with_requests_is_refused(folder, alone):
    """No stream would receive their tokens. They can be decoded as before, and then the engine is accepted."""
    engine = make(folder)
    request_id, tokens = engine.submit([1, 2], GREEDY), []
    with pytest.raises(RuntimeError, match="the engine has unfinished requests"):
        AsyncEngine(engine)
    while engine.has_unfinished():
        tokens += [t for out in engine.step() if out.request_id == request_id for t in out.new_token_ids]
    assert tokens == alone([1, 2], GREEDY)
    abandoned = engine.stream([1, 2], GREEDY)
    reader = threading.Thread(target=next, args=(abandoned,))
    reader.start(), reader.join()
    abandoned.close()  # not in the thread that read it: the engine's next call, on the next line, aborts it
    asyncio.run(AsyncEngine(engine).close())
    assert engine.closed


def test_whoever_is_refused_as_the_engine_has_requests_can_step_at_once(folder, alone):
    engine, told = make(folder), []
    engine.submit([1, 2], GREEDY)
    try:
        AsyncEngine(engine)
    except RuntimeError:  # whose traceback still holds the refused AsyncEngine
        while engine.has_unfinished():
            told += engine.step()
    assert [t for out in told for t in out.new_token_ids] == alone([1, 2], GREEDY)


def test_an_engine_is_its_makers_again_once_it_is_closed(folder):
    async def use(shared):
        await shared.close()
        shared.engine.close()  # closing twice is harmless, whoever does it

    run(folder, use)


def test_an_engine_is_free_as_soon_as_nobody_holds_who_had_it(folder, alone):
    """Not only when the garbage collector runs."""
    engine = make(folder)
    shared = AsyncEngine(engine)
    asyncio.run(collect(shared, [1, 2], GREEDY))
    gone = weakref.ref(shared)
    gc.disable()
    try:
        del shared
        end = time.monotonic() + 60
        while gone() is not None and time.monotonic() < end:  # its thread may still be leaving the last step
            time.sleep(0.001)
        assert gone() is None and engine.generate([1, 2], GREEDY).token_ids == alone([1, 2], GREEDY)
    finally:
        gc.enable()
