"""What counts as an integer among the arguments of callers."""

from __future__ import annotations

import operator


def is_bool(value) -> bool:
    """Whether it is True or False, also numpy's or a tensor's, which ``operator.index`` takes for 1 and 0."""
    dtype = getattr(value, "dtype", None)
    return isinstance(value, bool) or (dtype is not None and str(dtype) in ("bool", "torch.bool"))


def integer(name: str, value) -> int:
    """``value`` as an int.

    Raises:
        ValueError: ``value`` is not an integer; True and False are not.
    """
    try:
        index = None if is_bool(value) else operator.index(value)
    except TypeError:
        index = None
    if index is None:
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return index
