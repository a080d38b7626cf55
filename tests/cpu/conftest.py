"""The variants of the native CPU ops: instruction sets, and elements of weights, activations and cache."""

import pytest

from orthrus_rt import dispatch
from tests import native_cpu


@pytest.fixture(params=("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"))
def isa(request):
    """Runs the test under every variant that this CPU has."""
    cpu = dispatch.native().cpu
    before = cpu.isa()
    try:
        cpu.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.set_isa(before)


@pytest.fixture(params=dispatch.ELEMENTS, ids=("bfloat16", "float32"))
def element(request, monkeypatch):
    """The dtype that ``randn`` and ``poison`` of tests/native_cpu.py make."""
    monkeypatch.setattr(native_cpu, "ELEMENT", request.param)
    return request.param
