"""Fixtures of tests/cpu for tests that run in the emulator. Without it, all but test_kernels.py are skipped."""

import sys

import pytest

from tests.cpu.conftest import host  # noqa: F401


@pytest.fixture(autouse=True)
def emulator(request):
    if request.path.name != "test_kernels.py" and "tests.ptx.plugin" not in sys.modules:
        pytest.skip("test_kernels.py runs it: python tools/test.py ptx")
