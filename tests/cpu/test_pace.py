"""Tests that ask for ``paced`` notice a broken drafter, although its text is right."""

import contextlib

import pytest

from tests import engines, pace, poison

pytestmark = pytest.mark.native


@pytest.mark.parametrize("mode", ("two_pass", "one_pass"))
def test_a_broken_drafter_is_noted(folder, alone, cycles_alone, mode):
    engine = engines.make(folder, mode=mode, max_seq_len=128, max_batch_size=4)
    jobs = poison.jobs_of([poison.GREEDY, poison.SAMPLED])
    want = [(tuple(prompt), cycles_alone(mode, tuple(prompt), params)) for prompt, params in jobs]
    for broken in (False, True):
        with pace.noted(folder) as ended, poison.nan_drafter(engine) if broken else contextlib.nullcontext():
            outs = poison.run(engine, jobs)
        assert outs == [(alone(*job), "length", None) for job in jobs]
        assert (sorted((one.prompt, one.cycles) for one in ended) != sorted(want)) == broken
