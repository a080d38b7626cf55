"""Calls that decode requests to their end; other queued requests run at the same time."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Generator, Mapping, Sequence
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
    """``generate`` and ``stream``: rounds until given requests have finished."""

    mode: str  # this and the next two: defaults for calls that pass none
    draft_len: int | None
    fan_out: int | None
    device: torch.device
    max_seq_len: int
    _default_plan: CyclePlan
    closed: bool
    dropped: deque[list[Request]]  # of calls and streams that have ended: those not finished are to be aborted

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
        """Continue one prompt, or a batch of prompts together.

        Args:
            prompt_ids: a list of ints, a 1-D integer tensor or array, or a list of those (a batch, which may be empty).
            params: one :class:`SamplingParams` for all, or one for each prompt of a batch; greedy by default.
            mode, draft_len, fan_out: override the engine's for this call; only while nothing else runs. With none of
                them, the call joins the running requests in their mode, whichever it is. Cycles with more rows than any
                before discard all recordings, as buffers grow.
            progress: show a progress bar.

        Returns:
            A :class:`GenerationOutput`, or for a batch a list of them in the order of the prompts. In a batch, a prompt
            that cannot continue (see :meth:`step`) has finish_reason ``"error"``.

        Raises:
            ValueError: a prompt is empty, too long, or has ids outside the vocabulary, or another argument is invalid;
                nothing has run then.
            RuntimeError: requests run in another mode than requested, the engine is closed, or another thread uses it.
            torch.OutOfMemoryError, FloatingPointError: a single prompt cannot continue.
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

        Arguments are checked at the call, not at the first read. Closing the iterator aborts the request: at once in
        the thread that read it last, otherwise with the engine's next call. If the request cannot continue, the
        iterator raises after the last output, as :meth:`generate` does. The ``request_id`` of these outputs only tells
        streams apart: :meth:`abort` and :meth:`is_unfinished` know only the ids of :meth:`submit`.
        """
        plan = self._asked_plan(mode, draft_len, fan_out)
        return self._stream(self._make_request(prompt_ids, params, plan), plan)

    def make_plan(self, mode: str | None = None, draft_len: int | None = None, fan_out: int | None = None) -> CyclePlan:
        """The plan of these options; None stands for the engine's own value."""
        mode = self.mode if mode is None else mode
        draft_len = self.draft_len if draft_len is None else draft_len
        if fan_out is None and self.fan_out is not None:
            fan_out = self.fan_out
            if draft_len is not None:
                fan_out = max(1, min(fan_out, most_hypotheses(integer("draft_len", draft_len))))
        return cycle_plan(mode, draft_len, fan_out, self.config, on_cpu=self.device.type == "cpu")

    def _plan_to_join(self) -> CyclePlan:
        """The running plan, or the engine's own if nothing runs, or only requests that are to be aborted."""
        over = {request for requests in tuple(self.dropped) for request in requests}
        scheduler = self.scheduler  # None once the engine is closed, perhaps by another thread right now
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
        """The plan of these options; None, which means the running plan, if none of them is given."""
        return self.make_plan(mode, draft_len, fan_out) if (mode, draft_len, fan_out) != (None, None, None) else None

    def _stream(self, request: Request, plan: CyclePlan | None) -> Generator[RequestOutput, None, None]:
        delivered, finished = 0, False
        with contextlib.closing(self._run([request], plan)) as rounds:
            for _ in rounds:
                if piece := request.output_since(delivered):
                    delivered, finished = len(request.tokens), piece.finished
                    yield piece
        if not finished:  # another stream's step has finished it
            yield request.output_since(delivered)
        if request.error:
            raise request.error

    def _run(self, requests: list[Request], plan: CyclePlan | None) -> Generator[None, None, None]:
        """Step until these requests have finished; other queued requests run at the same time.

        Mode and block length belong to the whole batch: the call that finds the engine idle sets them.
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
                self.dropped.append(requests)  # whatever interrupts from here on, the next call aborts them
                # A stream may be garbage-collected anywhere: inside a call, or in a thread without the turn.
                if threading.get_ident() == thread:
                    with contextlib.suppress(Taken):
                        self._take_turn()

    @exclusive
    def _enqueue(self, requests: list[Request], plan: CyclePlan | None) -> None:
        plan = plan or self._plan_to_join()
        for request in requests:
            self._check_acceptance(request, plan)  # again: the plan may have changed since the request was made
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
        with self._charging():
            self._advance()

    @exclusive
    def _take_turn(self) -> None:
        """Do only what every call does first: recover, and abort dropped requests."""

    def _abort_dropped(self) -> None:
        """Abort what ended calls and streams have left unfinished; the caller has the turn."""
        while self.dropped:
            with torn_if_cut(self):
                for request in self.dropped[0]:
                    if request.arrival >= 0:  # else it was never queued
                        self._abort(request)
            self.dropped.popleft()  # only now: an interrupt must not lose them


def _is_batch(prompt_ids) -> bool:
    """Whether this is a list of prompts and not the ids of one; an empty list is a batch without prompts."""
    if isinstance(prompt_ids, str | bytes | bytearray) or not isinstance(prompt_ids, Sequence):
        return False
    first = prompt_ids[0] if prompt_ids else ()
    return isinstance(first, Sequence | Mapping) or getattr(first, "ndim", 0) > 0
