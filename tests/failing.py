"""Devices without memory for a request or for a recording, recordings that are spoilt, and devices that fail for good;
for the CPU and GPU tiers.

``python -m tests.failing FOLDER`` makes the CUDA device of its own process fail under an engine for the checkpoint in
FOLDER: nothing else in that process can use the device any more. It prints the outcome as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable

import pytest
import torch

from orthrus_rt.aio import AsyncEngine
from orthrus_rt.cycle import Cycle
from orthrus_rt.engine import Engine
from orthrus_rt.model import Activations
from orthrus_rt.sampling import SamplingParams
from orthrus_rt.state import SlotEdits
from tests import engines
from tests.engines import a_beginning_each
from tests.poison import Job

MORE_THAN_THERE_IS = 1 << 50
LONG = SamplingParams(max_new_tokens=100, ignore_eos=True)


def exhausted(*_, **__):
    raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")


@contextlib.contextmanager
def amid_recordings(act: Callable[[Cycle], object]):
    """``act(cycle)`` is called in the middle of every recording of a cycle."""
    recording, record, stage_first = [], Cycle.make_recording, Cycle.stage_first

    def noted_record(cycle):
        recording.append(cycle)
        try:
            return record(cycle)
        finally:
            recording.clear()

    def stage_first_and_act(cycle):
        stage_first(cycle)
        if recording:
            act(cycle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cycle, "make_recording", noted_record)
        patch.setattr(Cycle, "stage_first", stage_first_and_act)
        yield


def no_memory_for_recordings():
    """In the middle of every recording, the allocator is asked for more memory than there is."""

    def ask(cycle: Cycle) -> None:
        torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8, device=cycle.model.device)

    return amid_recordings(ask)


def cycles_of(engine: Engine) -> list[Cycle]:
    return list(engine.runner._cycles.values())


def check_recordings_without_memory(engine: Engine, jobs: list[Job]) -> None:
    """The same tokens in as many cycles, all of them op by op, with a warning for each that could not be recorded. Once
    there is memory and the cycles are built anew, they are recorded again.
    """
    prompts, params = ([job[i] for job in jobs] for i in range(2))

    def tokens():
        return [(out.token_ids, out.stats.cycles) for out in engine.generate(prompts, params)]

    want = tokens()
    assert cycles_of(engine) and not any(cycle.op_by_op for cycle in cycles_of(engine))
    engine.runner.drop_cycles()
    slower = r".* op by op, slower$"
    said = rf"recording the {engine.mode} cycle of \d+ slots: lower max_batch_size, .*;{slower}"
    with no_memory_for_recordings(), pytest.warns(UserWarning, match=said) as warned:
        assert tokens() == tokens() == want
    ours = [warning for warning in warned if re.match(slower, str(warning.message))]  # torch and Triton may warn too
    assert len(ours) == len(cycles_of(engine)) and all(cycle.graph_bytes == 0 for cycle in cycles_of(engine))
    assert all(cycle.settled and cycle.op_by_op for cycle in cycles_of(engine))
    engine.runner.drop_cycles()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", slower)
        assert tokens() == want
    assert not any(cycle.op_by_op for cycle in cycles_of(engine))
    engine.runner.drop_cycles()
    with no_memory_for_recordings(), warnings.catch_warnings():
        warnings.filterwarnings("error", slower)
        for _ in range(20):  # cycles and passes with prompts: each raises its warning once
            with contextlib.suppress(UserWarning):
                assert tokens() == want
                break
        else:
            raise AssertionError("warnings that are errors come again and again")
    engine.runner.drop_cycles()


# Allocations for a request that may find no memory before anything is launched for it.
AT_THE_START = (Activations, "logits"), (SlotEdits, "allocate")


def check_refused_at_the_start(make, alone, lacking) -> None:
    """Some requests find no memory for what they are the first to need. The others still have the same tokens, cycles
    and passes, and what is in the prefix cache stays there, including what the refused requests shared.
    """
    beginning = [i % 90 for i in range(140)]
    prompts = [[*beginning, 91], [7] * 70, [*beginning, 92], [8]]
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    refused = dataclasses.replace(params, temperature=0.8, seed=3, repetition_penalty=1.2)
    facts = []
    for beside in ([], [[*beginning, 93], [5] * 200]):
        engine, told, good, bad = make(), {}, [], []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*lacking, exhausted)
            for prompt in prompts:
                good.append(engine.submit(prompt, params))
                bad += [engine.submit(ids, refused) for ids in beside]
                for _ in range(3):
                    engines.take(engine.step(), told)
            engines.drain(engine, told)
        assert [told[i] for i in good] == [(alone(prompt, params), "length") for prompt in prompts]
        assert [told[i] for i in bad] == [([], "error")] * len(bad)
        assert engine.kv.num_free_pages == engine.kv.num_pages and engine.metrics.recomputed_tokens == 0
        assert engine.generate([*beginning, 94], params).stats.cached_tokens == 128
        now = engine.metrics.as_dict()
        facts.append([now["cycles"], now["passes"], {kind: t["count"] for kind, t in now["times"].items()}])
        assert engine.generate(prompts[1], refused).token_ids == alone(prompts[1], refused)
    assert facts[0] == facts[1]


def _interrupt() -> None:
    raise KeyboardInterrupt


def _wait_elsewhere() -> None:
    """Another thread waits for the whole device, which may raise an error in that thread."""

    def wait():
        with contextlib.suppress(Exception):
            torch.cuda.synchronize()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(30)


# What may spoil a recording in its middle. Only the first reaches the caller of ``step``.
SPOILERS = {
    "interrupt": _interrupt,
    "wait": lambda: torch.cuda.synchronize(),
    "wait of another thread": _wait_elsewhere,
}


def check_a_spoilt_recording(engine: Engine, jobs: list[Job], spoiler: str) -> None:
    """Nothing is lost: the tokens are the same, every cycle is recorded and replayed as usual, and the program can
    still draw random numbers on the device.
    """

    def decoded(failures: list) -> list[list[int]]:
        names, got = [engine.submit(*job) for job in jobs], {}
        while engine.has_unfinished():
            try:
                outputs = engine.step()
            except BaseException as error:
                failures.append(error)
                if len(failures) > len(jobs):
                    raise
                continue
            engines.take(outputs, got)
        return [got[name][0] for name in names]

    struck, failures = [], []

    def spoil(cycle: Cycle) -> None:
        struck.append(engine.metrics.as_dict()["tokens"])
        if len(struck) == 2:  # before the first recording there were no tokens to lose
            SPOILERS[spoiler]()

    want = decoded(failures)
    before, recorded = engine.metrics.as_dict()["tokens"], len(cycles_of(engine))
    assert recorded > 1 and not failures
    engine.runner.drop_cycles()
    with amid_recordings(spoil), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert decoded(failures) == decoded(failures) == want  # the second time, cycles come again
    said = [str(warning.message) for warning in warned if "the next run tries again" in str(warning.message)]
    assert [type(error) for error in failures] == [KeyboardInterrupt] * (spoiler == "interrupt"), failures
    assert len(said) == {"interrupt": 0, "wait": 1}.get(spoiler, len(said)) <= 1, said
    assert struck[1] > before + len(jobs) and len(struck) >= len(cycles_of(engine)) + len(failures) + len(said)
    torch.rand(1, device=engine.device)
    failed = len(failures)
    assert decoded(failures) == want and len(failures) == failed
    assert len(cycles_of(engine)) > 1 and all(c.settled and not c.op_by_op for c in cycles_of(engine))


def after_a_failure(make, fail) -> dict:
    """What the calls of an engine raise and leave behind when its device fails in the middle of decoding.

    Args:
        make: makes an engine.
        fail: ``fail(engine)`` makes its device fail.
    """
    facts = {}
    engine = make()
    name = engine.submit([1, 2, 3], LONG)
    before = []
    for _ in range(4):
        before += [t for out in engine.step() for t in out.new_token_ids]
    facts["tokens_before"] = len(before)
    fail(engine)
    facts["steps"] = [_error_of(engine.step) for _ in range(4)]
    facts["unfinished"] = engine.is_unfinished(name)
    facts["generate"] = _error_of(lambda: engine.generate([4], LONG))
    facts["close"] = _error_of(engine.close)
    facts["closed"], facts["aborted"] = engine.closed, engine.metrics.as_dict()["finished"]["abort"]
    facts["close_again"] = _error_of(engine.close)
    facts["step_when_closed"] = _error_of(engine.step)
    return facts


def streams_after_a_failure(engine: Engine, fail) -> dict:
    """What an open stream, a new one and ``close`` of an :class:`AsyncEngine` raise once the device has failed."""

    async def main():
        facts, shared = {}, AsyncEngine(engine)
        with a_beginning_each(engine):
            stream = shared.stream([1, 2, 3], LONG)
            await anext(stream)
            fail(engine)
        facts["open_stream"] = await _async_error_of(_exhaust(stream))
        facts["new_stream"] = await _async_error_of(_exhaust(shared.stream([4], LONG)))
        facts["close"] = await _async_error_of(shared.close())
        facts["closed"] = engine.closed
        return facts

    return asyncio.run(asyncio.wait_for(main(), 60))


def check_failure(facts: dict, message: str) -> None:
    """Every call reports what is wrong, until the engine is closed. Closing may raise an error, but it does close."""
    assert facts["tokens_before"] > 0
    assert all(message in (said or "") for said in (*facts["steps"][1:], facts["generate"])), facts
    assert facts["steps"][0] is None or message in facts["steps"][0], facts  # its results may have been there already
    assert facts["unfinished"] and facts["closed"] and facts["aborted"] == 1, facts
    assert facts["close"] is None or message in facts["close"], facts
    assert facts["close_again"] is None and "this engine is closed" in facts["step_when_closed"], facts


def check_streams(facts: dict, message: str) -> None:
    assert message in (facts["open_stream"] or ""), facts
    assert message in (facts["new_stream"] or ""), facts
    assert facts["close"] is None or message in facts["close"], facts
    assert facts["closed"], facts


def _error_of(call) -> str | None:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


async def _async_error_of(call) -> str | None:
    try:
        await call
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


async def _exhaust(stream) -> None:
    async for _ in stream:
        pass


def _fail_cuda(engine: Engine) -> None:
    """An index out of range: the kernel that reads it asserts, and every later call on the device fails."""
    torch.zeros(4, device=engine.device)[torch.tensor([1 << 20], device=engine.device)]


def main(folder: str) -> None:
    def make():
        return Engine.from_pretrained(folder, device="cuda", mode="two_pass", max_seq_len=128, max_batch_size=2)

    if os.environ.get("FAILING") == "streams":
        facts = streams_after_a_failure(make(), _fail_cuda)
    else:
        facts = after_a_failure(make, _fail_cuda)
    print(json.dumps(facts), flush=True)
    os._exit(0)  # a normal exit tears down CUDA, which may abort on such a device


if __name__ == "__main__":
    main(sys.argv[1])
