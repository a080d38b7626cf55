"""Runs coroutines on one engine that they share."""

import asyncio
import time
from functools import partial

from orthrus_rt.aio import AsyncEngine
from orthrus_rt.sampling import SamplingParams
from tests import engines

GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=100, ignore_eos=True)
make = partial(engines.make, max_seq_len=128, max_batch_size=4)


def run(folder, use, **kwargs):
    """Run ``use(shared)`` with an AsyncEngine."""

    async def main():
        async with AsyncEngine(make(folder, **kwargs)) as shared:
            await use(shared)
        assert shared.engine.closed
        await shared.close()  # closing again is harmless

    asyncio.run(main())


def slowly(shared, monkeypatch) -> None:
    """Make every step take a while, so that what has just begun is not over yet."""
    step = shared.engine.step
    monkeypatch.setattr(shared.engine, "step", lambda: (time.sleep(0.02), step())[1])


async def collect(shared, prompt, params):
    pieces = [out async for out in shared.stream(prompt, params)]
    return [t for out in pieces for t in out.new_token_ids], pieces[-1].finish_reason


async def collect_rest(stream):
    return [t async for out in stream for t in out.new_token_ids]
