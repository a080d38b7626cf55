"""How large an engine is: its arguments checked, and filled in where they are None."""

from __future__ import annotations

from typing import NamedTuple

from orthrus_rt import pages
from orthrus_rt.config import ModelConfig
from orthrus_rt.integers import integer

DEFAULT_SEQ_LEN = 4096
MOST = 2**31  # slots and pages have int32 numbers


class Sizes(NamedTuple):
    max_seq_len: int
    max_batch_size: int
    num_pages: int

    def __str__(self) -> str:
        return f"max_batch_size {self.max_batch_size}, num_pages {self.num_pages}, max_seq_len {self.max_seq_len}"


def engine_sizes(config: ModelConfig, max_seq_len: int | None, max_batch_size: int, num_pages: int | None) -> Sizes:
    """The sizes that :meth:`orthrus_rt.Engine.from_pretrained` describes.

    Raises:
        ValueError: one is out of range for this model, or not an integer.
    """
    most, default = config.most_positions, min(DEFAULT_SEQ_LEN, config.max_position_embeddings)
    max_seq_len = default if max_seq_len is None else integer("max_seq_len", max_seq_len)
    if not 2 <= max_seq_len <= most:
        raise ValueError(f"max_seq_len must be within [2, {most}] (the positions of this model), got {max_seq_len}")
    max_batch_size = integer("max_batch_size", max_batch_size)
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size must be >= 1, got {max_batch_size}")
    per_sequence = pages.num_pages(max_seq_len)
    pages_named = "num_pages" if num_pages is not None else f"max_batch_size * {per_sequence} pages"
    num_pages = max_batch_size * per_sequence if num_pages is None else integer("num_pages", num_pages)
    for name, value in (("max_batch_size", max_batch_size), (pages_named, num_pages)):
        if value >= MOST:
            raise ValueError(f"{name} must be < 2**31, got {value}")
    if num_pages < per_sequence:
        raise ValueError(f"num_pages must be >= {per_sequence} (one sequence of {max_seq_len}), got {num_pages}")
    return Sizes(max_seq_len, max_batch_size, num_pages)
