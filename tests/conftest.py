"""The checkpoint that most tests run, and less work for the garbage collector."""

import gc

import pytest
import torch

from tests import checkpoints


# The objects of torch, transformers and the tests stay alive; scanning them again and again would take seconds.
def pytest_collection():
    gc.disable()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny bf16 model, some of whose drafts are accepted; tests only read it. A file that needs another model
    overrides this fixture with its own.
    """
    return str(checkpoints.make(tmp_path_factory.mktemp("tiny"), dtype=torch.bfloat16, diff_noise=0.05))
