"""The outputs of submitted requests: each of their tokens is delivered exactly once, whatever interrupts."""

from __future__ import annotations

from orthrus_rt.outputs import RequestOutput
from orthrus_rt.request import Request


class Outbox:
    """Submitted requests until their last output is returned. The cost of a step grows with the news, not with the
    number of waiting requests.

    Attributes:
        outputs: made by :meth:`collect`; kept until the caller that returns them puts an empty list here.
    """

    def __init__(self):
        self._requests: dict[str, Request] = {}  # by id
        self._heard: dict[str, Request] = {}  # those of them that may have news
        self._told: dict[str, int] = {}  # tokens in outputs so far, for requests that have any
        self.outputs: list[RequestOutput] = []

    def __bool__(self) -> bool:
        return bool(self._requests or self._heard or self.outputs)

    def __contains__(self, request_id: str) -> bool:
        known = request_id in self._requests or request_id in self._heard
        return known or any(out.request_id == request_id for out in self.outputs)

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id) or self._heard.get(request_id)

    @property
    def unfinished(self) -> list[Request]:
        return [r for r in self._requests.values() if r.finish_reason is None]

    def add(self, request: Request) -> None:
        """Make outputs of this request from now on."""
        self._requests[request.request_id] = request

    def hear(self, request: Request) -> None:
        """Note that ``request`` is about to have news; ignored if it was never added."""
        if self._requests.get(request.request_id) is request:
            self._heard[request.request_id] = request

    def collect(self) -> None:
        """Make outputs of the news."""
        news, told = [], dict(self._told)
        for request_id, request in self._heard.items():
            if output := request.output_since(told.get(request_id, 0)):
                news.append(output)
                told[request_id] = len(request.tokens)
            if request.finish_reason is not None:
                told.pop(request_id, None)
                self._requests.pop(request_id, None)
        # One statement: no signal strikes between these stores, and no other thread takes outputs to be made again.
        self.outputs, self._told, self._heard = self.outputs + news, told, {}
