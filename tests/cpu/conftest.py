"""The ISA variants of the native CPU ops."""

import pytest

from orthrus_rt import dispatch


@pytest.fixture(params=("portable", "avx2", "avx512_bf16"))
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
