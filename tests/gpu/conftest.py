"""What tests on a card share."""

import pytest
import torch


@pytest.fixture
def large_card():
    """One that has room for tests of some 17 GB in two processes at once; what a test took is given back."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a card with 40 GB")
    yield
    torch.cuda.empty_cache()
