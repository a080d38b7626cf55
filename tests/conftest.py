"""The checkpoint that most tests run."""

import pytest
import torch

from tests import checkpoints


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny bf16 model, some of whose drafts are accepted; it is only read. Where a file needs another one, its own
    fixture takes the place of this one.
    """
    return str(checkpoints.make(tmp_path_factory.mktemp("tiny"), dtype=torch.bfloat16, diff_noise=0.05))
