"""Root of the test tree, which makes ``tests`` importable; and options for what runs only on request."""

import importlib

import pytest


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked full (make test-full)")
    parser.addoption("--software-tiles", action="store_true", help="AMX's tiles in software: see tests/amx_software")
    parser.addoption("--sanitized", choices=("address", "thread"), help="native code so: see tests/sanitized.py")


def pytest_configure(config):
    if kind := config.getoption("--sanitized"):
        option, native = "--sanitized", importlib.import_module("tests.sanitized").KINDS[kind]
    elif config.getoption("--software-tiles"):
        option, native = "--software-tiles", importlib.import_module("tests.amx_software")
    else:
        return
    if not hasattr(config, "workerinput"):
        if why := native.why_not():
            raise pytest.UsageError(f"{option}: {why}")
        native.build()
    native.use()


def pytest_collection_modifyitems(config, items):
    import torch

    from orthrus_rt import dispatch

    skip_full = pytest.mark.skip(reason="the whole grid: make test-full")
    skip_gpu = pytest.mark.skip(reason="no CUDA device")
    skip_native = pytest.mark.skip(reason="the native module is not built")
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(skip_full)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
        if item.get_closest_marker("native") and dispatch.extension() is None:
            item.add_marker(skip_native)
