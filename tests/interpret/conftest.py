"""This tier runs Triton's interpreter in a process of its own: TRITON_INTERPRET=1 pytest tests/interpret."""

import functools
import os

import pytest


@functools.cache
def why_not() -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a process of its own with TRITON_INTERPRET=1"
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    import numpy

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        try:
            int(numpy.zeros(1))
        except TypeError:
            return f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__}"
    return None


@pytest.fixture(autouse=True)
def interpreter():
    if reason := why_not():
        pytest.skip(reason)
