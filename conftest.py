"""Root of the test tree, so that ``tests`` is importable; and the whole grid only where it is asked for."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked full (make test-full)")


def pytest_collection_modifyitems(config, items):
    import torch

    skip_full = pytest.mark.skip(reason="the whole grid: make test-full")
    skip_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "full" in item.keywords and not config.getoption("--full"):
            item.add_marker(skip_full)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
