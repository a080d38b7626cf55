"""Where two decodings of one prompt part, and how close the choice was there."""

from __future__ import annotations

from dataclasses import dataclass

from orthrus_rt.engine import Engine


@dataclass
class Difference:
    """The first difference of two outputs.

    Attributes:
        index: which generated token, from 0. A side that ended before it has token None.
        tokens: the two ids there.
        gap: top-1 minus top-2 AR logit at that position, given the common prefix.
    """

    index: int
    tokens: tuple[int | None, int | None]
    gap: float | None = None


def first_difference(a: list[int], b: list[int]) -> Difference | None:
    """The first index at which the lists differ, None if they are equal.

    >>> first_difference([1, 2, 3], [1, 5, 3])
    Difference(index=1, tokens=(2, 5), gap=None)
    >>> first_difference([1, 2], [1])
    Difference(index=1, tokens=(2, None), gap=None)
    """
    for i in range(max(len(a), len(b))):
        pair = (a[i] if i < len(a) else None, b[i] if i < len(b) else None)
        if pair[0] != pair[1]:
            return Difference(i, pair)
    return None


def compare(engine: Engine, prompt_ids: list[int], params, modes: tuple[str, str]):
    """Decode a prompt in two modes.

    Returns:
        ``(outputs, difference)``: both :class:`GenerationOutput`, and a :class:`Difference` or None.
    """
    outputs = [engine.generate(prompt_ids, params, mode=mode) for mode in modes]
    difference = first_difference(outputs[0].token_ids, outputs[1].token_ids)
    if difference:
        top = engine.next_logits(prompt_ids + outputs[0].token_ids[: difference.index]).topk(2).values
        difference.gap = float(top[0] - top[1])
    return outputs, difference
