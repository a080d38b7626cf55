"""What was launched and not yet read: where its results lie, and that nothing waits for their copy."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from orthrus_rt import state as st
from orthrus_rt.flights import Flights, Mailbox
from orthrus_rt.results import SlotResults
from orthrus_rt.runner import Runner
from tests import engines

pytestmark = pytest.mark.native
make = partial(engines.make, max_seq_len=128, max_batch_size=2)


def test_results_come_by_page_locked_memory_and_nobody_waits_for_the_copy(monkeypatch):
    empty, pinned, copies, events = torch.empty, [], [], []

    def tapped(*size, pin_memory=False, **how):
        pinned.append(pin_memory)
        return empty(*size, **how)

    class Copies(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.copy_:
                copies.append((kwargs or {}).get("non_blocking", False))
            return function(*args, **(kwargs or {}))

    class Event:
        def __init__(self):
            events.append(self)

        def record(self): ...

    flights = Flights(SlotResults(2, 8, "cpu"))
    flights.lag = 1  # as for a device that runs ahead
    monkeypatch.setattr(torch, "empty", tapped)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with Copies():
        flights.post([], None)
    assert pinned == [True] and copies == [True] and flights.may_fly
    with Copies():
        flights.post([], None)  # while the first is unread
        first = flights.pop()
        flights.post([], None)
    assert pinned == [True] * 2 and flights.num_posted == 3  # the third uses the first one's buffer again,
    assert len(events) == 2  # and its event
    assert flights.pop().results is not first.results is flights.pop().results


def test_no_slot_runs_before_its_first_request(folder):
    """All slots begin as EMPTY, without output."""
    state = make(folder).runner.state
    assert state.finish.tolist() == [st.EMPTY] * 2 and not state.num_output.any()


def test_what_may_be_running_is_waited_for_before_it_is_dropped(monkeypatch):
    """Cycles, and whatever was launched ahead of its results; otherwise nothing is."""
    waited, runner = [], object.__new__(Runner)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    runner.model = SimpleNamespace(device=torch.device("cuda:1"))
    for cycles, with_prompts, may_fly in (
        ({}, {}, False),
        ({}, {}, True),
        ({1: "a cycle"}, {}, False),
        ({}, {1: 2}, False),
    ):
        runner._cycles, runner._with_prompts, runner.flights = cycles, with_prompts, SimpleNamespace(may_fly=may_fly)
        runner.drop_cycles()
        assert not runner._cycles and not runner._with_prompts
    assert waited == [runner.model.device] * 3


def test_mailboxes_outlive_the_flights_that_are_given_up(folder):
    """Their copies may still be under way."""
    engine = make(folder)
    engine.runner.flights._mailboxes.append(Mailbox(SlotResults(2, 8, "cpu"), None))
    engine.torn = True
    engine.step()  # recovers
    assert len(engine.runner.flights._mailboxes) == 1 and engine.runner.flights.may_fly
