"""The checkpoint that most tests run, and less of the collector's work."""

import gc

import pytest
import torch

from tests import checkpoints


# What torch, transformers and the tests consist of stays; to look through it again and again takes seconds.
def pytest_collection():
    gc.disable()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny bf16 model, some of whose drafts are accepted; it is only read. Where a file needs another one, its own
    fixture takes the place of this one.
    """
    return str(checkpoints.make(tmp_path_factory.mktemp("tiny"), dtype=torch.bfloat16, diff_noise=0.05))
