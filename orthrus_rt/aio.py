"""An engine shared by many asyncio tasks: one worker thread makes every call, each stream gets its own tokens."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from orthrus_rt.engine import Engine
from orthrus_rt.outputs import RequestOutput
from orthrus_rt.sampling import SamplingParams

MOST_FAILURES = 3  # steps in a row that may fail before every stream does
log = logging.getLogger("orthrus_rt")


class AsyncEngine:
    """Streams over one :class:`Engine`, which it uses alone from now on.

    Cancelling or closing a stream aborts its request; the others are not disturbed. Nor are they by a step that fails:
    that is logged, and a request to blame for it (see :meth:`Engine.step`) ends with finish_reason ``"abort"``.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="orthrus")
        self._queues: dict[str, asyncio.Queue] = {}  # of streams that wait for more
        self._loop_task: asyncio.Task | None = None
        self._closed = False

    def _call(self, function, *args):
        if self._closed:
            raise RuntimeError("this engine is closed")
        return asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    async def stream(self, prompt_ids, params: SamplingParams | None = None) -> AsyncIterator[RequestOutput]:
        """Yield the request's outputs as :meth:`Engine.step` returns them; the last has a ``finish_reason``.

        Raises:
            ValueError: the request cannot be served, as :meth:`Engine.submit`.
            Exception: whatever three steps in a row, or a closed engine, raised.
        """
        request_id = uuid.uuid4().hex
        queue = self._queues[request_id] = asyncio.Queue()
        finished = False
        try:
            await self._call(self.engine.submit, prompt_ids, params, request_id)
            if self._loop_task is None or self._loop_task.done():
                self._loop_task = asyncio.create_task(self._pump())
            while not finished:
                output = await queue.get()
                if isinstance(output, BaseException):
                    raise output
                finished = output.finished
                yield output
        finally:
            unfinished = self._queues.pop(request_id, None) is not None
            if unfinished and not self._closed:
                # Not awaited: the stream may be closing because its task was cancelled.
                self._worker.submit(self._abort, request_id)

    def _abort(self, request_id: str) -> None:
        if self.engine.is_unfinished(request_id):
            self.engine.abort(request_id)

    async def _pump(self) -> None:
        """Step while any stream waits for more, and hand every output to its stream."""
        failures = 0
        while self._queues and not self._closed:
            try:
                outputs = await self._call(self.engine.step)
                failures = 0
            except Exception as error:
                failures += 1
                log.exception("a step failed")
                if failures == MOST_FAILURES or self.engine.closed:
                    return self._fail(error)
                continue
            for output in outputs:
                queue = self._queues.get(output.request_id)
                if output.finished:  # however long its reader takes for what is left
                    self._queues.pop(output.request_id, None)
                if queue:
                    queue.put_nowait(output)
            await asyncio.sleep(0)

    def _fail(self, error: Exception) -> None:
        for queue in self._queues.values():
            queue.put_nowait(error)

    async def close(self) -> None:
        """Close the engine; open streams end with an error. Closing twice is harmless."""
        if not self._closed:
            closing = self._call(self.engine.close)
            self._closed = True
            await closing
            self._worker.shutdown(wait=False)
            self._fail(RuntimeError("this engine is closed"))
