"""Steps of an AsyncEngine that fail because of one request: it ends soon, and it alone."""

import asyncio

import pytest

from orthrus_rt import runner
from orthrus_rt.aio import MOST_FAILURES
from tests import failing
from tests.culprits import CULPRIT, WHERE, check_that_only_the_culprit_ends, fail
from tests.shared_engine import GREEDY, LONG, collect, make, run

pytestmark = pytest.mark.native


@pytest.mark.parametrize(("mode", "chunk"), (("ar", 16), ("one_pass", 512)))
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("place", range(4))
def test_only_the_request_that_makes_steps_fail_ends(folder, alone, monkeypatch, where, place, mode, chunk):
    """Whether it comes first or last, and although the others decode between its failures."""
    check_that_only_the_culprit_ends(make(folder, mode=mode), where, place, alone, monkeypatch, chunk)


@pytest.mark.parametrize("chunk", (40, 512))
def test_one_culprit_after_another_ends_nobody_else(folder, alone, monkeypatch, chunk):
    """A client tries again at once, or several wait; a pass of ``chunk`` prompt tokens holds one of them or all."""
    monkeypatch.setattr(runner, "PREFILL_CHUNK", chunk)

    async def use(shared):
        notes = fail(shared.engine, "prefill", monkeypatch)

        async def again():
            for _ in range(3):
                with pytest.raises(ValueError, match="lost"):
                    await collect(shared, CULPRIT, LONG)

        first, *_ = await asyncio.gather(collect(shared, [1, 2], LONG), again(), again())
        assert first == (alone([1, 2], LONG), "length") and len(notes) <= 6 * MOST_FAILURES

    run(folder, use)


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


def test_recordings_that_always_fail_end_no_request(folder, alone):
    """As if a driver could not capture some launch: everything runs op by op, and after two tries for good."""
    spoilt, jobs = [], [([1, 2], LONG), ([3], LONG)]

    def spoil(cycle):
        spoilt.append(cycle)
        raise ValueError("lost")

    async def use(shared):
        async def stream():
            assert await asyncio.gather(*(collect(shared, *job) for job in jobs)) == want
            return failing.cycles_of(shared.engine)

        want = [(alone(*job), "length") for job in jobs]
        said = r"^recording the two_pass cycle of .* failed \(ValueError: lost\); %s runs op by op, slower$"
        first, second = (pytest.warns(UserWarning, match=said % form) for form in ("the next run .*", "until .*"))
        with failing.amid_recordings(spoil), first, second:
            cycles = await stream()
        assert cycles and all(cycle.op_by_op == (spoilt.count(cycle) == 2) for cycle in cycles)
        shared.engine.runner.drop_cycles()
        assert not any(cycle.op_by_op for cycle in await stream())

    run(folder, use, mode="two_pass")
