"""Decode the same prompts in several ways, find where two of them first differ, and how close the choice was there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from orthrus_rt.checkpoint import head_name
from orthrus_rt.engine import Engine
from orthrus_rt.outputs import complete
from orthrus_rt.sampling import SamplingParams

NEAR_TIE_SIGMAS = 3


@dataclass
class Difference:
    """Where two outputs differ.

    Attributes:
        index: which generated token, from 0.
        tokens: the two ids there; None for a side that has ended before.
        gap: AR logit of the first id minus that of the second, given the tokens before; None if a side has ended.
        near_tie: whether rounding alone explains it: ``gap``, ``their_gap`` and their sum (the distance between the two
            implementations) are all within :func:`near_tie_bound` in magnitude. Always False between two ways of this
            runtime, where rounding explains nothing.
        their_gap: the other implementation's logit of the second id minus that of the first; None in float32 and
            between two ways of this runtime.
    """

    index: int
    tokens: tuple[int | None, int | None]
    gap: float | None = None
    near_tie: bool = False
    their_gap: float | None = None


@dataclass
class Comparison:
    """One prompt decoded one ``way`` ("two_pass", "ar in batches of 4", "transformers") and in the first mode alone.

    ``tokens`` is how many were compared: those before a difference that is no near-tie, or all. ``difference`` is that
    difference, or, if there is none, the first of ``near_ties``.
    """

    way: str
    tokens: int
    tokens_per_cycle: float | None
    difference: Difference | None
    near_ties: list[Difference] = field(default_factory=list)


@dataclass
class Other:
    """Another implementation. ``greedy(ids)`` continues a prompt. ``logits(ids, n)`` gives ``[n, vocab_size]``: the
    logits of the token after each of the last n ids.
    """

    name: str
    greedy: Callable[[list[int]], list[int]]
    logits: Callable[[list[int], int], torch.Tensor]


def first_difference(a: list[int], b: list[int]) -> Difference | None:
    """The first index at which the lists differ, None if they are equal.

    >>> first_difference([1, 2, 3], [1, 5, 3])
    Difference(index=1, tokens=(2, 5), gap=None, near_tie=False, their_gap=None)
    >>> first_difference([1, 2], [1])
    Difference(index=1, tokens=(2, None), gap=None, near_tie=False, their_gap=None)
    """
    for i in range(max(len(a), len(b))):
        pair = (a[i] if i < len(a) else None, b[i] if i < len(b) else None)
        if pair[0] != pair[1]:
            return Difference(i, pair)
    return None


def check(num_prompts: int, params: SamplingParams, modes: list[str], batch: int, against) -> None:
    """Refuse what :func:`verify` cannot compare.

    Raises:
        ValueError: there is nothing to compare, a batch has more prompts than there are, a mode is given twice, or
            sampling has no seed or is compared with another implementation.
    """
    if len(modes) < 2 and batch < 2 and against is None:
        raise ValueError("two modes, a batch of at least 2 or another implementation are needed to compare")
    if not 1 <= batch <= num_prompts:
        raise ValueError(f"batch must be within [1, {num_prompts}] (the prompts there are), got {batch}")
    if len(set(modes)) < len(modes):
        raise ValueError(f"modes must differ from one another, got {' '.join(modes)}")
    if not params.greedy and against:
        raise ValueError("another implementation draws other random numbers: only greedy decoding can be compared")
    if not params.greedy and params.seed is None:
        raise ValueError("sampling needs a seed to be compared")


def verify(
    engine: Engine,
    prompts: list[list[int]],
    params: SamplingParams,
    modes: list[str],
    *,
    batch: int = 1,
    against: Other | None = None,
) -> Iterator[tuple[list[int], float, list[Comparison]]]:
    """Decode every prompt in ``modes[0]`` alone, and compare all other ways with that.

    The other ways are the other modes alone; with ``batch`` > 1 every mode again with ``batch`` prompts together (if
    fewer are left, together with some before them); and ``against``, another implementation's greedy continuation. In
    16 bit the latter may differ from ours at a near-tie. From there on it is given our tokens, and each of them that it
    would not have chosen must be a near-tie too.

    An engine made with ``prefix_caching=False`` computes everything anew; otherwise the ways share cached pages.

    Args:
        params: with one seed for all, if they sample.

    Yields:
        For each prompt ``(token_ids, tokens_per_cycle, comparisons)``, the first two from ``modes[0]`` alone.

    Raises:
        ValueError: as in :func:`check`.
    """
    check(len(prompts), params, modes, batch, against)
    for first in range(0, len(prompts), batch):
        group, together = prompts[first : first + batch], []
        if batch > 1:
            company = prompts[first + len(group) - batch : first + len(group)]
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
                comparisons.append(_compare_against(engine, against, ids, want.token_ids))
            yield want.token_ids, want.stats.tokens_per_cycle, comparisons


def _compare(engine: Engine, way: str, ids, want, got, tokens_per_cycle=None) -> Comparison:
    difference = first_difference(want, got)
    if difference and None not in difference.tokens:
        difference.gap, _ = _gap(engine, ids, want, difference)
    return Comparison(way, difference.index if difference else len(want), tokens_per_cycle, difference)


def _gap(engine: Engine, ids, want, difference: Difference) -> tuple[float, torch.Tensor]:
    """The difference between our logits of the two ids, and the hidden row that they are computed from."""
    logits, hidden = engine.next_logits_and_hidden(ids + want[: difference.index])
    return float(logits[difference.tokens[0]] - logits[difference.tokens[1]]), hidden


def _compare_against(engine: Engine, against: Other, ids, want) -> Comparison:
    way, got, near_ties = against.name, against.greedy(ids), []
    first = first_difference(want, got)
    if first is None or None in first.tokens or engine.model.dtype is torch.float32:
        return _compare(engine, way, ids, want, got)
    logits = against.logits(ids + want[:-1], len(want) - first.index)
    choices = [first.tokens[1], *logits[1:].argmax(-1).tolist()]
    for index, (ours, theirs, row) in enumerate(zip(want[first.index :], choices, logits, strict=True), first.index):
        if ours == theirs:
            continue
        difference = Difference(index, (ours, theirs), their_gap=float(row[theirs]) - float(row[ours]))
        difference.gap, hidden = _gap(engine, ids, want, difference)
        bound = near_tie_bound(engine, hidden, ours, theirs)
        apart = difference.gap + difference.their_gap
        difference.near_tie = all(abs(gap) <= bound for gap in (difference.gap, difference.their_gap, apart))
        if not difference.near_tie:
            return Comparison(way, index, None, difference, near_ties)
        near_ties.append(difference)
    return Comparison(way, len(want), None, near_ties[0], near_ties)


def near_tie_bound(engine: Engine, hidden: torch.Tensor, a: int, b: int) -> float:
    """How far apart rounding alone can bring the logits of ids ``a`` and ``b`` in two 16-bit implementations.

    Rounding to a dtype with unit roundoff u has an error of at most u times a power of two, uniformly distributed; as a
    share of the value itself that is u / sqrt(6) rms. The residual stream is rounded after each of its two sums per
    layer and once more by the final norm, R = 2 * num_layers + 1 times. Roundings inside a branch enter in proportion
    to the branch's share of the stream, and are left out. (A softmax of large scores enlarges those of queries and
    keys. In Llama-like models with random weights and sharp heads, rounding alone can exceed the bound, in Qwen3-like
    ones rarely; a comparison in float32 decides. The trained models measured stay within it.)
    Independent errors add up to ``u * sqrt(R / 6)`` of ``hidden`` (the final normalised row), in directions independent
    of the head's rows w. So a logit *difference* is off by ``|w_a - w_b| |hidden| / sqrt(hidden_size)`` times that rms
    error, and by sqrt(2) times as much between two implementations. The bound is three times this, plus the rounding of
    both logits.
    """
    config = engine.config
    head = engine.checkpoint.tensors[head_name(config)][[a, b]].float().to(hidden.device)
    unit = torch.finfo(engine.model.dtype).eps / 2
    relative = unit * ((2 * config.num_layers + 1) / 6) ** 0.5
    x = hidden.float()
    sigma = float((head[0] - head[1]).norm() * x.norm()) / config.hidden_size**0.5 * relative * 2**0.5
    return NEAR_TIE_SIGMAS * sigma + unit * float((head @ x).abs().sum())
