"""Requests that make an engine's steps fail wherever they have a part in one; a check that they end, and they alone."""

from __future__ import annotations

import asyncio
import contextlib
import functools

from orthrus_rt import runner
from orthrus_rt.aio import MOST_FAILURES, AsyncEngine
from orthrus_rt.engine import Engine
from tests.shared_engine import GREEDY, LONG, collect

CULPRIT = [66] * 40


def culprits(requests):
    return [request for request in requests if request.prompt == CULPRIT]


def in_begin(request):
    return culprits([request])


def in_prefill(*args):
    """The last of its passes, also as part of a cycle."""
    return [r for r in culprits(request for _, _, request in args[-1]) if r.decoding]


def in_decode(requests, *_):
    return culprits(requests)


def in_results(flight, request, result):
    return culprits([request]) if flight.plan else []


WHERE = {
    "begin": ("runner", {"begin": in_begin}),
    "prefill": ("runner", {"prefill": in_prefill, "decode_and_prefill": in_prefill}),
    "decode": ("runner", {"decode": in_decode, "decode_and_prefill": in_decode}),
    "results": ("", {"_take_result": in_results}),
}


def _unless(is_due, run, *args):
    if is_due(*args):
        raise ValueError("lost")
    return run(*args)


def fail(engine: Engine, where: str, monkeypatch) -> list[str]:
    """Make the engine fail there whenever the culprit has a part in it. Returns the notes of all failures to come."""
    place, methods = WHERE[where]
    target, notes, charging = getattr(engine, place, engine), [], engine._charging
    for name, is_due in methods.items():
        monkeypatch.setattr(target, name, functools.partial(_unless, is_due, getattr(target, name)))

    @contextlib.contextmanager
    def noting():
        try:
            with charging():
                yield
        except ValueError as error:
            notes.extend(error.__notes__)
            raise

    monkeypatch.setattr(engine, "_charging", noting)
    return notes


def check_that_only_the_culprit_ends(engine: Engine, where: str, place: int, alone, monkeypatch, chunk=16) -> None:
    """Requests of which number ``place`` is the culprit get what they get ``alone``, but for that one. A pass takes
    ``chunk`` prompt tokens, of one prompt or of several.
    """
    monkeypatch.setattr(runner, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr(runner, "CHUNK_BESIDE", {"cpu": chunk})
    lag, notes = engine.runner.flights.lag, fail(engine, where, monkeypatch)
    prompts = [([1, 2, 3], LONG), ([5] * 9, GREEDY), ([7] * 20, GREEDY)]

    async def outputs():
        async with AsyncEngine(engine) as shared:
            given = [*prompts[:place], (CULPRIT, LONG), *prompts[place:]]
            streams = asyncio.gather(*(collect(shared, *one) for one in given), return_exceptions=True)
            outs = await asyncio.wait_for(streams, 60)
            assert engine.kv.num_free_pages == engine.kv.num_pages
        return outs

    outs = asyncio.run(outputs())
    assert repr(outs.pop(place)) == "ValueError('lost')"
    assert outs == [(alone(*one), "length") for one in prompts]
    # With a lag, its first token is unread at the first two failures to decode it, but not at the third.
    assert len(notes) == MOST_FAILURES + (2 * lag if where == "decode" else 0)
    assert notes[-1].count("#") == 1, notes  # AsyncEngine's ids end in #1, #2, …
