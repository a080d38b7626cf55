"""Failed allocations: how to recognise one by its error, and which arguments would make the engine smaller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch


class OutOfMemoryError(torch.OutOfMemoryError):
    """Says what did not fit, and which arguments make the engine smaller, if any do."""


def lacks_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device or the host has no memory left."""
    # torch's CPU allocator raises a plain RuntimeError, the kernels' scratch a MemoryError. If CUDA's driver has none
    # left for a graph or a kernel's code, or cuBLAS has none, their caller raises some RuntimeError.
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


KNOBS = "max_batch_size, num_pages or max_seq_len"


def knobs_of_rows(modes: Iterable[str]) -> str:
    """The arguments that reduce what is allocated for each row of cycles in these modes."""
    drafting = set(modes) - {"ar"}
    return ", ".join([*(["draft_len"] if drafting else []), *(["fan_out"] if "one_pass" in drafting else []), KNOBS])


@contextlib.contextmanager
def naming_the_knobs(doing: str, knobs: str = KNOBS):
    """Make a failed allocation say what was being done and which arguments reduce it; the innermost block says it.

    Raises:
        torch.OutOfMemoryError: instead of the allocator's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not lacks_memory(error):
            raise
        said = str(error).strip().split("\n")[0]
        raise OutOfMemoryError(f"out of memory while {doing}: lower {knobs} ({said})") from error
