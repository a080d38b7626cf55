"""Calls that decode requests to their end; whatever else is queued runs along."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.exclusive import exclusive, whole
from orthrus_rt.outputs import GenerationOutput, RequestOutput
from orthrus_rt.request import Request
from orthrus_rt.rounds import Rounds
from orthrus_rt.sampling import SamplingParams


class Generation(Rounds):
    """``generate`` and ``stream``: rounds until some requests are through."""

    def generate(self, prompt_ids, params=None, *, mode=None, draft_len=None, fan_out=None, progress=False):
        """Continue one prompt, or a batch of them together.

        Args:
            prompt_ids: a list of ints, a 1-D integer tensor or array, or a list of those (a batch, which may be empty).
            params: one :class:`SamplingParams` for all, or one for each prompt of a batch; greedy by default.
            mode, draft_len, fan_out: override the engine's for this call; only while nothing else runs.
            progress: show a progress bar.

        Returns:
            A :class:`GenerationOutput`, or a list of them for a batch, in the order of the prompts. In a batch, a
            prompt that could not go on (see :meth:`step`) has finish_reason ``"error"``.

        Raises:
            ValueError: a prompt is empty, too long, or has ids outside the vocabulary; nothing has run then.
            torch.OutOfMemoryError, FloatingPointError: the one prompt could not go on.
        """
        batch = _is_batch(prompt_ids)
        if not batch and isinstance(params, Sequence):
            raise ValueError(f"params: one prompt takes one SamplingParams, got a list of {len(params)}")
        all_ids = prompt_ids if batch else [prompt_ids]
        each = params if isinstance(params, Sequence) else [params] * len(all_ids)
        if len(each) != len(all_ids):
            raise ValueError(f"params: expected one or {len(all_ids)}, got {len(each)}")
        from tqdm import tqdm

        plan = self.make_plan(mode, draft_len, fan_out)
        requests = [self._make_request(ids, p, plan) for ids, p in zip(all_ids, each, strict=True)]
        with tqdm(total=len(requests), unit="prompt", disable=not progress) as bar:
            for _ in self._run(requests, plan):
                if progress:
                    bar.update(sum(r.finish_reason is not None for r in requests) - bar.n)
        if not batch and requests[0].error:
            raise requests[0].error
        outs = [GenerationOutput(r.tokens, r.finish_reason, r.stats, r.error and str(r.error)) for r in requests]
        return outs if batch else outs[0]

    def stream(self, prompt_ids, params: SamplingParams | None = None, *, mode=None, draft_len=None, fan_out=None):
        """Like :meth:`generate` for one prompt, yielding a :class:`RequestOutput` per cycle (the first after prefill).

        Arguments are checked now, not at the first piece. Closing the iterator aborts the request. One that could not
        go on raises after its last piece, as :meth:`generate` does.
        """
        plan = self.make_plan(mode, draft_len, fan_out)
        return self._stream(self._make_request(prompt_ids, params, plan), plan)

    def _stream(self, request: Request, plan: CyclePlan) -> Iterator[RequestOutput]:
        delivered, finished = 0, False
        for _ in self._run([request], plan):
            if piece := request.output_since(delivered):
                delivered, finished = len(request.tokens), piece.finished
                yield piece
        if not finished:  # another stream's step brought the end
            yield request.output_since(delivered)
        if request.error:
            raise request.error

    def _run(self, requests: list[Request], plan: CyclePlan) -> Iterator[None]:
        """Step until these requests are through; whatever else is queued runs along.

        Mode and block length belong to the whole batch: whoever finds the engine idle sets them.
        """
        try:
            self._enqueue(requests, plan)
            left = deque(requests)
            while left:
                if left[0].finish_reason is not None:
                    left.popleft()
                else:
                    self._round()
                    yield
        finally:
            if not self.closed:
                self._abort_all(requests)

    @exclusive
    def _enqueue(self, requests: list[Request], plan: CyclePlan) -> None:
        if self._idle():
            self.runner.make_room(self._shapes(plan, self.scheduler.num_slots))
            self._plan = plan
        elif plan != self._plan:
            now = self._plan
            raise RuntimeError(f"the mode cannot change while requests run (now {now}, asked {plan})")
        with whole(self):
            for request in requests:
                self.scheduler.enqueue(request)

    @exclusive
    def _round(self) -> None:
        self._advance()

    @exclusive
    def _abort_all(self, requests: list[Request]) -> None:
        with whole(self):
            for request in requests:
                if request.arrival >= 0:  # else it was never queued
                    self._abort(request)


def _is_batch(prompt_ids) -> bool:
    """Whether these are prompts, and not the ids of one; an empty list holds no prompt."""
    if isinstance(prompt_ids, str | bytes) or not isinstance(prompt_ids, Sequence):
        return False
    first = prompt_ids[0] if prompt_ids else ()
    return isinstance(first, Sequence) or getattr(first, "ndim", 0) > 0
