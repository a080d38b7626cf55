"""The bitwise guarantee on CUDA, with tiny random checkpoints; on the embedded model: test_lossless_embedded.py."""

import pytest
import torch

from orthrus_rt.engine import Engine
from tests import checkpoints, lossless
from tests.traces import decode

pytestmark = pytest.mark.gpu

VARIANTS = {
    "qwen3": dict(family="qwen3", head_dim=128),
    "qwen3-untied-k32": dict(family="qwen3", tie_word_embeddings=False, block_size=32, num_attention_heads=8),
    "llama": dict(family="llama"),
    "llama-float32": dict(family="llama", dtype=torch.float32),
    "qwen3-coded": dict(family="qwen3", head_dim=128),
}


@pytest.fixture(scope="module", params=VARIANTS)
def engine(request, tmp_path_factory):
    coded = "coded" in request.param
    kwargs = dict(dtype=torch.bfloat16, diff_noise=0.05, vocab_size=700, mask_token_id=699) | VARIANTS[request.param]
    folder = checkpoints.make(tmp_path_factory.mktemp("tiny"), **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORTHRUS_CUDA_CODED", str(int(coded)))
        engine = Engine.from_pretrained(
            str(folder), device="cuda", mode="two_pass", max_seq_len=256, max_batch_size=6, num_pages=24,
            dtype=kwargs["dtype"], prefix_caching=False,
        )  # fmt: skip
    layer = engine.model.layers[0]
    assert [w.bits for w in (layer.o, layer.o_diff)] == ([12, 8] if coded else [8 * kwargs["dtype"].itemsize] * 2)
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=("greedy", "sampled"))
def jobs(request, engine):
    """``(prompts, params, traces of AR decoding each alone)``."""
    ids = lossless.random_prompts(engine.config.vocab_size, 8, 120, seed=1)
    # Results are a cycle late, so two blocks ahead are reserved: only requests that outgrow these can run out of pages.
    most = max(48, 4 * engine.config.block_len)
    params = getattr(lossless, request.param)(8, max_new_tokens=most, ignore_eos=True)
    return ids, params, decode(engine, ids, params, mode="ar")


def least_rate(way) -> float:
    """The least tokens per cycle. On the CPU, over 12 sets of prompts, greedy and sampled, these checkpoints give at
    least 1.37 with at most 7 drafts (1.32 with the inexact ones of coded weights), and at least 1.11 with 31, next to
    which the context counts for less. Two views that have nothing in common give up to 1.11 and 1.08. A GPU that
    decides near-ties differently writes other texts; for the rate, that is just another set of prompts.
    """
    if way["mode"] == "one_pass":
        return 0.0  # it cannot guess what random weights will choose
    return 1.2 if way["draft_len"] <= 7 else 1.08


def check_alone(engine, jobs, draft_lens):
    for way in lossless.ways(draft_lens):
        assert lossless.check_alone(engine, *jobs, way) > least_rate(way), way


def test_alone(engine, jobs):
    check_alone(engine, jobs, (1, 5, engine.config.block_len - 1))


@pytest.mark.full
def test_every_draft_len_alone(engine, jobs):
    check_alone(engine, jobs, range(1, engine.config.block_len))


def test_together_preempted_and_eager(engine, jobs):
    few = [column[:3] for column in jobs]
    for way in (dict(mode="ar"), *lossless.ways((1, engine.config.block_len - 1))):
        lossless.check_together(engine, *jobs, way)
        lossless.check_preempted(engine, *jobs, way, num_pages=8)
        lossless.check_eager(engine, *few, way)


def test_prefill(engine, monkeypatch):
    lossless.check_prefill(engine, monkeypatch)
