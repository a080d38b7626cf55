"""Clients of one AsyncEngine that come and go at random: a client that stays gets the tokens that it gets alone."""

import asyncio
import logging
import random
import time
from collections import Counter

import pytest

from orthrus_rt.aio import AsyncEngine
from orthrus_rt.pages import PAGE_SIZE
from orthrus_rt.sampling import SamplingParams
from tests import engines

pytestmark = pytest.mark.native

MODES = ("ar", "two_pass", "one_pass", "auto")


class Injected(RuntimeError):
    pass


class Client:
    def __init__(self, shared: AsyncEngine, alone, cycles_alone, seed: int, ends: Counter):
        self.shared, self.alone, self.cycles_alone = shared, alone, cycles_alone
        self.rng, self.whims, self.ends, self.cycles = random.Random(seed), random.Random(seed), ends, 0

    async def run(self) -> None:
        for _ in range(6):
            rng = self.rng
            prompt = [rng.randrange(1, 90) for _ in range(rng.choice((1, 3, 20, 70)))]
            kind = {} if rng.random() < 0.5 else {"temperature": 0.8, "seed": rng.randrange(5)}
            params, got = SamplingParams(rng.randrange(1, 50), ignore_eos=True, **kind), []
            act = rng.choice((self.read, self.read, self.leave, self.be_cancelled, self.forget))
            try:
                end = await act(self.shared.stream(prompt, params), got)
            except Injected:
                end = "failed"
            self.ends[end] += 1
            want = self.alone(prompt, params)
            assert got == (want if end == "read" else want[: len(got)])
            if end == "read" and self.cycles_alone:
                assert self.cycles == self.cycles_alone(self.shared.engine.mode, tuple(prompt), params)

    async def read(self, stream, got) -> str:
        async for out in stream:
            got += out.new_token_ids
            self.cycles = out.stats.cycles
            assert out.stats.tokens == len(got)
            if self.whims.random() < 0.1:
                await asyncio.sleep(self.whims.random() * 0.005)
            elif self.whims.random() < 0.05:
                time.sleep(0.002)
        return "read"

    async def leave(self, stream, got) -> str:
        async for out in stream:
            got += out.new_token_ids
            self.cycles = out.stats.cycles
            if self.whims.random() < 0.3:
                await stream.aclose()
                return "left"
        return "read"

    async def be_cancelled(self, stream, got) -> str:
        task = asyncio.create_task(self.read(stream, got))
        await asyncio.sleep(self.whims.random() * 0.01)
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return "cancelled"

    async def forget(self, stream, got) -> str:
        return "forgotten"


def fail_at_times(engine, rng: random.Random, monkeypatch) -> None:
    advance = engine._advance

    def failing():
        if rng.random() < 0.02:
            raise Injected
        advance()

    monkeypatch.setattr(engine, "_advance", failing)


@pytest.mark.parametrize("seed", range(8))
def test_clients_come_and_go(folder, alone, cycles_alone, monkeypatch, seed):
    rng, ends = random.Random(seed), Counter()

    async def main() -> None:
        mode, most, pages = MODES[seed % 4], rng.choice((1, 3, 8)), rng.choice((None, 3, 5))
        engine = engines.make(
            folder, mode=mode, max_seq_len=128, max_batch_size=most, num_pages=pages, prefix_caching=seed % 3 > 0
        )
        async with AsyncEngine(engine) as shared:
            if seed % 4 == 0:
                fail_at_times(engine, rng, monkeypatch)
            # Not compared if pages run out, as some requests then start over without drafts, nor for auto, which
            # decides by measured times.
            enough = pages is None or pages >= most * 128 // PAGE_SIZE
            cycles = cycles_alone if enough and mode != "auto" else None
            clients = [Client(shared, alone, cycles, 100 * seed + i, ends).run() for i in range(rng.choice((4, 8)))]
            await asyncio.wait_for(asyncio.gather(*clients), 60)
            while engine.has_unfinished() or shared._steps:
                await asyncio.sleep(0.001)
            assert not shared._waiting and not shared._known_as
            assert not any(engine.scheduler.slots) and not engine.scheduler._live
            assert engine.kv.num_free_pages == engine.kv.num_pages

    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger("orthrus_rt"), "disabled", True)  # it logs the steps that fail
        asyncio.run(asyncio.wait_for(main(), 90))
    assert ends["read"] > 2
