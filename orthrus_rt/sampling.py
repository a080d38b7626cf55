"""Sampling parameters, and the published rejection rule.

By default acceptance is *coupled*: at every position both views choose under the same noise, keyed by seed, position
and token id, so decoding at temperature > 0 is as lossless as greedy decoding (that is ``process_logits``; nothing
here is needed). The *rejection* rule is lossless in distribution: accept a draft with probability min(1, p/q), else
sample from the positive part of p - q; p and q are the AR and diffusion distributions after temperature, top-k, top-p
and min-p. (Speculative sampling: Leviathan et al. 2023, Chen et al. 2023; arXiv 2605.12825 for this use.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import numpy as np
import torch

from orthrus_rt.cycle_plan import integer
from orthrus_rt.reference import process_logits_probs

# Every random number is keyed by (seed, position, purpose), never by call order.
DRAFT, ACCEPT, RECOVER = 0, 1, 2
MAX_LOGIT_BIAS = 256
LEAST, MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # the kernels compute in fp32
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt.

    Args:
        max_new_tokens: at most this many tokens are generated, >= 1.
        temperature: 0 is greedy (the default); else at least 1e-6, and logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose mass reaches it, in (0, 1].
        min_p: drop tokens less likely than min_p x the likeliest, in [0, 1).
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output, > 0.
        presence_penalty: subtracted from the logits of tokens in the output, in [-2, 2].
        frequency_penalty: subtracted once for each time that a token is in the output, in [-2, 2].
        logit_bias: ``{token id: value}`` added to the logits; at most 256.
        min_tokens: stop ids, the model's own included, cannot be chosen before this many tokens, 0 ... max_new_tokens.
        seed: non-negative int below 2**63; None draws one, reported in ``stats.seed``.
        stop_token_ids: ids that end the sequence besides the model's own; they are part of the output.
        ignore_eos: do not stop at the model's own end-of-sequence ids.
        acceptance: ``"coupled"``: a seed gives the same text in every mode and batch; or ``"rejection"``, the published
            rule, in ``two_pass`` alone: lossless in distribution. In mode ``auto`` the whole batch runs ``two_pass``
            while such a request is in it.

    Raises:
        ValueError: a value is out of its range.
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
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    acceptance: str = "coupled"

    def __post_init__(self):
        for name in ("max_new_tokens", "top_k", "min_tokens", *(["seed"] if self.seed is not None else [])):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        for name in ("temperature", "top_p", "min_p", *PENALTIES):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        object.__setattr__(self, "stop_token_ids", _integers("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _pairs("logit_bias", self.logit_bias))  # hashable, as all else
        checks = (
            ("max_new_tokens", ">= 1", self.max_new_tokens >= 1),
            ("temperature", "0, or finite and >= 1e-6", self.greedy or 1e-6 <= self.temperature <= MOST),
            ("top_k", "in [0, 2**31)", 0 <= self.top_k < 2**31),
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
        for name, expected, good in checks:
            if not good:
                raise ValueError(f"SamplingParams: {name} must be {expected}, got {getattr(self, name)!r}")

    @cached_property
    def edits(self) -> bool:
        """Whether logits are changed before they are filtered."""
        return bool(self.penalised or self.logit_bias or self.min_tokens)

    @cached_property
    def penalised(self) -> bool:
        """Whether it matters which tokens were seen."""
        return tuple(getattr(self, name) for name in PENALTIES) != (1, 0, 0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @cached_property
    def scored(self) -> bool:
        """Whether choices need all logits, and not just where they are largest."""
        return self.edits or not self.greedy


def _integer(name: str, value) -> int:
    return integer(f"SamplingParams: {name}", value)


def _number(name: str, value) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"SamplingParams: {name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:  # an int beyond all floats; whoever checks its range says so
        return math.inf if value > 0 else -math.inf


def _integers(name: str, values) -> tuple[int, ...]:
    try:
        ids = None if isinstance(values, str) else tuple(values)
    except TypeError:
        ids = None
    if ids is None:
        raise ValueError(f"SamplingParams: {name} must be a list of integers, got {values!r}")
    return tuple(_integer(name, t) for t in ids)


def _pairs(name: str, values) -> tuple[tuple[int, float], ...]:
    pairs = values.items() if isinstance(values, Mapping) else values
    try:
        pairs = [(token, value) for token, value in pairs]
    except (TypeError, ValueError):
        raise ValueError(f"SamplingParams: {name} must be {{token id: value}}, got {values!r}") from None
    return tuple((_integer(f"{name}: every token id", token), _number(name, value)) for token, value in pairs)


def uniform(seed: int, position: int, purpose: int) -> float:
    """One fp64 uniform in [0, 1) from the counter-based Philox generator, keyed by its arguments."""
    bits = np.random.Philox(key=[seed, purpose], counter=[position, 0, 0, 0])
    return np.random.Generator(bits).random()


def pick(weights: torch.Tensor, u: float) -> int:
    """Inverse-CDF draw from non-negative fp64 ``weights`` ``[vocab_size]`` (any positive sum)."""
    cdf = weights.cumsum(0)
    index = int(torch.searchsorted(cdf, u * float(cdf[-1]), right=True))
    return min(index, int(weights.nonzero()[-1]))


class RejectionSampler:
    """One request's sampler. A rejected draft's recovery token never equals the draft (its residual is 0 there), so
    consensus by comparing ids accepts exactly what the rule accepted.
    """

    def __init__(self, params: SamplingParams, seed: int):
        self.params, self.seed = params, seed
        self._draft_probs: torch.Tensor | None = None

    def _probs(self, logits: torch.Tensor) -> torch.Tensor:
        """fp64 ``[rows, vocab_size]``, computed in fp32."""
        p = self.params
        probs = process_logits_probs(logits, p.temperature, p.top_k, p.top_p, p.min_p).double()
        return probs / probs.sum(-1, keepdim=True)

    def draft(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        """Draft tokens int32 ``[rows]`` for ``position, position + 1, ...`` from fp32 logits ``[rows, vocab_size]``.

        NaN counts as -inf, and a row of nothing else drafts id 0: a broken drafter is only slow.
        """
        self._draft_probs = self._probs(logits)
        ids = [pick(q, uniform(self.seed, position + i, DRAFT)) for i, q in enumerate(self._draft_probs)]
        return torch.tensor(ids, dtype=torch.int32, device="cpu")

    def forget_drafts(self) -> None:
        """Free what :meth:`draft` keeps for :meth:`verify`: fp64 ``[drafts, vocab_size]``."""
        self._draft_probs = None

    def verify(self, logits: torch.Tensor, drafts: list[int], position: int) -> torch.Tensor:
        """Choices int32 ``[len(drafts) + 1]`` for positions ``position, ...``: each draft until the first rejected one,
        there the recovery token, and after all drafts the bonus token. NaN counts as -inf; what a row of nothing else
        chooses means nothing, and consensus, told so, does not take it.
        """
        probs = self._probs(logits[: len(drafts) + 1])
        choices = list(drafts)
        for i, token in enumerate(drafts):
            p, q = probs[i], self._draft_probs[i]
            # u < p/q without the division; u = 0 must not accept what p forbids.
            u = uniform(self.seed, position + i, ACCEPT)
            if p[token] > 0 and u * q[token] < p[token]:
                continue
            residual = (p - q).clamp(min=0)
            if not residual.any():
                continue  # p and q are one distribution to the last bit: rejecting would be a rounding error
            choices[i] = pick(residual, uniform(self.seed, position + i, RECOVER))
            break
        else:
            choices.append(pick(probs[len(drafts)], uniform(self.seed, position + len(drafts), RECOVER)))
        padded = choices + [0] * (len(drafts) + 1 - len(choices))
        return torch.tensor(padded, dtype=torch.int32, device="cpu")
