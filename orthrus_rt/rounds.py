"""What the engine does in a step: rounds of decoding, prefill and reading results, and recovery from faults."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence

import torch

from orthrus_rt import state as st
from orthrus_rt.auto import Autos
from orthrus_rt.config import ModelConfig
from orthrus_rt.cycle_plan import AR, CyclePlan
from orthrus_rt.flights import Flight
from orthrus_rt.kv import OutOfPages
from orthrus_rt.metrics import Metrics
from orthrus_rt.out_of_memory import naming_the_knobs
from orthrus_rt.outbox import Outbox
from orthrus_rt.prefill import PromptChunks
from orthrus_rt.request import Request
from orthrus_rt.results import Result
from orthrus_rt.runner import Runner
from orthrus_rt.scheduler import Scheduler

log = logging.getLogger("orthrus_rt")
FINISH_REASONS = {st.STOP: "stop", st.LENGTH: "length"}


class RequestFailed(Exception):
    """A failure cut a round short, and the request that it is attributed to has ended."""


class Rounds:
    """Runs the scheduler's requests on the runner's device, one round at a time."""

    config: ModelConfig
    runner: Runner
    scheduler: Scheduler
    metrics: Metrics
    outbox: Outbox
    closed: bool
    torn: bool  # a call was cut short: _recover() must run before the next
    _plan: CyclePlan  # of the running batch
    _autos: Autos
    _suspects: list[Request]  # whose work is being done; empty for what is done for all

    def _abort(self, request: Request) -> None:
        if request.finish_reason is None:
            self._finish(request, "abort")

    def _finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        self.outbox.hear(request)
        self.metrics.finished[reason] += 1  # directly before the next two stores: no signal handler runs between them
        request.error = error
        request.finish_reason = reason
        if reason in ("stop", "length") and request.stats.tokens > 1:
            self.metrics.per_token.add(request.stats.seconds / (request.stats.tokens - 1))
        if request.slot is not None:
            self.runner.clear(self.scheduler.vacate(request))
        self.scheduler.forget(request)

    def _fail(self, request: Request, error: Exception) -> None:
        log.error("request %s ends: %s", request.request_id, error)
        log.debug("that came from", exc_info=error)
        self._finish(request, "error", _without_frames(error))

    @contextlib.contextmanager
    def _suspecting(self, requests: list[Request]) -> Iterator[None]:
        """A step that fails in here counts against these requests only. (Out of memory ends one of them instead.)"""
        self._suspects = requests
        try:
            yield
        except torch.OutOfMemoryError:
            self._suspects = []
            raise
        self._suspects = []

    @contextlib.contextmanager
    def _or_end(self, requests: list[Request], beside: Sequence[Request] = ()) -> Iterator[None]:
        """Out of memory ends one request: ``error.request`` if set, else the latest that needs logits, else the latest.
        It would fail again in the next step; the others can go on, as can those ``beside`` them in the same launch.
        """
        try:
            with self._suspecting([*beside, *requests]), naming_the_knobs("running a step"):
                yield
        except torch.OutOfMemoryError as error:
            scored = [r for r in requests if r.params.scored]
            self._fail(getattr(error, "request", (scored or requests)[-1]), error)
            raise RequestFailed from error

    def _idle(self) -> bool:
        scheduler = self.scheduler  # None once the engine is closed, which another thread may do at this moment
        return scheduler is None or not (scheduler.waiting or any(scheduler.slots))

    def _advance(self) -> None:
        """One round: run a cycle of the decoding requests and prefill prompts, in its last pass where possible; then
        read the results that have arrived.
        """
        since, self.torn = time.perf_counter(), True  # as torn_if_cut does, in less time
        try:
            before = self.runner.flights.num_posted
            self._launch(self._ready(), before)
            self._collect_but(before)
            auto = self._autos.get(self._plan)
            for kind, seconds in self.runner.stopwatch.take():
                self.metrics.took(kind, seconds)
                if kind == "prefill" and auto:
                    auto.policy.prefilled(seconds)
            self.torn = False
        except RequestFailed:
            pass
        finally:
            self.metrics.busy_seconds += time.perf_counter() - since

    @contextlib.contextmanager
    def _charging(self) -> Iterator[None]:
        """Count a failure in here against the requests that it may be due to, and note in the exception which of them
        have failed most often.
        """
        self._suspects = []
        try:
            yield
        except Exception as error:
            if not self.closed:
                suspects = self._suspects or self.scheduler.active or self.outbox.unfinished
                for request in suspects:
                    request.failures += 1
                most = max((r.failures for r in suspects), default=0)
                names = [r.request_id for r in suspects if r.failures == most]
                error.add_note(f"orthrus_rt: this may be due to {names}")
            raise

    def _ready(self) -> list[Request]:
        """The decoding requests, each with pages for a cycle. Active requests are moved to the lowest slots."""
        active = self.scheduler.active
        if any(request.suspected for request in active):
            self._collect(0)  # a launch that fails again must not cost the others their tokens
        for request in active:
            if request.decoding:
                self._grow(request)
        running = [r for r in self.scheduler.active if r.decoding]
        if running:
            for source, target in self.scheduler.compact():
                self.runner.move(source, target)
        return running

    def _launch(self, running: list[Request], before: int) -> None:
        """Launch a cycle of the decoding requests. Prompts run in its last pass, or in a pass of their own after it if
        the cycle is to be timed by itself, if tokens are chosen on the host or if a request is suspected.
        """
        if not running:
            return self._prefill(self._chunks(self.runner.most_prompt_rows))
        auto, room = self._autos.get(self._plan), self.runner.most_prompt_rows_beside
        plan, policy = auto.choose(running) if auto else (self._plan, None)
        apart = any(r.rejection or r.suspected for r in running) or (policy is not None and policy.wants_time)
        chunks = [] if apart else self._chunks(room)
        prompts = [request for _, _, request in chunks]
        if chunks and not any(r.rejection or r.suspected for r in prompts):
            with self._or_end(prompts, beside=running):
                self.runner.decode_and_prefill(running, plan, policy, chunks)
            return self._count(chunks)
        with self._or_end(running):
            self.runner.decode(running, plan, policy)
        if apart:
            self._collect_but(before)  # requests that have ended make room for prompts
            chunks = self._chunks(room)
        self._prefill(chunks)

    @property
    def _margin(self) -> int:
        """Positions beyond the known ones that the cycles in flight may write."""
        return (1 + self.runner.flights.lag) * self.config.block_len

    def _grow(self, request: Request) -> None:
        """Reserve pages for every position that this cycle may write; if none are free, preempt the latest arrivals."""
        while request.slot is not None:
            try:
                return self.runner.kv.reserve(request.slot, min(request.length + self._margin, request.limit))
            except OutOfPages:
                if self.runner.flights:
                    self._collect(0)  # requests that have ended return their pages; this one may be among them
                else:
                    self._preempt(self.scheduler.active[-1])

    def _preempt(self, request: Request) -> None:
        self.runner.clear(self.scheduler.vacate(request))
        request.stats.preemptions += 1
        self.metrics.preemptions += 1
        self.scheduler.enqueue(request)

    def _prompts(self) -> Iterator[Request]:
        """Requests whose prompts are not entirely in the cache, then, on demand, requests admitted from the queue."""
        yield from [r for r in self.scheduler.active if not r.decoding]
        while request := self.scheduler.admit(self._margin):
            self.metrics.found(request.prefilled, request.count_prompt())
            try:
                with self._suspecting([request]), naming_the_knobs("beginning a request"):
                    self.runner.begin(request)
            except torch.OutOfMemoryError as error:
                self._fail(request, error)  # nothing was launched for it, so the others are not affected
            else:
                yield request

    def _chunks(self, room: int) -> PromptChunks:
        """The prompt tokens of the next pass: at most ``room``, in the order of the requests. A request is admitted
        only if there is room left. It may share pages that earlier requests fill in this same pass, as keys are written
        before anything attends to them. A suspected one has a pass of its own, so that no other has a part in its next
        failure.
        """
        chunks = []
        for request in self._prompts():
            if chunks and request.suspected:
                break
            start = request.prefilled
            tokens = request.to_prefill[start : start + room]
            chunks.append((tokens, start, request))
            request.prefilled += len(tokens)
            self.scheduler.publish(request.slot, request, request.prefilled)
            room -= len(tokens)
            if not room or request.suspected:
                break
        return chunks

    def _prefill(self, chunks: PromptChunks) -> None:
        if not chunks:
            return
        with self._or_end([request for _, _, request in chunks]):
            self.runner.prefill(chunks)
        self._count(chunks)

    def _count(self, chunks: PromptChunks) -> None:
        for tokens, _, request in chunks:
            self.metrics.prefilled(len(tokens), request.count_prompt())

    def _collect_but(self, launched: int) -> None:
        """Read results. If the device runs ahead of the host, read only those of the first ``launched`` flights, so as
        not to wait for what this round has launched.
        """
        self._collect(self.runner.flights.num_posted - launched if self.runner.flights.lag else 0)

    def _collect(self, in_flight: int) -> None:
        """Read results, oldest first, until only ``in_flight`` launches are unread."""
        while len(self.runner.flights) > in_flight:
            flight = self.runner.flights.pop()
            running = [(slot, r) for slot, r in flight.requests if r.finish_reason is None]
            results = flight.collect().read([(slot, len(r.tokens)) for slot, r in running])
            if flight.policy is not None:
                self.runner.stopwatch.settle()
                outcomes = [result.outcome(r.fresh) for (_, r), result in zip(running, results, strict=True)]
                flight.policy.record(outcomes, flight.timed and flight.timed.seconds)
            for (_, request), result in zip(running, results, strict=True):
                self._suspects = [request]
                self._take_result(flight, request, result)
            self._suspects = []
            self.metrics.landed(flight)

    def _take_result(self, flight: Flight, request: Request, result: Result) -> None:
        self.outbox.hear(request)
        waited = not request.tokens
        request.record(result.tokens, flight.plan, result.num_verified, result.num_accepted)
        self.metrics.tokens += len(result.tokens)
        if flight.plan not in (None, AR):
            self.metrics.verified(result.num_verified, result.num_accepted)
        if waited and request.tokens:
            self.metrics.first_token.add(request.first_token - request.arrived)
        if result.finish in FINISH_REASONS:
            self._finish(request, FINISH_REASONS[result.finish])
        elif result.finish == st.NO_CHOICE:
            self._fail(request, _no_choice(request))

    def _recover(self) -> None:
        """After a fault at any point: start again from nothing but the tokens that the host knows."""
        self._autos.forget_pending()
        self.runner.reset()
        for request in self.outbox.unfinished:
            if not self.scheduler.holds(request):  # an interrupt came between the two calls
                self.scheduler.enqueue(request)
        for request in self.scheduler.reset():
            if request.tokens and request.tokens[-1] in request.stop_ids:
                self._finish(request, "stop")
            elif request.length >= request.limit:
                self._finish(request, "length")
        self.torn = False


def _without_frames(error: Exception) -> Exception:
    """``error`` without its traceback and those of its causes, whose frames hold tensors."""
    seen, left = set(), [error]
    while left:
        if (one := left.pop()) is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            left += [one.__cause__, one.__context__]
    return error


def _no_choice(request: Request) -> FloatingPointError:
    """Why the request's next token could not be chosen."""
    why = "are they NaN?"  # consensus does not distinguish NaN from -inf
    if request.params.edits:
        why = "are they NaN, or do penalties, logit_bias and min_tokens rule out all?"
    where = f"at position {request.length}, after {len(request.tokens)} generated tokens"
    return FloatingPointError(f"no logit is above -inf ({why}) {where}")
