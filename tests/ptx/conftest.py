"""Fixtures of tests/cpu for what runs in the emulator; without it, all but test_kernels.py is skipped."""

import sys

import pytest

from tests.cpu.conftest import host  # noqa: F401


@pytest.fixture(autouse=True)
def emulator(request):
    if request.path.name != "test_kernels.py" and "tests.ptx.plugin" not in sys.modules:
        pytest.skip("test_kernels.py runs it: python tools/test.py ptx")
