"""Calls that decode requests to their end; whatever else is queued runs along."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Generator, Sequence
from typing import overload

import torch

from orthrus_rt.cycle_plan import CyclePlan, cycle_plan, most_hypotheses
from orthrus_rt.exclusive import Taken, exclusive, torn_if_cut
from orthrus_rt.integers import integer
from orthrus_rt.outputs import GenerationOutput, RequestOutput
from orthrus_rt.progress import progress_bar
from orthrus_rt.request import Request, TokenIds, make_request
from orthrus_rt.rounds import Rounds
from orthrus_rt.sampling import SamplingParams


class Generation(Rounds):
    """``generate`` and ``stream``: rounds until some requests are through."""

    mode: str  # this and the next two: of calls that name none
    draft_len: int | None
    fan_out: int | None
    device: torch.device
    max_seq_len: int
    _default_plan: CyclePlan
    closed: bool
    dropped: deque[list[Request]]  # of calls and streams that are over: what has not ended is to be aborted

    @overload
    def generate(
        self, prompt_ids: TokenIds, params: SamplingParams | None = None, *, mode: str | None = None,
        draft_len: int | None = None, fan_out: int | None = None, progress: bool = False,
    ) -> GenerationOutput: ...  # fmt: skip

    @overload
    def generate(
        self, prompt_ids: Sequence[TokenIds], params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        mode: str | None = None, draft_len: int | None = None, fan_out: int | None = None, progress: bool = False,
    ) -> list[GenerationOutput]: ...  # fmt: skip

    def generate(self, prompt_ids, params=None, *, mode=None, draft_len=None, fan_out=None, progress=False):
        """Continue one prompt, or a batch of them together.

        Args:
            prompt_ids: a list of ints, a 1-D integer tensor or array, or a list of those (a batch, which may be empty).
            params: one :class:`SamplingParams` for all, or one for each prompt of a batch; greedy by default.
            mode, draft_len, fan_out: override the engine's for this call; only while nothing else runs. With none of
                them, the call joins what runs, in whatever mode that is. Cycles with more rows than any before drop
                what is recorded, as buffers grow.
            progress: show a progress bar.

        Returns:
            A :class:`GenerationOutput`, or a list of them for a batch, in the order of the prompts. In a batch, a
            prompt that could not go on (see :meth:`step`) has finish_reason ``"error"``.

        Raises:
            ValueError: a prompt is empty, too long, or has ids outside the vocabulary; nothing has run then.
            RuntimeError: another mode was asked for than the one that runs, or the engine is closed.
            torch.OutOfMemoryError, FloatingPointError: the one prompt could not go on.
        """
        batch = _is_batch(prompt_ids)
        if not batch and isinstance(params, Sequence):
            raise ValueError(f"params must be one SamplingParams for one prompt, got a list of {len(params)}")
        all_ids = prompt_ids if batch else [prompt_ids]
        each = params if isinstance(params, Sequence) else [params] * len(all_ids)
        if len(each) != len(all_ids):
            raise ValueError(f"params must be one SamplingParams or {len(all_ids)} of them, got {len(each)}")
        plan = self._asked_plan(mode, draft_len, fan_out)
        names = [f"prompt_ids[{i}]" for i in range(len(all_ids))] if batch else ["prompt_ids"]
        asked = zip(all_ids, each, names, strict=True)
        requests = [self._make_request(ids, p, plan, name=name) for ids, p, name in asked]
        bar = progress_bar(progress, total=len(requests), unit="prompt")
        with bar, contextlib.closing(self._run(requests, plan)) as rounds:
            for _ in rounds:
                if progress:
                    bar.update(sum(r.finish_reason is not None for r in requests) - bar.n)
        if not batch and requests[0].error:
            raise requests[0].error
        outs = [GenerationOutput(r.tokens, r.finish_reason, r.stats, r.error and str(r.error)) for r in requests]
        return outs if batch else outs[0]

    def stream(
        self, prompt_ids: TokenIds, params: SamplingParams | None = None, *, mode: str | None = None,
        draft_len: int | None = None, fan_out: int | None = None,
    ) -> Generator[RequestOutput, None, None]:  # fmt: skip
        """Like :meth:`generate` for one prompt, yielding a :class:`RequestOutput` per cycle (the first after prefill).

        Arguments are checked now, not at the first piece. Closing the iterator aborts the request: at once in the
        thread that read it last, else with the engine's next call. One that could not go on raises after its last
        piece, as :meth:`generate` does. The pieces' ``request_id`` only tells streams apart: :meth:`abort` and
        :meth:`is_unfinished` know the ids of :meth:`submit` alone.
        """
        plan = self._asked_plan(mode, draft_len, fan_out)
        return self._stream(self._make_request(prompt_ids, params, plan), plan)

    def make_plan(self, mode: str | None = None, draft_len: int | None = None, fan_out: int | None = None) -> CyclePlan:
        """The cycles to run; what is None is the engine's own."""
        mode = self.mode if mode is None else mode
        draft_len = self.draft_len if draft_len is None else draft_len
        if fan_out is None and self.fan_out is not None:
            fan_out = self.fan_out
            if draft_len is not None:
                fan_out = max(1, min(fan_out, most_hypotheses(integer("draft_len", draft_len))))
        return cycle_plan(mode, draft_len, fan_out, self.config, on_cpu=self.device.type == "cpu")

    def _plan_to_join(self) -> CyclePlan:
        """The plan of what runs, or the engine's own if nothing does that is not to be aborted."""
        over = {request for requests in tuple(self.dropped) for request in requests}
        scheduler = self.scheduler  # None once the engine is closed, which another thread may do just now
        idle = scheduler is None or self._idle() or (over and over.issuperset(scheduler.unfinished))
        return self._default_plan if idle else self._plan

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("this engine is closed")

    def _make_request(
        self, prompt_ids, params: SamplingParams | None, plan: CyclePlan | None, request_id=None, name="prompt_ids"
    ) -> Request:
        self._check_open()
        params = SamplingParams() if params is None else params
        request = make_request(prompt_ids, params, request_id, self.config, self.max_seq_len, name)
        self._check_acceptance(request, plan or self._plan_to_join())
        return request

    def _check_acceptance(self, request: Request, plan: CyclePlan) -> None:
        if request.rejection and plan.mode not in ("two_pass", "auto"):
            raise ValueError(f"acceptance='rejection' belongs to mode two_pass alone, got mode {plan.mode!r}")

    def _asked_plan(self, mode, draft_len, fan_out) -> CyclePlan | None:
        """None if none of them is given: then the plan is that of what runs."""
        return self.make_plan(mode, draft_len, fan_out) if (mode, draft_len, fan_out) != (None, None, None) else None

    def _stream(self, request: Request, plan: CyclePlan | None) -> Generator[RequestOutput, None, None]:
        delivered, finished = 0, False
        with contextlib.closing(self._run([request], plan)) as rounds:
            for _ in rounds:
                if piece := request.output_since(delivered):
                    delivered, finished = len(request.tokens), piece.finished
                    yield piece
        if not finished:  # another stream's step brought the end
            yield request.output_since(delivered)
        if request.error:
            raise request.error

    def _run(self, requests: list[Request], plan: CyclePlan | None) -> Generator[None, None, None]:
        """Step until these requests are through; whatever else is queued runs along.

        Mode and block length belong to the whole batch: whoever finds the engine idle sets them.
        """
        thread, queued = threading.get_ident(), True
        try:
            try:
                self._enqueue(requests, plan)
            except Taken:  # by another thread's call
                queued = False
                raise
            left = deque(requests)
            while left:
                if left[0].finish_reason is not None:
                    left.popleft()
                else:
                    self._round()
                    thread = threading.get_ident()
                    yield
        finally:
            if queued and not self.closed:
                self.dropped.append(requests)  # whatever strikes from here on, the next call aborts them
                # A stream may be collected anywhere: inside a call, or in another thread, whose turn it is not.
                if threading.get_ident() == thread:
                    with contextlib.suppress(Taken):
                        self._take_turn()

    @exclusive
    def _enqueue(self, requests: list[Request], plan: CyclePlan | None) -> None:
        plan = plan or self._plan_to_join()
        for request in requests:
            self._check_acceptance(request, plan)  # again: what runs may have changed since it was made
        if self._idle():
            self.runner.make_room(self._autos.shapes(plan))
            self._plan = plan
        elif plan != self._plan:
            now = self._plan
            raise RuntimeError(f"the mode cannot change while requests run (now {now.label}, asked {plan.label})")
        with torn_if_cut(self):
            for request in requests:
                self.scheduler.enqueue(request)

    @exclusive
    def _round(self) -> None:
        self._advance()

    @exclusive
    def _take_turn(self) -> None:
        """And with it abort what was dropped, as every call does first."""

    def _abort_dropped(self) -> None:
        """End what calls and streams that are over have left; for whoever has the turn."""
        while self.dropped:
            with torn_if_cut(self):
                for request in self.dropped[0]:
                    if request.arrival >= 0:  # else it was never queued
                        self._abort(request)
            self.dropped.popleft()  # only now: an interrupt must not lose them


def _is_batch(prompt_ids) -> bool:
    """Whether these are prompts, and not the ids of one; an empty list holds no prompt."""
    if isinstance(prompt_ids, str | bytes) or not isinstance(prompt_ids, Sequence):
        return False
    first = prompt_ids[0] if prompt_ids else ()
    return isinstance(first, Sequence) or getattr(first, "ndim", 0) > 0
