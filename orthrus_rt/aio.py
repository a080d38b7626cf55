"""An engine shared by many asyncio tasks: one worker thread makes all calls, and each stream gets its own tokens."""

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
from dataclasses import replace
from typing import TypeVar

from orthrus_rt.breaks import Breaks
from orthrus_rt.engine import Engine
from orthrus_rt.outputs import RequestOutput
from orthrus_rt.request import Request, TokenIds
from orthrus_rt.sampling import SamplingParams
from orthrus_rt.waiting import Waiting

# Calls that would take the streams' outputs, or make outputs that no stream receives -> what to call here instead.
INSTEAD = {
    Engine.submit: "stream()", Engine.stream: "stream()", Engine.step: "stream()", Engine.generate: "generate()",
    Engine.abort: "abort()", Engine.close: "close()", Engine.__exit__: "close()",
}  # fmt: skip
# A stream fails after so many failed steps that may be due to its request, with no token of it between them: one more
# than make it suspected, so those that only shared its passes have one less.
MOST_FAILURES = 3
log = logging.getLogger("orthrus_rt")
R = TypeVar("R")


class AsyncEngine:
    """Streams over one :class:`Engine`, which it owns until it is closed. Meanwhile the engine refuses calls that run,
    change, close or query it, unless :meth:`call` makes them. (``metrics``, ``check``, ``has_unfinished`` and
    ``is_unfinished`` do answer, though the last does not know the ids of streams.) ``async with`` closes it at the end.

    Cancelling or closing a stream aborts its request. This does not disturb the other streams, nor does a request that
    cannot continue (see :meth:`Engine.step`) or a step that fails. A thread steps the engine, so decoding continues
    however long the event loop is busy elsewhere; a loop that is never idle takes short breaks for it. One event loop
    at a time may use it. If a later loop takes over, streams that the earlier one has left open end with an error.

    In a server with threads, run the loop in a thread of its own; the other threads reach it through
    ``asyncio.run_coroutine_threadsafe(coroutine, loop)``.

    Raises:
        TypeError: ``engine`` is not an :class:`Engine`.
        RuntimeError: the engine belongs to another AsyncEngine, is in the middle of a call, is closed, or has
            unfinished requests, whose outputs no stream would receive.
    """

    def __init__(self, engine: Engine):
        if not isinstance(engine, Engine):
            raise TypeError(f"AsyncEngine: engine must be an Engine (Engine.from_pretrained makes one), got {engine!r}")
        self.engine = engine
        # Its queue orders all calls: a step queues the next one behind the calls made meanwhile.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="orthrus")
        engine._take_turn()  # also where an interrupt has left the turn taken; a closed engine refuses
        self._worker.submit(engine.turn.claim, self).result()
        if engine.has_unfinished():
            engine.turn.release()
            raise RuntimeError("the engine has unfinished requests: step until has_unfinished() is False")
        # Waiting streams by the engine's id for each. The caller's id is another: it is free again as soon as its
        # stream has ended, but the engine keeps an aborted request until the next step.
        self._waiting: dict[str, Waiting] = {}
        self._known_as: dict[str, str] = {}  # the caller's id -> the engine's
        self._numbers = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._taking_over = threading.Lock()
        self._closing: Future | None = None
        self._draining, self._process = False, os.getpid()
        self._steps = False  # a step is in the queue; only the worker uses this

    def _enter(self) -> asyncio.AbstractEventLoop:
        """The running loop, which uses the engine from now on. Streams of an earlier loop cannot be served any more: it
        may never run again.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            with self._taking_over:  # loops of several threads may try to at once
                self._take_over(loop)
        return loop

    def _take_over(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None and self._loop.is_running():
            raise RuntimeError("this AsyncEngine is in use by another event loop")
        self._fail(RuntimeError("another event loop has taken this AsyncEngine over"))
        with contextlib.suppress(RuntimeError):  # the worker takes nothing more when the process ends
            for known_as in self._waiting:
                self._worker.submit(self._abort, known_as)
        self._waiting.clear(), self._known_as.clear()
        self._loop = loop
        self._breaks = Breaks(loop, functools.partial(_waits, weakref.ref(self)))

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("this AsyncEngine belongs to another process: make an engine in this one")
        if self._closing is not None:
            raise RuntimeError("this engine is closed")

    def _check_taking(self) -> None:
        self._check_open()
        if self._draining:
            raise RuntimeError("this engine is closing: it accepts no new requests")

    def _call(self, function, *args) -> asyncio.Future:
        return self._enter().run_in_executor(self._worker, function, *args)

    def stream(
        self, prompt_ids: TokenIds, params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's outputs as :meth:`Engine.step` returns them, merging those that arrive between two reads,
        each with a copy of ``stats``. The last has a ``finish_reason``; if it is ``"error"``, ``error`` says why and
        nothing is raised. Arguments are those of :meth:`Engine.submit` and are checked at the call, but for whether
        ``request_id`` is in use: it is from the first read until the last output is decoded or the stream is closed.

        Raises:
            ValueError: the request cannot be served, as for :meth:`Engine.submit`.
            RuntimeError: the engine is closed or closing.
            Exception: what the third step raised that failed in work for this request (and perhaps for others), or
                outside the work for any, with no token of it between them.
        """
        self._check_taking()
        # With copies of the arguments: the caller may change them before the request is submitted.
        return self._stream(self.engine._make_request(prompt_ids, params, None, request_id))

    async def _stream(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        request.arrived = time.perf_counter()  # not when the engine gets to it
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
                with contextlib.suppress(RuntimeError):  # the worker takes nothing more when the process ends
                    self._worker.submit(self._abort, known_as)

    async def generate(
        self, prompt_ids: TokenIds, params: SamplingParams | None = None, request_id: str | None = None
    ) -> RequestOutput:
        """Read :meth:`stream` to its end and return the last output, with all new tokens. As there, check its
        ``error``. Cancelling this call aborts the request.
        """
        tokens: list[int] = []
        async with contextlib.aclosing(self.stream(prompt_ids, params, request_id)) as outputs:
            async for output in outputs:
                tokens += output.new_token_ids
        return replace(output, new_token_ids=tokens)

    async def abort(self, request_id: str) -> None:
        """End the stream or the :meth:`generate` with this ``request_id``, even if this call is cancelled; its last
        output has finish_reason ``"abort"``. As in :meth:`Engine.abort`, an id that is unknown or has ended is ignored,
        and so is any id once this is closed. A stream's id is known from its first read on, so before that end the task
        that is to read it.
        """
        if self._closing is not None:
            return
        self._enter()
        if request_id in self._known_as:
            await asyncio.shield(self._call(self._abort, self._known_as[request_id]))

    async def call(self, function: Callable[..., R], *args) -> R:
        """Run ``function(engine, *args)`` between two steps, in the thread that makes them, and return its result: for
        example ``call(Engine.explain)``, or :meth:`Engine.warmup` while there is no request. Decoding waits until it is
        done, even if this call is cancelled.

        Raises:
            ValueError: it is a method of Engine that submits, runs or ends requests, or closes it; this class has its
                own.
            TypeError: it is bound to the engine (``engine.explain``), which it would then receive twice.
            RuntimeError: this is closed, or another event loop uses it.
            Exception: whatever ``function`` raises.
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
        """Pass every output to its stream; runs in the loop, like everything that reads the waiting streams."""
        for output in outputs:
            if stream := self._waiting.get(output.request_id):
                stream.tell(output)
            if output.finished:  # even if its reader has not read everything yet
                self._leave(output.request_id)

    def _leave(self, known_as: str) -> bool:
        """Stop waiting and free the caller's id; whether the stream was waiting."""
        stream = self._waiting.pop(known_as, None)
        if stream:
            del self._known_as[stream.request_id]
        return stream is not None

    def _fail(self, error: BaseException, names: Container[str] | None = None) -> None:
        """End all waiting streams with ``error``, or only those that the engine knows by these ``names``."""
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
        """Close the engine, even if this call is cancelled; open streams end with an error. Closing twice is harmless,
        in any loop.

        Args:
            drain: first let open streams run to their end and refuse new ones for good, as a server does at SIGTERM. If
                the call is cancelled before that, as by ``asyncio.wait_for``, the engine stays open until ``close()``.
        """
        if drain and self._closing is None:
            self._enter()
            self._draining = True
            while self._closing is None and not all(stream.failed for stream in self._waiting.values()):
                await asyncio.sleep(0.01)
        if self._closing is None:
            self._enter()
            self._closing = self._close_in_worker()
        await asyncio.shield(asyncio.wrap_future(self._closing))  # _closing belongs to no loop: this one may end first

    def _close_in_worker(self) -> Future:
        try:
            return self._worker.submit(self._close)
        except RuntimeError:  # the process is ending and has joined its threads: the worker is gone
            self.engine.turn.release()
            self._close()
            (closed := Future()).set_result(None)
            return closed

    # What follows runs in the worker.

    def _run(self, function, *args):
        try:
            return function(self.engine, *args)
        except StopIteration as error:  # no future can hold it
            raise RuntimeError(f"{function!r} raised StopIteration") from error
        finally:
            self._go_on()

    def _abort(self, known_as: str) -> None:
        self._end(known_as)
        self._go_on()

    def _end(self, known_as: str, error: Exception | None = None) -> bool:
        """Abort the request, or end it with ``error``; whether that succeeded."""
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
        """Queue a step behind the calls already there, if there is anything to run or to hand out."""
        if not self._steps and self.engine.has_unfinished():
            self._steps = True
            self._worker.submit(self._step)

    def _step(self) -> None:
        """Step once and queue the next step behind calls made meanwhile. Whatever fails, no stream waits forever."""
        self._steps = False
        try:
            if self.engine.closed:
                raise RuntimeError("this engine is closed")
            if self._step_once():
                self._go_on()
        except Exception as error:
            self._tell(self._fail, error)  # the streams then abort their requests
        except BaseException as error:  # such as SystemExit sent to this thread: it would end the readers' event loop
            log.exception("a step ended the thread's work")
            ended = RuntimeError(f"a step ended with {error!r}")
            ended.__cause__ = error
            self._tell(self._fail, ended)

    def _step_once(self) -> bool:
        """Step once; whether to continue, if only to try again."""
        try:
            outputs = self.engine.step()
        except Exception as error:
            log.exception("a step failed")
            outbox = self.engine.outbox
            outbox.collect()
            outputs, outbox.outputs = outbox.outputs, []
            self._tell_outputs(outputs)
            stuck = {request.request_id for request in outbox.unfinished if request.failures >= MOST_FAILURES}
            return self._give_up(error, stuck) if stuck else bool(outbox.unfinished)
        self._tell_outputs(outputs)
        return True

    def _tell_outputs(self, outputs: list[RequestOutput]) -> None:
        # Copies, as running requests change their statistics while the loop may read them.
        self._tell(self._hand_out, [replace(out, stats=out.stats.copy()) for out in outputs])

    def _give_up(self, error: Exception, stuck: set[str]) -> bool:
        """Steps keep failing: end the requests that are ``stuck`` without waiting for their readers. Their streams end
        behind the outputs that they already have. The others are spared, unless one cannot be ended: then all streams
        fail, and the next step waits for aborts or a new request. Whether the others continue.
        """
        self._tell(self._fail, error, stuck)
        ended = all([self._end(known_as, error) for known_as in stuck])
        if not ended:
            self._tell(self._fail, error)
        return ended

    def _tell(self, function, *args) -> None:
        """Call ``function`` in the loop, unless another loop has taken over by then."""
        loop = self._loop

        def in_loop() -> None:
            if loop is self._loop:
                function(*args)

        try:
            loop.call_soon_threadsafe(in_loop)
        except RuntimeError:  # the loop is closed: no stream of it will be read again
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
    """Whether a stream waits for outputs and ``breaks`` belongs to the loop that delivers them."""
    it = shared()
    return it is not None and it._breaks is breaks and any(not stream.failed for stream in it._waiting.values())


def _own(error: BaseException) -> BaseException:
    """A copy for one of several readers: raising an exception adds frames to its traceback, which keep locals alive."""
    try:
        own = copy.copy(error)
    except Exception:  # not every class can be copied
        return error
    own.args = error.args  # a class may make its args from other arguments
    own.__cause__, own.__context__ = error.__cause__, error.__context__
    own.__suppress_context__ = error.__suppress_context__
    return own.with_traceback(error.__traceback__)
