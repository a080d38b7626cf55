"""The bitwise promise on CUDA, with tiny random checkpoints; with ``ORTHRUS_SMOLLM2_GGUF`` naming the embedded model's
base, on that model too.
"""

import os

import pytest
import torch

from orthrus_rt import prompts
from orthrus_rt.engine import Engine
from tests import checkpoints, lossless
from tests.traces import decode

pytestmark = pytest.mark.gpu

VARIANTS = {
    "qwen3": dict(family="qwen3", head_dim=128),
    "qwen3-untied-k32": dict(family="qwen3", tie_word_embeddings=False, block_size=32, num_attention_heads=8),
    "llama": dict(family="llama"),
    "llama-float32": dict(family="llama", dtype=torch.float32),
}


@pytest.fixture(scope="module", params=VARIANTS)
def engine(request, tmp_path_factory):
    kwargs = dict(dtype=torch.bfloat16, diff_noise=0.05, vocab_size=700, mask_token_id=699) | VARIANTS[request.param]
    folder = checkpoints.make(tmp_path_factory.mktemp("tiny"), **kwargs)
    engine = Engine.from_pretrained(
        str(folder), device="cuda", mode="two_pass", max_seq_len=256, max_batch_size=6, num_pages=24,
        dtype=str(kwargs["dtype"]).removeprefix("torch."), prefix_caching=False,
    )  # fmt: skip
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=("greedy", "sampled"))
def jobs(request, engine):
    """``(prompts, params, AR alone)``"""
    ids = lossless.random_prompts(engine.config.vocab_size, 20, 120, seed=1)
    params = getattr(lossless, request.param)(20, max_new_tokens=48, ignore_eos=True)
    return ids, params, decode(engine, ids, params, mode="ar")


def check_alone(engine, jobs, draft_lens):
    for way in lossless.ways(draft_lens):
        rate = lossless.check_alone(engine, *jobs, way)
        assert rate > 1.1 or way["mode"] == "one_pass"  # which cannot guess what random weights will choose


def test_alone(engine, jobs):
    check_alone(engine, jobs, (1, 5, engine.config.block_len - 1))


@pytest.mark.full
def test_every_draft_len_alone(engine, jobs):
    check_alone(engine, jobs, range(1, engine.config.block_len))


def test_together_preempted_and_eager(engine, jobs):
    for way in (dict(mode="ar"), *lossless.ways((1, engine.config.block_len - 1))):
        lossless.check_together(engine, *jobs, way)
        lossless.check_preempted(engine, *jobs, way, num_pages=8)
        lossless.check_eager(engine, *jobs, way)


def test_prefill(engine, monkeypatch):
    lossless.check_prefill(engine, monkeypatch)


@pytest.mark.skipif("ORTHRUS_SMOLLM2_GGUF" not in os.environ, reason="ORTHRUS_SMOLLM2_GGUF does not name the base")
@pytest.mark.parametrize("params", (lossless.greedy, lossless.sampled), ids=("greedy", "sampled"))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_embedded_model(dtype, params):
    """Every built-in prompt, 128 tokens: alone with three block lengths, then together."""
    engine = Engine.from_pretrained(
        "smollm2-135m", device="cuda", mode="two_pass", dtype=dtype, max_seq_len=1024, prefix_caching=False
    )
    ids = [p.encode(engine.tokenizer) for p in prompts.load()]
    each = params(len(ids), max_new_tokens=128)
    want = decode(engine, ids, each, mode="ar")
    for way in lossless.ways((1, 5, 15)):
        assert lossless.check_alone(engine, ids, each, want, way) > 1.3
        lossless.check_together(engine, ids, each, want, way)
    engine.close()
