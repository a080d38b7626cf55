"""Sampling parameters: how to continue one prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

from orthrus_rt.integers import integer

MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS = 256, 64
LEAST, MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of normal fp32 numbers, as the kernels compute in fp32
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Penalties, ``logit_bias`` and ``min_tokens`` change the logits first, ``temperature``
    next. Then ``top_k``, ``top_p`` of what is left, and ``min_p`` drop tokens; those as likely as the last one kept are
    kept too.

    Args:
        max_new_tokens: generate at most this many tokens, >= 1.
        temperature: 0 is greedy (the default); otherwise at least 1e-6, and logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose total probability reaches this, in (0, 1].
        min_p: drop tokens less than min_p times as likely as the likeliest, in [0, 1).
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output, > 0.
        presence_penalty: subtracted from the logits of tokens in the output, in [-2, 2].
        frequency_penalty: subtracted once for each occurrence of a token in the output, in [-2, 2].
        logit_bias: ``{token id: value}``, added to the logits; at most 256 ids, finite; -1e4 bans a token at usual
            temperatures. Sums beyond 1e6 times the temperature, like logits of 25 at temperatures below 1e-4, leave the
            sampling noise, added in fp32, too few digits to separate likely tokens fairly: lower ids are then favoured
            among equals.
        min_tokens: stop ids, the model's own included, cannot be chosen before this many tokens, 0 ... max_new_tokens.
        seed: non-negative int below 2**63; None draws one, reported in ``stats.seed``. Requests with the same seed get
            the same noise at the same positions: give each its own seed, or none, if answers are to be independent.
        stop_token_ids: at most 64 ids that end the sequence, besides the model's own; they are part of the output.
        ignore_eos: do not stop at the model's own end-of-sequence ids.
        acceptance: ``"coupled"``: a seed gives the same text in every mode and batch. ``"rejection"``: the published
            rule, lossless in distribution; only in ``two_pass``, and without penalties, ``logit_bias`` and
            ``min_tokens``. In mode ``auto`` the whole batch runs ``two_pass`` while it contains such a request.

    Raises:
        ValueError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    acceptance: str = "coupled"

    def __post_init__(self):
        for name in ("max_new_tokens", "top_k", "min_tokens", *(["seed"] if self.seed is not None else [])):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        for name in ("temperature", "top_p", "min_p", *PENALTIES):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        object.__setattr__(self, "stop_token_ids", stop_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))  # hashable, like all other fields
        checks = (
            ("max_new_tokens", ">= 1", self.max_new_tokens >= 1),
            ("temperature", "0, or finite and >= 1e-6", self.greedy or 1e-6 <= self.temperature <= MOST),
            ("top_k", "in [0, 2**31), where 0 keeps all", 0 <= self.top_k < 2**31),
            ("top_p", "in (0, 1]", LEAST <= self.top_p <= 1),
            ("min_p", "in [0, 1)", 0 <= self.min_p < 1),
            ("repetition_penalty", "finite and > 0", LEAST <= self.repetition_penalty <= MOST),
            ("presence_penalty", "in [-2, 2]", -2 <= self.presence_penalty <= 2),
            ("frequency_penalty", "in [-2, 2]", -2 <= self.frequency_penalty <= 2),
            ("logit_bias", f"of at most {MAX_LOGIT_BIAS} ids, once each",
             len(dict(self.logit_bias)) == len(self.logit_bias) <= MAX_LOGIT_BIAS),
            ("logit_bias", "finite values for ids in [0, 2**31)",
             all(0 <= t < 2**31 and abs(value) <= MOST for t, value in self.logit_bias)),
            ("min_tokens", f"in [0, {self.max_new_tokens}] (max_new_tokens)",
             0 <= self.min_tokens <= self.max_new_tokens),
            ("seed", "None or in [0, 2**63)", self.seed is None or 0 <= self.seed < 2**63),
            ("stop_token_ids", "all in [0, 2**31)", all(0 <= t < 2**31 for t in self.stop_token_ids)),
            ("ignore_eos", "True or False", isinstance(self.ignore_eos, bool)),
            ("acceptance", "'coupled' or 'rejection'", self.acceptance in ("coupled", "rejection")),
            ("acceptance", "'coupled' with penalties, logit_bias or min_tokens",
             self.acceptance == "coupled" or not self.edits),
        )  # fmt: skip
        if (count := len(self.stop_token_ids)) > MAX_STOP_TOKEN_IDS:
            raise ValueError(f"SamplingParams: stop_token_ids must be at most {MAX_STOP_TOKEN_IDS}, got {count}")
        for name, expected, good in checks:
            if not good:
                raise ValueError(f"SamplingParams: {name} must be {expected}, got {getattr(self, name)!r}")

    @cached_property
    def edits(self) -> bool:
        """Whether logits are changed before they are filtered."""
        return bool(self.penalised or self.logit_bias or self.min_tokens)

    @cached_property
    def penalised(self) -> bool:
        """Whether any penalty applies, so that the tokens seen so far matter."""
        return tuple(getattr(self, name) for name in PENALTIES) != (1, 0, 0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @cached_property
    def scored(self) -> bool:
        """Whether choices need all logits and not only the largest."""
        return self.edits or not self.greedy


def _integer(name: str, value) -> int:
    return integer(f"SamplingParams: {name}", value)


def _number(name: str, value) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"SamplingParams: {name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:  # an int beyond all floats: the check of its range refuses it
        return math.inf if value > 0 else -math.inf


def stop_ids(values) -> tuple[int, ...]:
    """``stop_token_ids`` as integers.

    Raises:
        ValueError: ``values`` is not a sequence of integers.
    """
    try:
        ids = None if isinstance(values, str | bytes | bytearray) else tuple(values)
    except TypeError:
        ids = None
    if ids is None:
        raise ValueError(f"SamplingParams: stop_token_ids must be a list of integers, got {values!r}")
    return tuple(_integer("stop_token_ids: every id", t) for t in ids)


def _logit_bias(values) -> tuple[tuple[int, float], ...]:
    pairs = values.items() if isinstance(values, Mapping) else values
    try:
        pairs = [(token, value) for token, value in pairs]
    except (TypeError, ValueError):
        raise ValueError(f"SamplingParams: logit_bias must be {{token id: value}}, got {values!r}") from None
    return tuple((_integer("logit_bias: every token id", t), _number("logit_bias", value)) for t, value in pairs)
