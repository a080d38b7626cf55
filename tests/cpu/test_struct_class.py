"""Parameter structs as Python sees them: what their fields accept and refuse, and how long they live."""

import gc
import re
import struct
import sys

import pytest

from orthrus_rt import dispatch
from tests import apart

native = dispatch.extension()
pytestmark = pytest.mark.native

ADDRESS = 2 ** (8 * struct.calcsize("P"))


class Whole:
    def __index__(self):
        return 4


def test_fields_are_zero_or_what_the_constructor_is_given():
    params = native.RowLinearParams(x=ADDRESS - 1, leading_only=True, workspace_bytes=-(2**63), num_rows=Whole())
    assert (params.x, params.leading_only, params.workspace_bytes, params.num_rows) == (ADDRESS - 1, 1, -(2**63), 4)
    assert params.out == params.num_rows_ar == params.epilogue == 0
    assert native.RmsNormParams(eps=2).eps == 2.0
    assert native.RmsNormParams(eps=0.1).eps == struct.unpack("f", struct.pack("f", 0.1))[0]


@pytest.mark.parametrize(
    "kind, field, expected, values",
    [
        ("RowLinearParams", "num_rows", "an integer of 32 bits", (2**31, -(2**31) - 1, 2**70, 1.5, "3", None)),
        ("RowLinearParams", "epilogue", "an integer of 32 bits", (2**31, 1.5, "3", None)),
        ("ConsensusParams", "step", "an integer of 32 bits", (2**31, 1.5, "3", None)),
        ("RowLinearParams", "workspace_bytes", "an integer of 64 bits", (2**63, -(2**63) - 1, 1.5, "3", None)),
        ("RowLinearParamsF32", "x", "an address", (-1, ADDRESS, 1.5, "3", None)),
        ("DualAttnParams", "softmax_scale", "a number", ("3", None)),
        ("DualAttnParams", "kv", "PagedKv", (0, None)),
    ],
)
def test_a_field_refuses(kind, field, expected, values):
    of = getattr(native, kind)
    params = of()
    for value in values:
        message = f"^{kind}.{field} must be {expected}, got {re.escape(repr(value))}$"
        with pytest.raises(TypeError, match=message):
            setattr(params, field, value)
        with pytest.raises(TypeError, match=message):
            of(**{field: value})
    with pytest.raises(TypeError, match=f"^{kind}.{field} cannot be deleted$"):
        delattr(params, field)


def test_an_integer_may_fail_in_its_own_way():
    class Failing:
        def __index__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        native.Rows(num_rows=Failing())


def test_what_is_no_field_or_no_construction():
    for attempt in (lambda: native.Rows(tokens=1), lambda: native.Rows().tokens):
        with pytest.raises(AttributeError, match="Rows' object has no attribute 'tokens'"):
            attempt()
    with pytest.raises(TypeError, match="Rows: fields must be keyword arguments"):
        native.Rows(1)
    with pytest.raises(TypeError, match="not safe"):
        native.Rows.__new__(native.Rows)


def test_a_struct_within_another_is_set_by_a_copy_and_read_in_place():
    rows = native.Rows(num_rows=5)
    params = native.DualAttnParams(rows=rows)
    rows.num_rows = 6
    within = params.rows
    assert within.num_rows == 5
    within.num_rows = 7
    assert params.rows.num_rows == 7
    params.rows = within
    del params
    gc.collect()
    assert within.num_rows == 7  # it keeps the enclosing struct alive


def test_references_are_given_back():
    params = native.DualAttnParams()
    counted = params, native.DualAttnParams, native.Rows
    before = [sys.getrefcount(each) for each in counted]
    for _ in range(10):
        assert params.rows.num_rows == native.Rows().num_rows == 0
        with pytest.raises(TypeError):
            native.Rows(num_rows=None)
    assert [sys.getrefcount(each) for each in counted] == before


def test_an_op_takes_its_own_parameters():
    cpu = native.cpu
    for params, got in ((None, "NoneType"), (native.Rows(), "orthrus_rt._native.Rows")):
        with pytest.raises(TypeError, match=f"^embed: params must be EmbedParams or EmbedParamsF32, got {got}$"):
            cpu.embed(params)
    with pytest.raises(TypeError, match=r"^count_tokens: params must be CountTokensParams, got int$"):
        cpu.count_tokens(3)
    cpu.embed(native.EmbedParams())
    cpu.embed(native.EmbedParamsF32())


def test_a_second_copy_of_the_module_leaves_the_first_one_whole():
    """Classes belong to the process: loading the file under another name raises an error and changes nothing else."""
    out = apart.run("""
import importlib.util
from orthrus_rt import _native
before = _native.Rows(num_rows=3)
spec = importlib.util.spec_from_file_location("other._native", _native.__file__)
try:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
except ImportError:
    print("refused")
print(before.num_rows, _native.Rows(num_rows=7).num_rows_ar)
""")
    assert out == "refused\n3 0\n"
