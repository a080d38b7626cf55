"""Decode the same prompts in several ways and find where two of them part, and how close the choice was there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from orthrus_rt.engine import Engine
from orthrus_rt.outputs import complete
from orthrus_rt.sampling import SamplingParams

NEAR_TIE_SIGMAS = 3


@dataclass
class Difference:
    """The first difference of two outputs.

    Attributes:
        index: which generated token, from 0. A side that ended before it has token None.
        tokens: the two ids there.
        gap: AR logit of the first id minus that of the second, given the common prefix; None where a side ended.
        near_tie: rounding alone explains it: the gap, whichever token it favours, is within :func:`near_tie_bound`.
            Between two ways of this runtime nothing is ever explained by rounding.
    """

    index: int
    tokens: tuple[int | None, int | None]
    gap: float | None = None
    near_tie: bool = False


@dataclass
class Comparison:
    """One prompt, decoded ``way`` ("two_pass", "ar in batches of 4", "transformers"), against the first mode alone.

    ``tokens`` were compared: those before the difference, or all.
    """

    way: str
    tokens: int
    tokens_per_cycle: float | None
    difference: Difference | None


def first_difference(a: list[int], b: list[int]) -> Difference | None:
    """The first index at which the lists differ, None if they are equal.

    >>> first_difference([1, 2, 3], [1, 5, 3])
    Difference(index=1, tokens=(2, 5), gap=None, near_tie=False)
    >>> first_difference([1, 2], [1])
    Difference(index=1, tokens=(2, None), gap=None, near_tie=False)
    """
    for i in range(max(len(a), len(b))):
        pair = (a[i] if i < len(a) else None, b[i] if i < len(b) else None)
        if pair[0] != pair[1]:
            return Difference(i, pair)
    return None


def check(num_prompts: int, params: SamplingParams, modes: list[str], batch: int = 1, against=None) -> None:
    """Whether :func:`verify` would take these.

    Raises:
        ValueError: there is nothing to compare, a batch has more prompts than there are, a mode comes twice, or
            sampling has no seed or is compared with another implementation.
    """
    if len(modes) < 2 and batch < 2 and against is None:
        raise ValueError("two modes, a batch of at least 2 or another implementation are needed to compare")
    if not 1 <= batch <= num_prompts:
        raise ValueError(f"batch must be within [1, {num_prompts}] (the prompts there are), got {batch}")
    if len(set(modes)) < len(modes):
        raise ValueError(f"modes must differ from one another, got {' '.join(modes)}")
    if not params.greedy and (params.seed is None or against):
        raise ValueError("sampling needs a seed, and cannot be compared with another implementation")


def verify(
    engine: Engine,
    prompts: list[list[int]],
    params: SamplingParams,
    modes: list[str],
    *,
    batch: int = 1,
    against: Callable[[list[int]], list[int]] | None = None,
) -> Iterator[tuple[list[int], float, list[Comparison]]]:
    """Decode every prompt in ``modes[0]`` alone, and compare all other ways with that.

    The other ways are the other modes alone; with ``batch`` > 1 every mode again, ``batch`` prompts together (where
    fewer are left, with some before them); and ``against``, another implementation's greedy continuation of a prompt,
    whose near-ties in 16 bit are marked.

    Made with ``prefix_caching=False`` the engine computes all of it anew; else ways take over pages from one another.

    Args:
        params: one seed for all, if it samples.

    Yields:
        For each prompt ``(token_ids, tokens_per_cycle, comparisons)``, the first two of ``modes[0]`` alone.

    Raises:
        ValueError: as :func:`check`.
    """
    check(len(prompts), params, modes, batch, against)
    for first in range(0, len(prompts), batch):
        group, together = prompts[first : first + batch], []
        if batch > 1:
            company = prompts[max(0, len(group) + first - batch) : first + len(group)]
            outs = [complete(engine.generate(company, params, mode=mode)) for mode in modes]
            together = [(mode, some[-len(group) :]) for mode, some in zip(modes, outs, strict=True)]
        for i, ids in enumerate(group):
            want, *others = (engine.generate(ids, params, mode=mode) for mode in modes)
            ways = list(zip(modes[1:], others, strict=True))
            ways += [(f"{mode} in batches of {batch}", outs[i]) for mode, outs in together]
            comparisons = [
                _compare(engine, way, ids, want.token_ids, out.token_ids, out.stats.tokens_per_cycle)
                for way, out in ways
            ]
            if against:
                comparisons.append(_compare_against(engine, ids, want.token_ids, against(ids)))
            yield want.token_ids, want.stats.tokens_per_cycle, comparisons


def _compare(engine: Engine, way: str, ids, want, got, tokens_per_cycle=None) -> Comparison:
    difference = first_difference(want, got)
    if difference and None not in difference.tokens:
        logits = engine.next_logits(ids + want[: difference.index])
        difference.gap = float(logits[difference.tokens[0]] - logits[difference.tokens[1]])
    return Comparison(way, difference.index if difference else len(want), tokens_per_cycle, difference)


def _compare_against(engine: Engine, ids, want, got) -> Comparison:
    comparison = _compare(engine, "transformers", ids, want, got)
    difference = comparison.difference
    if difference and difference.gap is not None and engine.model.dtype is not torch.float32:
        hidden = engine.runner.activations.normed[0]  # that next_logits has just made its logits of
        difference.near_tie = abs(difference.gap) <= near_tie_bound(engine, hidden, *difference.tokens)
    return comparison


def near_tie_bound(engine: Engine, hidden: torch.Tensor, a: int, b: int) -> float:
    """How far apart rounding alone can bring the logits of ids ``a`` and ``b`` in two 16-bit implementations.

    Rounding to a dtype with unit roundoff u is off by at most u of a power of two, uniformly: of the value itself, by
    u / sqrt(6) rms. The residual stream is rounded after each of its two sums a layer and once more by the final norm,
    R = 2 * num_layers + 1 times; roundings inside a branch enter by the branch's share of the stream, and are left out.
    (A softmax of large scores enlarges those of queries and keys: of Llama-like models with random weights and sharp
    heads, rounding alone can pass the bound; float32 tells. The trained ones measured, and Qwen3's norms, stay within.)
    Independent errors add up to ``u * sqrt(R / 6)`` of ``hidden`` (the final normed row), in directions that the head's
    rows w do not know: so a logit *difference* is off by ``|w_a - w_b| |hidden| / sqrt(hidden_size)`` times that, rms,
    and sqrt(2) times that between two implementations. The bound is three of these, and the rounding of both logits.
    """
    config = engine.config
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    head = engine.checkpoint.tensors[name][[a, b]].float().to(hidden.device)
    unit = torch.finfo(engine.model.dtype).eps / 2
    relative = unit * ((2 * config.num_layers + 1) / 6) ** 0.5
    x = hidden.float()
    sigma = float((head[0] - head[1]).norm() * x.norm()) / config.hidden_size**0.5 * relative * 2**0.5
    return NEAR_TIE_SIGMAS * sigma + unit * float((head @ x).abs().sum())
