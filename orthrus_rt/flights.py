"""What was launched and not yet read: results on their way from the device to the host."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.policy import Policy
from orthrus_rt.request import Request
from orthrus_rt.results import SlotResults
from orthrus_rt.stopwatch import Stretch

_leaked_mailboxes: list[SlotResults] = []  # of devices that have failed


@dataclass
class Flight:
    """Work launched and not yet read: whose, what kind, and where its results will be."""

    requests: list[tuple[int, Request]]  # (slot at launch, request)
    plan: CyclePlan | None  # of the cycle; None for a prefill
    results: SlotResults
    done: torch.cuda.Event | None
    timed: Stretch | None  # of a cycle that ran as it will run again
    policy: Policy | None = None  # that chose the plan and waits for what came of it

    def collect(self) -> SlotResults:
        """Wait for the results."""
        if self.done is not None:
            self.done.synchronize()
        return self.results


class Flights:
    """Oldest first. Of a device that runs ahead of the host (``lag`` 1) each has its copy in pinned memory; else
    ``results``, where the device writes them, are the host's own.
    """

    def __init__(self, results: SlotResults):
        self.lag = 1 if results.memory.device.type == "cuda" else 0
        self.num_posted = 0  # ever
        self._results, self._flights = results, deque()
        self._mailboxes: list[SlotResults] = []

    def __len__(self) -> int:
        return len(self._flights)

    def post(self, requests: list[Request], plan: CyclePlan | None, timed: Stretch | None = None, policy=None) -> None:
        """What was just launched for these: a copy of the results as it leaves them is put on its way."""
        results, done = self._results, None
        if self.lag:
            results = self._mailbox()
            results.memory.copy_(self._results.memory, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._flights.append(Flight([(r.slot, r) for r in requests], plan, results, done, timed, policy))
        self.num_posted += 1

    def _mailbox(self) -> SlotResults:
        """A pinned buffer that no unread flight holds; as many as flights are ever unread, then used again."""
        for box in self._mailboxes:
            if not any(box is flight.results for flight in self._flights):
                return box
        self._mailboxes.append(SlotResults(*self._results.views["output"].shape, "cpu", pinned=True))
        return self._mailboxes[-1]

    def pop(self) -> Flight:
        """The oldest, whose results may still be on their way."""
        return self._flights.popleft()

    def clear(self) -> None:
        """Nobody waits for them any more."""
        self._flights.clear()

    @property
    def may_fly(self) -> bool:
        """Whether something was ever launched ahead of its results."""
        return bool(self._mailboxes)

    def abandon(self) -> None:
        """The device has failed. Page-locked memory is kept: freeing it, torch asks the device, in a destructor, and
        the process would end there.
        """
        _leaked_mailboxes.extend(self._mailboxes)
