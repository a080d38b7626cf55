"""Decides which request runs next: first come, first served, over slots and pages. Knows nothing of the network."""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict

from orthrus_rt.kv import OutOfPages, PagedKvCache
from orthrus_rt.request import Request

_BY_ARRIVAL = operator.attrgetter("arrival")


class Scheduler:
    """Assigns slots and pages to waiting requests, in order of arrival.

    No request starves: the earliest request in a slot can always grow (the cache holds at least one whole sequence),
    and a preempted request returns to its place in the queue.
    """

    def __init__(self, kv: PagedKvCache, num_slots: int, prefix_caching: bool):
        self.kv, self.num_slots, self.prefix_caching = kv, num_slots, prefix_caching
        self.waiting: OrderedDict[int, Request] = OrderedDict()  # by arrival
        self.slots: list[Request | None] = [None] * num_slots
        self._live: dict[int, Request] = {}  # by arrival: all unfinished requests
        self._arrivals = itertools.count()

    @property
    def active(self) -> list[Request]:
        """Requests that hold a slot, in order of arrival."""
        return sorted((r for r in self.slots if r is not None), key=_BY_ARRIVAL)

    @property
    def unfinished(self) -> list[Request]:
        """Requests in the queue, in a slot, or between the two."""
        return [r for r in tuple(self._live.values()) if r.finish_reason is None]  # other threads read it too

    def holds(self, request: Request) -> bool:
        return self._live.get(request.arrival) is request

    def enqueue(self, request: Request) -> None:
        """Put a request at the end of the queue, or a preempted one back in its place."""
        if request.arrival < 0:
            request.arrive(next(self._arrivals))
        preempted = self.holds(request)
        self._live[request.arrival] = self.waiting[request.arrival] = request
        if preempted:  # a request that held a slot arrived before all that wait
            self.waiting.move_to_end(request.arrival, last=False)

    def admit(self, margin: int) -> Request | None:
        """Move the first request of the queue into a free slot if pages for it and for ``margin`` more positions are
        free.
        """
        if not self.waiting or None not in self.slots:
            return None
        request, slot = next(iter(self.waiting.values())), self.slots.index(None)
        # At least one token is computed in any case, as the last row of a prompt gives the first token.
        names = request.names_of_pages(request.num_known - 1) if self.prefix_caching else []
        try:
            found = self.kv.open(slot, names, min(request.length + margin, request.limit))
        except OutOfPages:
            return None
        self.waiting.popitem(last=False)
        self.slots[slot] = request
        request.begin(slot, found)
        return request

    def vacate(self, request: Request) -> int:
        """Take the request out of its slot and free its pages at once. Returns the slot."""
        slot, num_cached, request.slot = request.slot, request.num_cached, None
        self.slots[slot] = None
        if isinstance(request.error, FloatingPointError):  # its keys and values may be the cause
            self.kv.withdraw(slot, request.names_of_pages(request.length) if self.prefix_caching else [])
        else:
            self.publish(slot, request, num_cached)
        self.kv.release(slot)
        return slot

    def publish(self, slot: int, request: Request, num_tokens: int) -> None:
        """Let requests with the same beginning share the slot's pages of the request's first ``num_tokens`` tokens."""
        if self.prefix_caching:
            self.kv.publish(slot, request.names_of_pages(num_tokens))

    def forget(self, request: Request) -> None:
        """Drop a finished request."""
        self._live.pop(request.arrival, None)
        self.waiting.pop(request.arrival, None)

    def reset(self) -> list[Request]:
        """Return all requests to the queue, in order of arrival, and free every page. Returns the queue."""
        self.slots = [None] * self.num_slots
        for request in self._live.values():
            request.slot = None
        self._live = {a: r for a, r in self._live.items() if r.finish_reason is None}
        self.waiting = OrderedDict(self._live)
        self.kv.reset()
        return list(self.waiting.values())

    def compact(self) -> list[tuple[int, int]]:
        """Close gaps so that active requests hold the lowest slots. Returns the ``(source, target)`` moves."""
        held = [slot for slot, request in enumerate(self.slots) if request is not None]
        holes = [slot for slot in range(len(held)) if self.slots[slot] is None]
        moves = list(zip(reversed(held), holes, strict=False))  # there are as many held slots above as holes below
        for source, target in moves:
            request = self.slots[source]
            self.slots[target], self.slots[source], request.slot = request, None, target
            self.kv.move(source, target)
        return moves
