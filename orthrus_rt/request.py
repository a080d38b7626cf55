"""One request from its prompt to its last token: what the host knows of it, and how its arguments are checked."""

from __future__ import annotations

import operator
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence, Set, Sized
from typing import TypeAlias

import numpy as np
import torch

from orthrus_rt.config import ModelConfig
from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.integers import is_bool
from orthrus_rt.outputs import RequestOutput, Stats
from orthrus_rt.pages import PAGE_SIZE, page_names
from orthrus_rt.rejection import RejectionSampler
from orthrus_rt.sampling import SamplingParams

TokenIds: TypeAlias = Sequence[int] | torch.Tensor | np.ndarray  # of one prompt


class Request:
    """``tokens`` are the generated tokens that the host knows; prompt and tokens suffice to rebuild device state."""

    def __init__(self, request_id: str, prompt: list[int], params: SamplingParams, stop_ids: list[int], limit: int):
        self.request_id, self.prompt, self.params, self.stop_ids, self.limit = (
            request_id, prompt, params, stop_ids, limit,
        )  # fmt: skip
        self.tokens: list[int] = []
        seed = None
        if not params.greedy:
            seed = secrets.randbits(62) if params.seed is None else params.seed
        by_rejection = seed is not None and params.acceptance == "rejection"
        self.rejection = RejectionSampler(params, seed) if by_rejection else None
        self.stats = Stats("", 0, 0, len(prompt), seed=seed)
        self.finish_reason: str | None = None
        self.error: Exception | None = None  # that ended it
        self.arrival = -1
        self.slot: int | None = None
        self.to_prefill: list[int] = []
        self.prefilled = 0
        self.fresh = True  # no decode cycle since it got its slot
        self.failures = 0  # failed steps that may be due to it, since its last token
        self._page_names: list[bytes] = []
        self._prompt_seen = 0  # the most prompt tokens that were ever in the cache
        self.arrived = self.started = self.first_token = 0.0

    @property
    def length(self) -> int:
        """Tokens known so far, prompt included."""
        return len(self.prompt) + len(self.tokens)

    @property
    def decoding(self) -> bool:
        """Whether it is in a slot and everything to prefill is in the cache."""
        return self.slot is not None and self.prefilled == len(self.to_prefill)

    @property
    def suspected(self) -> bool:
        """Whether it may be what makes steps fail. One failure may be chance, as when other code spoils a recording."""
        return self.failures > 1

    @property
    def known(self) -> list[int]:
        """The tokens that come before the rows of the next cycle, which begin with the last generated token. If there
        is none yet, that is the whole prompt: the row of its last token gives the first generated one.
        """
        return self.prompt + self.tokens[:-1]

    @property
    def num_known(self) -> int:
        """The length of :attr:`known`, without a copy."""
        return self.length - bool(self.tokens)

    @property
    def num_cached(self) -> int:
        """How many tokens, at least, have keys and values in the cache, as far as the host knows."""
        return self.length - 1 if self.decoding else self.prefilled

    def names_of_pages(self, num_tokens: int) -> list[bytes]:
        """Names of the whole pages that its first ``num_tokens`` tokens fill; they never change."""
        count = num_tokens // PAGE_SIZE
        if count > len(self._page_names):
            self._page_names = page_names((self.prompt + self.tokens)[: count * PAGE_SIZE], self._page_names)
        return self._page_names[:count]

    def arrive(self, arrival: int) -> None:
        """Join the queue as number ``arrival``; it arrives now, unless its time of arrival is set already."""
        self.arrived = self.arrived or time.perf_counter()
        self.arrival = arrival

    def begin(self, slot: int, found: int) -> None:
        """Take ``slot``, with keys and values of the first ``found`` tokens already in the cache."""
        self.slot, self.to_prefill, self.prefilled, self.fresh = slot, self.known, found, True
        if not self.started:
            now = time.perf_counter()
            self.stats.queue_seconds = now - self.arrived
            self.started = now
        # What was found at first may get lost, and then has to be computed.
        self.stats.cached_tokens = min(found, self.stats.cached_tokens) if self._prompt_seen else found

    def count_prompt(self) -> int:
        """How many prompt tokens have entered the cache for the first time since the last call."""
        before = self._prompt_seen
        self._prompt_seen = max(before, min(self.prefilled, len(self.prompt)))
        return self._prompt_seen - before

    def output_since(self, delivered: int) -> RequestOutput | None:
        """The output after the first ``delivered`` tokens; None if nothing is new and it has not finished."""
        new = self.tokens[delivered:]
        if not (new or self.finish_reason):
            return None
        error = None if self.error is None else str(self.error)
        return RequestOutput(self.request_id, new, self.finish_reason, self.stats, error)

    def record(self, new: list[int], plan: CyclePlan | None, verified: int, accepted: int) -> None:
        """Add the tokens of one cycle, or of the prefill (``plan`` None); ``new`` is empty if none could be chosen."""
        now, stats = time.perf_counter(), self.stats
        if plan is None and new:
            self.first_token = now
            stats.prefill_seconds = now - self.started
        self.tokens += new
        stats.tokens = len(self.tokens)
        self.failures = 0
        if plan is not None:
            stats.mode, stats.block_len, stats.fan_out = plan
            stats.cycles += 1
            self.fresh = False
            stats.passes += plan.num_passes
            stats.plans[plan.label] = stats.plans.get(plan.label, 0) + 1
            stats.misses += plan.mode == "one_pass" and not verified
            stats.drafted += verified
            stats.accepted += [0] * (plan.block_len - len(stats.accepted))
            stats.accepted[accepted] += 1
        if self.tokens:
            stats.seconds = now - self.first_token


def on_host(prompt_ids: TokenIds) -> TokenIds:
    """The prompt on the host, where reading it waits for no device; to be called on the stream that makes a tensor."""
    is_somewhere = isinstance(prompt_ids, torch.Tensor) and not prompt_ids.is_meta
    return prompt_ids.cpu() if is_somewhere else prompt_ids


def check_prompt(prompt_ids, vocab_size: int, max_seq_len: int, name: str) -> list[int]:
    """The prompt as a list of ints; error messages call it ``name``.

    Raises:
        ValueError: it is empty, too long, not integers, or has ids outside the vocabulary.
    """
    is_tensor = isinstance(prompt_ids, torch.Tensor)
    if getattr(prompt_ids, "ndim", 1) != 1 or (
        is_tensor and (prompt_ids.is_floating_point() or prompt_ids.dtype is torch.bool)
    ):
        got = f"{getattr(prompt_ids, 'dtype', type(prompt_ids).__name__)} {list(getattr(prompt_ids, 'shape', []))}"
        hint = "; of a batch, pass list(ids)" if prompt_ids.ndim == 2 else ""
        raise ValueError(f"{name}: a tensor or array must be 1-D and integer, got {got}{hint}")
    if isinstance(prompt_ids, str | bytes | bytearray):
        raise ValueError(f"{name} must be token ids, got text; encode it with engine.tokenizer")
    if isinstance(prompt_ids, Set):
        raise ValueError(f"{name} must be token ids in their order, got {type(prompt_ids).__name__}")
    if isinstance(prompt_ids, Mapping):
        raise ValueError(f"{name} must be token ids, got {type(prompt_ids).__name__}; pass its input_ids")
    _check_length(prompt_ids, max_seq_len, name)  # first, as reading a long prompt takes a while
    if is_tensor:
        try:
            prompt_ids = prompt_ids.tolist()
        except (RuntimeError, NotImplementedError) as error:  # a meta, sparse or quantised tensor
            raise ValueError(f"{name}: a tensor must hold its ids in memory, one after the other: {error}") from error
    try:
        given = list(prompt_ids)
        ids = [operator.index(t) for t in given]
    except TypeError as error:
        raise ValueError(f"{name} must be a list of ints or a 1-D integer tensor: {error}") from error
    if set(map(type, given)) != {int} and any(map(is_bool, given)):
        raise ValueError(f"{name} must be a list of ints or a 1-D integer tensor, got a bool in it")
    if not ids:
        raise ValueError(f"{name} must hold at least one token, got none")
    _check_length(ids, max_seq_len, name)
    for i, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}[{i}] must be within the vocabulary [0, {vocab_size}), got {token}")
    return ids


def _check_length(ids, max_seq_len: int, name: str) -> None:
    if isinstance(ids, Sized) and len(ids) >= max_seq_len:
        raise ValueError(f"{name} must be shorter than max_seq_len ({max_seq_len} tokens), got {len(ids)}")


def make_request(
    prompt_ids, params: SamplingParams, request_id: str | None, config: ModelConfig, max_seq_len: int, name: str
) -> Request:
    """A request that this model can serve within ``max_seq_len``; error messages call its prompt ``name``.

    Raises:
        ValueError: as in :func:`check_prompt`, or a stop id or a biased id is outside the vocabulary.
    """
    if not (request_id is None or (isinstance(request_id, str) and request_id)):
        raise ValueError(f"request_id must be a string that is not empty, or None, got {request_id!r}")
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params must be SamplingParams, got {type(params).__name__}")
    ids = check_prompt(prompt_ids, config.vocab_size, max_seq_len, name)
    for what, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", dict(params.logit_bias))):
        for token in tokens:
            if token >= config.vocab_size:
                raise ValueError(f"{what}: ids must be within the vocabulary [0, {config.vocab_size}), got {token}")
    stop = sorted({*(() if params.ignore_eos else config.eos_token_ids), *params.stop_token_ids})
    limit = min(len(ids) + params.max_new_tokens, max_seq_len)
    return Request(request_id or uuid.uuid4().hex, ids, params, stop, limit)
