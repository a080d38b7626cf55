"""Launches whose results have not been read, which are on their way from the device to the host."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.device import never_free
from orthrus_rt.policy import Policy
from orthrus_rt.request import Request
from orthrus_rt.results import SlotResults
from orthrus_rt.stopwatch import Stretch


@dataclass
class Mailbox:
    """A copy of the results in pinned memory, and the event that its arrival records."""

    results: SlotResults
    arrived: torch.cuda.Event


@dataclass
class Flight:
    """A launch that has not been read: its requests, its kind, and where its results will be."""

    requests: list[tuple[int, Request]]  # (slot at launch, request)
    plan: CyclePlan | None  # of the cycle; None for a prefill
    results: SlotResults
    arrived: torch.cuda.Event | None  # of the results; None where they are already
    timed: Stretch | None  # of a cycle in its steady form
    policy: Policy | None = None  # that chose the plan and expects its results

    def collect(self) -> SlotResults:
        """Wait for the results and return them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.results


class Flights:
    """Flights, oldest first. If the device runs ahead of the host (``lag`` 1), each has its own copy of the results in
    pinned memory. Otherwise ``results``, where the device writes them, is host memory.
    """

    def __init__(self, results: SlotResults):
        self.lag = 1 if results.memory.device.type == "cuda" else 0
        self.num_posted = 0  # ever
        self._results, self._flights = results, deque()
        self._mailboxes: list[Mailbox] = []

    def __len__(self) -> int:
        return len(self._flights)

    def post(self, requests: list[Request], plan: CyclePlan | None, timed: Stretch | None = None, policy=None) -> None:
        """Add what was just launched for these requests, and start a copy of the results as it leaves them."""
        results, arrived = self._results, None
        if self.lag:
            box = self._free_mailbox()
            results, arrived = box.results, box.arrived
            results.memory.copy_(self._results.memory, non_blocking=True)
            arrived.record()
        self._flights.append(Flight([(r.slot, r) for r in requests], plan, results, arrived, timed, policy))
        self.num_posted += 1

    def _free_mailbox(self) -> Mailbox:
        """One that no unread flight uses. There are as many as flights were ever unread at once."""
        for box in self._mailboxes:
            if not any(box.results is flight.results for flight in self._flights):
                return box
        pinned = SlotResults(*self._results.views["output"].shape, "cpu", pinned=True)
        self._mailboxes.append(Mailbox(pinned, torch.cuda.Event()))
        return self._mailboxes[-1]

    def pop(self) -> Flight:
        """Remove and return the oldest flight, whose results may not have arrived."""
        return self._flights.popleft()

    def clear(self) -> None:
        """Drop all flights unread."""
        self._flights.clear()

    @property
    def may_fly(self) -> bool:
        """Whether something was ever launched ahead of its results."""
        return bool(self._mailboxes)

    def abandon(self) -> None:
        """Never free the mailboxes, since the device has failed."""
        for box in self._mailboxes:
            never_free(box.results.memory)
