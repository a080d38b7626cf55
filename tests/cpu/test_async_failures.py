"""Steps of an AsyncEngine that fail: who ends, who is served, and what each reader is told."""

import asyncio
import functools
import itertools
import sys
import threading
import traceback

import pytest

from orthrus_rt.aio import MOST_FAILURES, _own
from orthrus_rt.sampling import SamplingParams
from tests.engines import a_beginning_each
from tests.shared_engine import GREEDY, LONG, collect, collect_rest, run

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]


def test_draining_does_not_wait_for_streams_that_have_failed(folder):
    """There may be no reader left to receive the error."""

    async def use(shared):
        with a_beginning_each(shared.engine):
            stream = shared.stream([1, 2], LONG)
            await anext(stream)
            shared.engine._advance = lambda: 1 / 0
        await asyncio.wait_for(shared.close(drain=True), 60)
        with pytest.raises(ZeroDivisionError):
            await collect_rest(stream)

    run(folder, use)


def test_what_ends_a_thread_ends_the_streams(folder, monkeypatch):
    """Nothing steps the engine again, so the streams would wait forever."""

    async def use(shared):
        monkeypatch.setattr(shared.engine, "step", sys.exit)
        with pytest.raises(RuntimeError, match=r"a step ended with SystemExit\(\)"):
            await asyncio.wait_for(shared.generate([1, 2], LONG), 10)

    run(folder, use)


def test_every_stream_has_an_error_of_its_own(folder, monkeypatch):
    """With the cause and notes of the first, and a traceback to which no other stream adds frames."""

    class Unusual(RuntimeError):  # an exception that cannot be copied
        def __init__(self, what, where):
            super().__init__(what)

    class Wordy(RuntimeError):
        def __init__(self, what):
            super().__init__(f"it is {what}")

    async def use(shared, error, kinds):
        try:
            raise error from KeyError("why")
        except RuntimeError:
            error.add_note("where")

        def fails():
            if len(shared.engine.scheduler.waiting) < 3:
                return  # so that all three get the same failure
            raise error

        monkeypatch.setattr(shared.engine, "_advance", fails)
        found = await asyncio.gather(*(shared.generate([i], LONG) for i in (1, 2, 3)), return_exceptions=True)
        assert len(set(map(id, found))) == kinds and {repr(e) for e in found} == {repr(error)}
        assert all(repr(e.__cause__) == "KeyError('why')" and e.__notes__[0] == "where" for e in found)
        depths = [len(list(traceback.walk_tb(e.__traceback__))) for e in found]
        assert kinds == 1 or len(set(depths)) == 1

    run(folder, functools.partial(use, error=RuntimeError("lost"), kinds=3))
    run(folder, functools.partial(use, error=Wordy("lost"), kinds=3))
    run(folder, functools.partial(use, error=Unusual("lost", "there"), kinds=1))


def test_failures_with_an_end_between_them_end_no_stream(folder, monkeypatch):
    """This includes requests without a cycle of their own, whose only token comes from the prefill."""

    async def use(shared):
        advance, due = shared.engine._advance, []
        monkeypatch.setattr(shared.engine, "_advance", lambda: due.pop() / 0 if due else advance())
        for i in range(4):
            due.append(1)
            assert len((await shared.generate([i], SamplingParams(1, ignore_eos=True))).new_token_ids) == 1

    run(folder, use)


def test_who_had_no_part_in_steps_that_fail_is_served(folder, alone, monkeypatch):
    """Its stream has begun, but the engine does not have the request yet."""

    async def use(shared):
        advance, calls, begun = shared.engine._advance, [], threading.Event()

        def failing():
            calls.append(None)
            if len(calls) == MOST_FAILURES:
                begun.wait(60)
            if len(calls) <= MOST_FAILURES:
                raise RuntimeError("lost")
            return advance()

        monkeypatch.setattr(shared.engine, "_advance", failing)
        first = asyncio.create_task(collect(shared, [1], GREEDY))
        while len(calls) < MOST_FAILURES:
            await asyncio.sleep(0.001)
        late = asyncio.create_task(collect(shared, [2], GREEDY))
        await asyncio.sleep(0)  # so that it waits for the engine
        begun.set()
        with pytest.raises(RuntimeError, match="lost"):
            await first
        assert (await late)[0] == alone([2], GREEDY)

    run(folder, use)


def test_what_was_decoded_before_steps_fail_is_told(folder, alone, monkeypatch):
    """The stream that has ended yields only its tokens; the other one also the error. No step succeeds again."""

    async def use(shared):
        collect_but, told = shared.engine._collect_but, []

        def failing(launched):
            collect_but(launched)
            if shared.engine.metrics.finished["length"]:
                raise RuntimeError("lost")

        async def read():
            async for out in shared.stream([2], LONG):
                told.extend(out.new_token_ids)

        monkeypatch.setattr(shared.engine, "_collect_but", failing)
        both = asyncio.gather(read(), collect(shared, [1], GREEDY), return_exceptions=True)
        long, short = await asyncio.wait_for(both, 60)
        assert short == (alone([1], GREEDY), "length") and str(long) == "lost"
        decoded = shared.engine.metrics.tokens - len(short[0])
        assert len(told) == decoded > 0 and told == alone([2], LONG)[:decoded]

    run(folder, use)


def fail_with(engine, prompt, monkeypatch):
    """Fail every cycle of the request with this prompt, once it has a second token."""

    def failing(run, requests, *args):
        if any(request.prompt == prompt and len(request.tokens) > 1 for request in requests):
            raise ValueError("lost")
        return run(requests, *args)

    for name in ("decode", "decode_and_prefill"):
        monkeypatch.setattr(engine.runner, name, functools.partial(failing, getattr(engine.runner, name)))


def test_a_request_whose_steps_fail_ends_before_its_reader_hears_of_it(folder, alone, monkeypatch):
    """A request that arrives meanwhile is served."""

    async def use(shared):
        metrics = shared.engine.metrics
        fail_with(shared.engine, [66], monkeypatch)
        slow = shared.stream([66], LONG)
        await anext(slow)
        async with asyncio.timeout(60):
            while not metrics.finished["error"]:
                await asyncio.sleep(0.001)
            assert (await collect(shared, [1], GREEDY))[0] == alone([1], GREEDY)
        with pytest.raises(ValueError, match="lost"):
            await collect_rest(slow)
        assert metrics.finished == {"stop": 0, "length": 1, "abort": 0, "error": 1}

    run(folder, use)


def test_who_waits_for_a_slot_has_no_part_in_steps_that_fail(folder, alone, monkeypatch):
    async def use(shared):
        fail_with(shared.engine, [66], monkeypatch)
        both = asyncio.gather(collect(shared, [66], LONG), collect(shared, [1], GREEDY), return_exceptions=True)
        lost, served = await asyncio.wait_for(both, 60)
        assert str(lost) == "lost" and served == (alone([1], GREEDY), "length")

    run(folder, use, max_batch_size=1)


def test_a_device_that_is_lost_ends_those_who_wait_for_a_slot_too(folder, monkeypatch):
    async def use(shared):
        fail_with(shared.engine, [66], monkeypatch)
        monkeypatch.setattr(shared.engine.runner, "reset", lambda: 1 / 0)  # and recovery fails as well
        streams = [collect(shared, prompt, LONG) for prompt in ([66], [1], [2])]
        outs = await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 60)
        assert all(isinstance(out, ValueError | ZeroDivisionError) for out in outs)

    run(folder, use, max_batch_size=1)


def test_an_engine_that_fails_for_good_is_left_alone(folder, monkeypatch, caplog):
    """It is stepped no more once every stream has received the error, although requests cannot be aborted either."""

    async def use(shared):
        calls = []
        monkeypatch.setattr(shared.engine, "_advance", lambda: calls.append(None) or 1 / 0)
        monkeypatch.setattr(shared.engine, "_abort_named", lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await collect(shared, [1], GREEDY)
        for _ in range(1 + MOST_FAILURES):  # queued after the aborts, and after the steps that follow them
            await asyncio.wrap_future(shared._worker.submit(int))
        count = len(calls)
        await asyncio.sleep(0.2)
        assert len(calls) == count <= 5 * MOST_FAILURES and len(shared.engine.dropped) <= 1

    run(folder, use)


def test_draining_does_not_wait_for_failed_streams_that_cannot_be_aborted(folder):
    async def use(shared):
        with a_beginning_each(shared.engine):
            stream = shared.stream([1, 2], LONG)
            await anext(stream)
            shared.engine._advance = shared.engine._abort_named = lambda *_: 1 / 0
        await asyncio.wait_for(shared.close(drain=True), 60)
        with pytest.raises(ZeroDivisionError):
            await collect_rest(stream)

    run(folder, use)


def test_failures_with_a_cycle_between_them_end_no_stream(folder):
    async def use(shared):
        advance, turns = shared.engine._advance, itertools.count()
        shared.engine._advance = lambda: advance() if next(turns) % 2 else 1 / 0
        assert (await shared.generate([1, 2], LONG)).finish_reason == "length"

    run(folder, use)


def test_a_copied_error_still_shows_its_context():
    error = ValueError("what")
    error.__context__ = KeyError("why")
    own = _own(error)
    assert own is not error and own.__context__ is error.__context__ and not own.__suppress_context__
