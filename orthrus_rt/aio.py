"""An engine shared by many asyncio tasks: one worker thread makes every call, each stream gets its own tokens."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from orthrus_rt.breaks import Breaks
from orthrus_rt.engine import Engine
from orthrus_rt.outputs import RequestOutput
from orthrus_rt.request import Request, TokenIds
from orthrus_rt.sampling import SamplingParams

# Calls that would take the streams' outputs, or make outputs that nobody gets -> what to call here instead.
INSTEAD = {
    Engine.submit: "stream()", Engine.stream: "stream()", Engine.step: "stream()", Engine.generate: "generate()",
    Engine.abort: "abort()", Engine.close: "close()", Engine.__exit__: "close()",
}  # fmt: skip
MOST_FAILURES = 3  # steps that fail, with no cycle between them, fail the streams of those who were in them
log = logging.getLogger("orthrus_rt")
R = TypeVar("R")


@dataclass
class Waiting:
    """A stream that waits for more."""

    request_id: str
    news: list[RequestOutput | BaseException] = field(default_factory=list)  # an output, and why it ends, at most
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    failed: bool = False  # the last of its news is why it ends

    def tell(self, news: RequestOutput | BaseException) -> None:
        """For its reader, together with what that has not read yet."""
        last = self.news[-1] if self.news else None
        if isinstance(news, RequestOutput) and isinstance(last, RequestOutput):
            last.new_token_ids += news.new_token_ids
            last.finish_reason, last.stats, last.error = news.finish_reason, news.stats, news.error
        else:
            self.news.append(news)
        self.has_news.set()

    async def read(self) -> RequestOutput | BaseException:
        await self.has_news.wait()
        news = self.news.pop(0)
        if not self.news:
            self.has_news.clear()
        return news


class AsyncEngine:
    """Streams over one :class:`Engine`, which it owns from now on: the engine refuses calls that run, change, close or
    report anything, metrics aside, unless :meth:`call` makes them. ``async with`` closes it in the end.

    Cancelling or closing a stream aborts its request; the others are not disturbed, nor are they by a request that
    cannot go on (see :meth:`Engine.step`) or by a step that fails. A thread steps the engine, so decoding goes on
    however long the event loop is busy elsewhere; a loop that is never idle makes short breaks for it. One event loop
    at a time may use it; a later one ends the streams that the one before has left open, with an error.

    In a server of threads, give the loop one of its own; the others reach it through
    ``asyncio.run_coroutine_threadsafe(coroutine, loop)``.

    Raises:
        TypeError: it is no :class:`Engine`.
        RuntimeError: another one has the engine, a call of it is under way, it is closed, or it has requests: nobody
            would hand out their tokens.
    """

    def __init__(self, engine: Engine):
        if not isinstance(engine, Engine):
            raise TypeError(f"AsyncEngine: engine must be an Engine (Engine.from_pretrained makes one), got {engine!r}")
        self.engine = engine
        # Its queue is the order of all calls: a step puts the next one behind whatever was asked for meanwhile.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="orthrus")
        engine._take_turn()  # whose turn an interrupt has ended too; a closed one refuses
        self._worker.submit(engine.turn.claim, self).result()
        if engine.has_unfinished():
            engine.turn.release()
            raise RuntimeError("the engine has requests, whose outputs nobody would hand out; step first")
        # Streams that wait for more, by the id that the engine has for each: the caller's is free again as soon as its
        # stream has ended, but the engine keeps an aborted request until the next step.
        self._waiting: dict[str, Waiting] = {}
        self._known_as: dict[str, str] = {}  # the engine's name of each, by the caller's
        self._numbers = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._taking_over = threading.Lock()
        self._closing: Future | None = None
        self._draining, self._process = False, os.getpid()
        self._steps = False  # a step is in the queue; the worker's, as are the next two
        self._failures = self._cycles = 0  # steps that failed since there were that many cycles

    def _enter(self) -> asyncio.AbstractEventLoop:
        """The running loop, which has the engine from now on. Another one's streams cannot be served any more: it may
        never run again.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            with self._taking_over:  # loops of several threads may be about to
                self._take_over(loop)
        return loop

    def _take_over(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None and self._loop.is_running():
            raise RuntimeError("this AsyncEngine is in use by another event loop")
        self._fail(RuntimeError("another event loop has taken this AsyncEngine over"))
        with contextlib.suppress(RuntimeError):  # as the process ends, nothing is taken any more
            for known_as in self._waiting:
                self._worker.submit(self._abort, known_as)
        self._waiting.clear(), self._known_as.clear()
        self._loop = loop
        self._breaks = Breaks(loop, functools.partial(_waits, weakref.ref(self)))

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("this AsyncEngine is another process's: its thread is not here; make an engine here")
        if self._closing is not None:
            raise RuntimeError("this engine is closed")

    def _check_taking(self) -> None:
        self._check_open()
        if self._draining:
            raise RuntimeError("this engine is closing: it ends what runs and takes nothing new")

    def _call(self, function, *args) -> asyncio.Future:
        return self._enter().run_in_executor(self._worker, function, *args)

    def stream(
        self, prompt_ids: TokenIds, params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's outputs as :meth:`Engine.step` returns them, those that came meanwhile as one, each with
        ``stats`` of its own; the last has a ``finish_reason``, and if that is ``"error"``, ``error`` says why: nothing
        is raised. Arguments are checked now, but not whether ``request_id`` is in use: it is from when its first output
        is asked for until its last is decoded, or the stream closed.

        Raises:
            ValueError: the request cannot be served, as :meth:`Engine.submit`.
            RuntimeError: the engine is closed or closing.
            Exception: what three steps with no cycle between them raised.
        """
        self._check_taking()
        # Of its own: the caller may change what was passed before it is submitted.
        return self._stream(self.engine._make_request(prompt_ids, params, None, request_id))

    async def _stream(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        request.arrived = time.perf_counter()  # not when the engine has a moment for it
        request_id = request.request_id
        self._check_taking()
        self._enter()
        if request_id in self._known_as:
            raise ValueError(f"request_id must be unused, got {request_id!r} twice")
        known_as, stream, finished = f"{request_id}#{next(self._numbers)}", Waiting(request_id), False
        self._waiting[known_as], self._known_as[request_id] = stream, known_as
        self._breaks.begin()
        try:
            request.request_id = known_as
            await self._call(self._run, Engine._queue, request)
            while not finished:
                output = await stream.read()
                if isinstance(output, BaseException):
                    raise _own(output)
                finished = output.finished
                yield replace(output, request_id=request_id)
        finally:
            if self._leave(known_as) and self._closing is None:
                # Not awaited: the stream may be closing because its task was cancelled.
                with contextlib.suppress(RuntimeError):  # as the process ends, nothing is taken any more
                    self._worker.submit(self._abort, known_as)

    async def generate(
        self, prompt_ids: TokenIds, params: SamplingParams | None = None, request_id: str | None = None
    ) -> RequestOutput:
        """The last output of :meth:`stream`, with all the tokens: as there, look at ``error``. Cancelling it aborts the
        request.
        """
        tokens: list[int] = []
        async with contextlib.aclosing(self.stream(prompt_ids, params, request_id)) as outputs:
            async for output in outputs:
                tokens += output.new_token_ids
        return replace(output, new_token_ids=tokens)

    async def abort(self, request_id: str) -> None:
        """End the stream with this ``request_id``, or :meth:`generate`, also if this call is cancelled: its last output
        has finish_reason ``"abort"``. If there is none yet, or none any more, nothing is done or said, as by
        :meth:`Engine.abort`; nor if this is closed.
        """
        if self._closing is not None:
            return
        self._enter()
        if request_id in self._known_as:
            await asyncio.shield(self._call(self._abort, self._known_as[request_id]))

    async def call(self, function: Callable[..., R], *args) -> R:
        """``function(engine, *args)`` between two steps, in the thread that makes them: ``call(Engine.explain)`` or
        :meth:`Engine.warmup` as long as there is no request. Decoding stands still meanwhile, even if this call is
        cancelled.

        Raises:
            ValueError: it is one of Engine's that submit, run or end requests, or close it; this class does that.
            TypeError: it is a method of the engine, not of the class: it would get the engine twice.
        """
        given = function.func if isinstance(function, functools.partial) else function
        asked = getattr(given, "__func__", given)
        for method, instead in INSTEAD.items():
            if asked is method:
                name = method.__name__
                raise ValueError(
                    f"AsyncEngine.call: Engine.{name} would disturb the streams; use AsyncEngine.{instead}"
                )
        if getattr(given, "__self__", None) is self.engine:
            raise TypeError(f"AsyncEngine.call: pass Engine.{given.__name__}, which gets the engine as its argument")
        return await self._call(self._run, function, *args)

    def _hand_out(self, outputs: list[RequestOutput]) -> None:
        """Every output to its stream; in the loop, as all that looks at those who wait."""
        for output in outputs:
            if stream := self._waiting.get(output.request_id):
                stream.tell(output)
            if output.finished:  # however long its reader takes for what is left
                self._leave(output.request_id)

    def _leave(self, known_as: str) -> bool:
        """It waits no more, and the caller's name is free; whether it waited."""
        stream = self._waiting.pop(known_as, None)
        if stream:
            del self._known_as[stream.request_id]
        return stream is not None

    def _fail(self, error: BaseException, names: Container[str] | None = None) -> None:
        """End those who wait, or those of them whom the engine knows by these ``names``."""
        for known_as, stream in self._waiting.items():
            if names is None or known_as in names:
                stream.failed = True
                with contextlib.suppress(RuntimeError):  # its reader's loop is closed
                    stream.tell(error)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()

    async def close(self, drain: bool = False) -> None:
        """Close the engine, also if this call is cancelled; open streams end with an error. Twice is
        harmless, in whatever loop.

        Args:
            drain: first let them run to their end, and refuse new ones for good: what a server does at SIGTERM.
                Cancelled before that, as by ``asyncio.wait_for``, the engine is still open, for ``close()``.
        """
        if drain and self._closing is None:
            self._enter()
            self._draining = True
            while self._closing is None and not all(stream.failed for stream in self._waiting.values()):
                await asyncio.sleep(0.01)
        if self._closing is None:
            self._enter()
            self._closing = self._close_in_worker()
        await asyncio.shield(asyncio.wrap_future(self._closing))  # which is no loop's: this one may not see its end

    def _close_in_worker(self) -> Future:
        try:
            return self._worker.submit(self._close)
        except RuntimeError:  # the process ends, and has waited for its threads: there is no worker any more
            self.engine.turn.release()
            self._close()
            (closed := Future()).set_result(None)
            return closed

    # What follows runs in the worker.

    def _run(self, function, *args):
        try:
            return function(self.engine, *args)
        except StopIteration as error:  # which no future takes
            raise RuntimeError(f"{function!r} raised StopIteration") from error
        finally:
            self._go_on()

    def _abort(self, known_as: str) -> None:
        self._end(known_as)
        self._go_on()

    def _end(self, known_as: str, error: Exception | None = None) -> bool:
        """Abort it, or end it for this ``error``; whether that could be done."""
        try:
            if self.engine.is_unfinished(known_as):
                self.engine._abort_named(known_as, error)
        except Exception:
            log.exception("request %s could not be ended: the engine's next call tries again", known_as)
            request = self.engine.outbox.get(known_as)
            if request and [request] not in self.engine.dropped:
                self.engine.dropped.append([request])
            return False
        return True

    def _go_on(self) -> None:
        """Step next, behind what is in the queue, if there is anything to run or to hand out."""
        if not self._steps and self.engine.has_unfinished():
            self._steps = True
            self._worker.submit(self._step)

    def _step(self) -> None:
        """Once, and again behind what was asked for meanwhile. Whatever fails here, no stream waits for ever."""
        self._steps = False
        try:
            if self.engine.closed:
                raise RuntimeError("this engine is closed")
            if self._step_once():
                self._go_on()
        except Exception as error:
            self._tell(self._fail, error)  # the streams abort their requests
        except BaseException as error:  # SystemExit, say, sent to this thread: it would end the readers' event loop
            log.exception("a step ended the thread's work")
            ended = RuntimeError(f"a step ended with {error!r}")
            ended.__cause__ = error
            self._tell(self._fail, ended)

    def _step_once(self) -> bool:
        """Whether to go on, be it to try again."""
        try:
            outputs = self.engine.step()
        except Exception as error:
            log.exception("a step failed")
            self._failures += 1
            if self._failures == MOST_FAILURES:
                self._failures = 0
                return self._give_up(error)  # else until those who hear of it abort, or somebody new comes
            return True
        if self.engine.metrics.cycles > self._cycles or not self.engine.has_unfinished():
            self._failures, self._cycles = 0, self.engine.metrics.cycles
        self._tell_outputs(outputs)
        return True

    def _tell_outputs(self, outputs: list[RequestOutput]) -> None:
        # What runs changes its statistics while the loop may look at them.
        self._tell(self._hand_out, [replace(out, stats=out.stats.copy()) for out in outputs])

    def _give_up(self, error: Exception) -> bool:
        """The steps of those who hold a slot fail: they end now, whenever their readers may hear of it, and their
        streams behind what they had to say before; who waits for a slot, or is yet to come, has no part in it, unless
        nobody can be ended: then nobody goes on. Whether the others do.
        """
        outbox = self.engine.outbox
        outbox.collect()
        outputs, outbox.outputs = outbox.outputs, []
        self._tell_outputs(outputs)
        active = {request.request_id for request in self.engine.scheduler.active}
        failed = {request.request_id for request in outbox.unfinished}
        failed = failed & active or failed
        self._tell(self._fail, error, failed)
        ended = all([self._end(known_as, error) for known_as in failed])
        if not ended:
            self._tell(self._fail, error)
        return bool(failed) and ended

    def _tell(self, function, *args) -> None:
        """Call ``function`` in the loop, unless another one has taken over by then."""
        loop = self._loop

        def in_loop() -> None:
            if loop is self._loop:
                function(*args)

        try:
            loop.call_soon_threadsafe(in_loop)
        except RuntimeError:  # it is closed: nobody will ever read on
            for known_as in list(self._waiting):
                self._abort(known_as)

    def _close(self) -> None:
        try:
            self.engine.close()
        finally:
            self.engine.turn.release()
            self._worker.shutdown(wait=False)
            self._tell(self._fail, RuntimeError("this engine is closed"))


def _waits(shared: weakref.ref, breaks: Breaks) -> bool:
    """Whether a stream waits for more, and these are the breaks of the loop that is to bring it."""
    it = shared()
    return it is not None and it._breaks is breaks and any(not stream.failed for stream in it._waiting.values())


def _own(error: BaseException) -> BaseException:
    """A copy for one reader of several: who raises an exception adds frames to its traceback, and they hold locals."""
    try:
        own = copy.copy(error)
    except Exception:  # not every class allows for it
        return error
    own.args = error.args  # which a class of its own kind makes of others
    own.__cause__, own.__context__ = error.__cause__, error.__context__
    own.__suppress_context__ = error.__suppress_context__
    return own.with_traceback(error.__traceback__)
