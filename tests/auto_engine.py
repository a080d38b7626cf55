"""Engines in mode="auto" on a tiny model. What their warm-ups keep lies in a folder of the test's own."""

import pytest
import torch

from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [1, 6, 1, 8, 0, 3, 3]]
LONG = SamplingParams(max_new_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("tiny")
    return str(checkpoints.make(where, dtype=torch.bfloat16, diff_noise=0.02, vocab_size=700, mask_token_id=699))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "orthrus_rt"


def engine(folder, **how):
    return Engine.from_pretrained(folder, device="cpu", **({"max_seq_len": 256, "max_batch_size": 4} | how))
