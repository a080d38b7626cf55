"""Streams of one engine: they advance each other, and may be closed, or broken off, anywhere."""

import threading
from functools import partial

import pytest

from orthrus_rt.sampling import SamplingParams
from tests import engines
from tests.engines import all_pages_back, drain

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

make = partial(engines.make, max_seq_len=256, max_batch_size=8)


def test_a_callers_exception_inside_a_stream(folder, alone):
    engine = make(folder)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    other = engine.submit([4, 5, 6], params)
    with pytest.raises(ZeroDivisionError):
        for _ in engine.stream([1, 2, 3], params):
            1 / 0  # noqa: B018
    assert drain(engine)[other] == (alone([4, 5, 6], params), "length")
    all_pages_back(engine)


def test_interleaved_streams_lose_nothing(folder, alone):
    """Streams, a generate and steps advance each other; each still gets all its tokens and its finish reason."""
    engine = make(folder)
    short, long = (SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (10, 40))
    a, b = engine.stream([1, 2, 3], short), engine.stream([4, 5], long)
    got = {"a": [], "b": []}
    for name, stream in (("a", a), ("b", b)):
        got[name].append(next(stream))
    assert engine.generate([6, 7], long).token_ids == alone([6, 7], long)
    got["a"] += list(a)
    got["b"] += list(b)
    for name, prompt, params in (("a", [1, 2, 3], short), ("b", [4, 5], long)):
        assert [t for piece in got[name] for t in piece.token_ids] == alone(prompt, params)
        assert got[name][-1].finish_reason == "length"
    all_pages_back(engine)


def next_elsewhere(stream):
    reader = threading.Thread(target=next, args=(stream,))
    reader.start(), reader.join()


def test_streams_end_at_once_where_they_were_read_last_else_with_the_next_call(folder):
    engine, params = make(folder), SamplingParams(max_new_tokens=100, ignore_eos=True)
    here, *elsewhere = (engine.stream([i], params) for i in range(3))
    for stream in (here, *elsewhere):
        next_elsewhere(stream)
    next(here)
    here.close()
    assert engine.metrics.finished["abort"] == 1
    for stream in elsewhere:
        stream.close()
    assert len(engine.dropped) == 2
    engine.step()
    assert engine.metrics.finished["abort"] == 3 and not engine.has_unfinished()


def test_a_stream_may_be_closed_after_its_engine(folder):
    engine = make(folder)
    stream = engine.stream([1, 2])
    next(stream)
    engine.close()
    stream.close()
