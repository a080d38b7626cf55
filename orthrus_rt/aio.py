"""An engine shared by many asyncio tasks: one worker thread makes every call, each stream gets its own tokens."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from orthrus_rt.engine import Engine
from orthrus_rt.outputs import RequestOutput
from orthrus_rt.sampling import SamplingParams


class AsyncEngine:
    """Streams over one :class:`Engine`, which it uses alone from now on.

    Cancelling or closing a stream aborts its request; the others are not disturbed.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="orthrus")
        self._queues: dict[str, asyncio.Queue] = {}
        self._loop_task: asyncio.Task | None = None
        self._closed = False

    def _call(self, function, *args):
        return asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    async def stream(self, prompt_ids, params: SamplingParams | None = None) -> AsyncIterator[RequestOutput]:
        """Yield the request's outputs as :meth:`Engine.step` returns them; the last has a ``finish_reason``.

        Raises:
            ValueError: the request cannot be served, as :meth:`Engine.submit`.
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
            del self._queues[request_id]
            if not finished and not self._closed:
                # Not awaited: the stream may be closing because its task was cancelled.
                self._worker.submit(self._abort, request_id)

    def _abort(self, request_id: str) -> None:
        if self.engine.is_unfinished(request_id):
            self.engine.abort(request_id)

    async def _pump(self) -> None:
        """Step while any stream is open, and hand every output to its stream."""
        while self._queues:
            try:
                outputs = await self._call(self.engine.step)
            except Exception as error:
                for queue in self._queues.values():
                    queue.put_nowait(error)
                return
            for output in outputs:
                if queue := self._queues.get(output.request_id):
                    queue.put_nowait(output)
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Close the engine; open streams end with an error."""
        self._closed = True
        await self._call(self.engine.close)
        self._worker.shutdown(wait=False)
