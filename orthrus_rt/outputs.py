"""What comes out of the engine: tokens, why they ended, and what they cost."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field


@dataclass
class Stats:
    """What one generation did. Tokens per cycle and per pass exclude the prefill and the token that it yields.

    Attributes:
        mode: the mode that ran last; empty before the first decode cycle, as the first token is the prefill's.
        block_len: K of the last cycle (1 for ``ar``); 0 before the first.
        fan_out: blocks that the last cycle drafted (``one_pass``, else 0).
        prompt_tokens: tokens of the prompt.
        cached_tokens: prompt tokens that were not computed, as the cache already held their keys and values.
        tokens: generated tokens, the stop token included.
        cycles: decode cycles.
        passes: forward passes of these cycles, of either view.
        misses: ``one_pass`` cycles without drafts to verify: the first, for which nothing was drafted, and those after
            a cycle in which no block matched the outcome and no drafts were left behind the rejected one.
        plans: cycles by plan: ``ar``, ``two_pass/7`` (drafts), ``one_pass/15x4`` (drafts, fan_out).
        drafted: drafts that were verified.
        accepted: histogram: ``accepted[j]`` cycles accepted j drafts; ``ar`` cycles and misses count as j = 0.
        seconds: from the first token to the last.
        prefill_seconds: from the start of the prefill to the first token.
        queue_seconds: from the request's arrival to the start of the prefill, when it first got a slot; 0 if it never
            did.
        preemptions: how often it had to give up its pages and recompute them.
        seed: the seed used, drawn if none was given; None for greedy decoding.
    """

    mode: str
    block_len: int
    fan_out: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    cycles: int = 0
    passes: int = 0
    misses: int = 0
    plans: dict[str, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    queue_seconds: float = 0.0
    preemptions: int = 0
    seed: int | None = None

    def copy(self) -> Stats:
        """A copy that does not change while the request runs."""
        now = copy.copy(self)
        now.plans, now.accepted = dict(self.plans), list(self.accepted)
        return now

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens per decode cycle, without the first token, which the prefill yields."""
        return (self.tokens - 1) / self.cycles if self.cycles else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """The same per pass, that is, per read of the weights."""
        return (self.tokens - 1) / self.passes if self.passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """The same per second of decoding, prefill and queue excluded."""
        return (self.tokens - 1) / self.seconds if self.seconds else 0.0


@dataclass
class GenerationOutput:
    """The result of one prompt.

    Attributes:
        token_ids: the generated tokens, without the prompt.
        finish_reason: ``"stop"`` (a stop id), ``"length"`` (``max_new_tokens``, or as many as ``max_seq_len`` allows),
            ``"abort"`` (by the caller) or ``"error"`` (it could not continue).
        stats: how it was decoded.
        error: why it could not continue, else None.
    """

    token_ids: list[int]
    finish_reason: str
    stats: Stats
    error: str | None = None


def complete(outs: list[GenerationOutput]) -> list[GenerationOutput]:
    """``outs``, if none of them ended in an error.

    Raises:
        RuntimeError: one did.
    """
    for i, out in enumerate(outs):
        if out.error:
            raise RuntimeError(f"prompt {i + 1} of {len(outs)}: {out.error}")
    return outs


@dataclass
class RequestOutput:
    """New tokens of one request, since its last output. ``finish_reason`` and ``error`` are None until ``finished``,
    then as in :class:`GenerationOutput`. ``stats`` keep changing while the request runs.
    """

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None
    stats: Stats
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def token_ids(self) -> list[int]:
        """The new tokens, under the name that readers of :meth:`Engine.stream` use."""
        return self.new_token_ids
