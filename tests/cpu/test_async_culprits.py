"""Steps of an AsyncEngine that fail because of one request: it ends soon, and it alone."""

import pytest

from orthrus_rt.aio import MOST_FAILURES
from tests.culprits import WHERE, check_that_only_the_culprit_ends
from tests.shared_engine import GREEDY, collect, make, run

pytestmark = pytest.mark.native


@pytest.mark.parametrize(("mode", "chunk"), (("ar", 16), ("one_pass", 512)))
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("place", range(4))
def test_only_the_request_that_makes_steps_fail_ends(folder, alone, monkeypatch, where, place, mode, chunk):
    """Whether it comes first or last, and although the others decode between its failures."""
    check_that_only_the_culprit_ends(make(folder, mode=mode), where, place, alone, monkeypatch, chunk)


def test_a_request_that_gains_tokens_between_its_failures_goes_on(folder, alone, monkeypatch):
    """However many there are: these are not due to it."""

    async def use(shared):
        decode, calls = shared.engine.runner.decode, []

        def failing(*args):
            calls.append(None)
            if len(calls) % 3:  # twice before each success
                raise ValueError("lost")
            return decode(*args)

        monkeypatch.setattr(shared.engine.runner, "decode", failing)
        assert await collect(shared, [1, 2], GREEDY) == (alone([1, 2], GREEDY), "length")
        assert len(calls) > 3 * MOST_FAILURES

    run(folder, use)
