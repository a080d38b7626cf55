"""Root of the test tree, so that ``tests`` is importable; and what is only there if it is asked for."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked full (make test-full)")
    parser.addoption("--software-tiles", action="store_true", help="AMX's tiles in software: see tests/amx_software")
    parser.addoption("--sanitized", action="store_true", help="native code under sanitizers: see tests/sanitized.py")


def pytest_configure(config):
    if config.getoption("--sanitized"):
        from tests import sanitized

        if not hasattr(config, "workerinput"):
            if why := sanitized.why_not():
                raise pytest.UsageError(f"--sanitized: {why}")
            sanitized.build()
        sanitized.use()
    elif config.getoption("--software-tiles"):
        from tests import amx_software

        if not hasattr(config, "workerinput"):
            if why := amx_software.why_not():
                raise pytest.UsageError(f"--software-tiles: {why}")
            amx_software.build()
        amx_software.use()


def pytest_collection_modifyitems(config, items):
    import torch

    skip_full = pytest.mark.skip(reason="the whole grid: make test-full")
    skip_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "full" in item.keywords and not config.getoption("--full"):
            item.add_marker(skip_full)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
