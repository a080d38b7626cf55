"""An engine that is closed, fails or could not be made lets go of everything."""

import gc
import weakref
from functools import partial

import pytest
import torch

from orthrus_rt.device import claim
from orthrus_rt.engine import Engine
from orthrus_rt.flights import Mailbox
from orthrus_rt.results import SlotResults
from orthrus_rt.runner import Runner
from orthrus_rt.sampling import SamplingParams
from tests import engines, failing
from tests.failing import exhausted

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=20, temperature=0.8, seed=3, ignore_eos=True)
make = partial(engines.make, max_seq_len=128, max_batch_size=4)


def test_an_engine_that_could_not_be_made_does_not_hold_its_device(folder, monkeypatch):
    made = []
    monkeypatch.setattr("orthrus_rt.engine.claim", lambda device, engine: made.append(engine))
    monkeypatch.setattr(Runner, "__init__", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        make(folder)
    device = torch.device("cuda:7")
    claim(device, made[0])  # as the constructor had done
    claim(device, object.__new__(Engine))


@pytest.mark.parametrize("broken", (False, True))
def test_close_gives_the_memory_back(folder, monkeypatch, broken):
    """Also of an engine whose device fails and that would have to recover first."""
    engine = make(folder)
    name = engine.submit([1, 2], SAMPLED)
    for _ in range(3):
        engine.step()
    held = [weakref.ref(x) for x in (engine.kv.pages, engine.model, engine.runner.activations.normed)]
    if broken:
        engine.torn = True
        monkeypatch.setattr(engine.runner, "drop_cycles", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.close()
        monkeypatch.undo()
    engine.close()
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
    assert not engine.has_unfinished() and not engine.is_unfinished(name)
    facts = engine.metrics.as_dict()
    assert facts["finished"]["abort"] == 1 and facts["tokens"] > 1
    assert (facts["waiting"], facts["running"], facts["pages"], facts["pages_free"]) == (0, 0, 0, 0)
    for call in (
        engine.step,
        engine.memory_report,
        engine.warmup,
        lambda: engine.generate([1]),
        lambda: engine.stream([1]),
        lambda: engine.check([1]),
        engine.explain,
    ):
        with pytest.raises(RuntimeError, match="this engine is closed"):
            call()
    engine.abort(name)  # a moment too late


def broken_device(engine):
    """Everything that touches the device raises, as with CUDA after a fault."""

    def fault(*_, **__):
        raise RuntimeError("CUDA error: device-side assert triggered")

    for call in ("decode", "prefill", "begin", "clear", "reset", "drop_cycles"):
        setattr(engine.runner, call, fault)


def test_a_device_that_fails(folder):
    message = "CUDA error: device-side assert triggered"
    facts = failing.after_a_failure(lambda: make(folder), broken_device)
    failing.check_failure(facts, message)
    assert message in facts["close"]
    facts = failing.streams_after_a_failure(make(folder), broken_device)
    failing.check_streams(facts, message)
    assert message in facts["close"]


@pytest.mark.parametrize("broken", (False, True))
def test_page_locked_memory_is_not_freed_on_a_device_that_has_failed(folder, broken):
    engine = make(folder)
    engine.runner.flights._mailboxes.append(Mailbox(SlotResults(2, 8, "cpu"), None))
    memory = weakref.ref(engine.runner.flights._mailboxes[0].results.memory)
    if broken:
        broken_device(engine)
        with pytest.raises(RuntimeError, match="CUDA error"):
            engine.close()
    engine.close()
    gc.collect()
    assert (memory() is not None) == broken


def test_closing_ends_whom_an_interrupt_left_between_queue_and_slot(folder, monkeypatch):
    engine = make(folder)
    engine.submit([1, 2], GREEDY)
    (request,) = engine.scheduler.unfinished

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(request, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.scheduler.slots[0] = None
    engine.close()
    assert request.finish_reason == "abort" and engine.metrics.as_dict()["finished"]["abort"] == 1


def test_a_prompt_refused_by_a_closing_engine_is_not_counted(folder):
    engine = make(folder)
    stream = engine.stream([1, 2], GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="the mode cannot change"):
        engine.generate([3], GREEDY, mode="ar")
    assert engine.metrics.as_dict()["finished"]["abort"] == 0
    stream.close()
    assert engine.metrics.as_dict()["finished"]["abort"] == 1
