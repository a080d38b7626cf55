"""Requests that run together: which ids and modes belong to which request."""

from functools import partial

import pytest

from orthrus_rt.sampling import SamplingParams
from tests import engines
from tests.engines import drain

pytestmark = pytest.mark.native
make = partial(engines.make, max_seq_len=256, max_batch_size=4)
GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)


def test_a_streams_id_is_nobodys_who_submits(folder, alone, cycles_alone):
    engine = make(folder, max_batch_size=1)
    stream = engine.stream([1, 2], GREEDY)
    first = next(stream)
    engine.submit([3], GREEDY, first.request_id)
    assert drain(engine) == {first.request_id: (alone([3], GREEDY), "length")}
    rest = list(stream)
    tokens = [token for out in rest for token in out.new_token_ids]
    assert first.new_token_ids + tokens == alone([1, 2], GREEDY)
    assert rest[-1].stats.cycles == cycles_alone("two_pass", (1, 2), GREEDY)


def test_a_mode_belongs_to_those_who_wait_too(folder, alone, cycles_alone):
    engine = make(folder)
    request_id = engine.submit([1, 2], GREEDY)
    with pytest.raises(RuntimeError, match="the mode cannot change while requests run"):
        engine.generate([3], GREEDY, mode="ar")
    assert drain(engine)[request_id] == (alone([1, 2], GREEDY), "length")
    assert engine.metrics.cycles == cycles_alone("two_pass", (1, 2), GREEDY)
