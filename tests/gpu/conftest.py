"""Fixtures shared by the GPU tests."""

import pytest
import torch


@pytest.fixture
def large_card():
    """A GPU with room for tests of about 17 GB in two processes at once; frees a test's memory afterwards."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a card with 40 GB")
    yield
    torch.cuda.empty_cache()
