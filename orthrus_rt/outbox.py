"""What submitted requests have to say: every token of theirs comes out once, whatever interrupts its way."""

from __future__ import annotations

from orthrus_rt.outputs import RequestOutput
from orthrus_rt.request import Request


class Outbox:
    """Submitted requests until their last output is on its way. A step costs as much as there is news, however many
    requests wait.

    Attributes:
        outputs: made by :meth:`collect`, and here until whoever returns them puts an empty list in their place.
    """

    def __init__(self):
        self._requests: dict[str, Request] = {}  # by id
        self._heard: dict[str, Request] = {}  # those of them that may have news
        self._told: dict[str, int] = {}  # tokens in outputs so far, of those that have any
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
        """Tell of this request from now on."""
        self._requests[request.request_id] = request

    def hear(self, request: Request) -> None:
        """``request`` is about to have news; ignored if it was never added."""
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
        # Together: between these stores no signal strikes, and no other thread takes outputs that are here as well.
        self.outputs, self._told, self._heard = self.outputs + news, told, {}
