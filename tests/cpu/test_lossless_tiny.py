"""Lossless to the bit on tiny random checkpoints, in bfloat16 and float32: every draft_len, greedy and sampled, alone,
batched, preempted, eager and replayed, and with several prefill chunk sizes.
"""

import pytest
import torch

from orthrus_rt.engine import Engine
from tests import checkpoints, lossless
from tests.pins import of_this_isa
from tests.traces import assert_same, decode

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread", "paced")]

VARIANTS = {
    "qwen3": dict(family="qwen3"),
    "qwen3-untied-k16": dict(family="qwen3", tie_word_embeddings=False, block_size=16, num_attention_heads=8),
    "llama": dict(family="llama", head_dim=32),
    "llama-float32": dict(family="llama", head_dim=32, dtype=torch.float32),
    "qwen3-untied-k16-float32": dict(
        family="qwen3", tie_word_embeddings=False, block_size=16, num_attention_heads=8, dtype=torch.float32
    ),
}
# Tokens per cycle at the longest draft, by mode, greedy and sampled. The weights are random. Drafts are accepted only
# because the diffusion view is a noisy copy of the AR view. The result of a verification cannot be guessed at all, so
# one_pass gains next to nothing here (on the embedded model it does gain: test_lossless.py).
PINNED = {
    "neon": {
        "qwen3": {"two_pass": (1.388, 1.431), "one_pass": (1.0, 1.0)},
        "qwen3-untied-k16": {"two_pass": (1.232, 1.348), "one_pass": (1.005, 1.045)},
        "llama": {"two_pass": (1.476, 1.465), "one_pass": (1.0, 1.0)},
        "llama-float32": {"two_pass": (1.476, 1.5), "one_pass": (1.0, 1.005)},
        "qwen3-untied-k16-float32": {"two_pass": (1.248, 1.274), "one_pass": (1.039, 1.045)},
    },
}
PINNED["amx_bf16"] = PINNED["neon"] | {
    "qwen3": {"two_pass": (1.378, 1.431), "one_pass": (1.0, 1.0)},
    "qwen3-untied-k16": {"two_pass": (1.232, 1.319), "one_pass": (1.005, 1.039)},
}
# These draft with coded weights.
PINNED["avx512_bf16"] = PINNED["neon"] | {
    "qwen3": {"two_pass": (1.368, 1.431), "one_pass": (1.0, 1.0)},
    "qwen3-untied-k16": {"two_pass": (1.232, 1.31), "one_pass": (1.005, 1.057)},
    "llama": {"two_pass": (1.476, 1.42), "one_pass": (1.005, 1.0)},
}
PINNED["avx512"] = PINNED["avx512_bf16"] | {
    "qwen3-untied-k16": {"two_pass": (1.232, 1.319), "one_pass": (1.005, 1.057)},
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.full if name == "llama-float32" else ()) for name in VARIANTS],
)
def case(request, tmp_path_factory):
    """``(name, engine, draft_lens)``"""
    kwargs = dict(dtype=torch.bfloat16, diff_noise=0.05, vocab_size=700, mask_token_id=699) | VARIANTS[request.param]
    folder = checkpoints.make(tmp_path_factory.mktemp("tiny"), **kwargs)
    engine = Engine.from_pretrained(
        str(folder), device="cpu", mode="two_pass", max_seq_len=256, max_batch_size=6, num_pages=24,
        dtype=kwargs["dtype"], prefix_caching=False,
    )  # fmt: skip
    return request.param, engine, (1, 5, engine.config.block_len - 1)


@pytest.fixture(scope="module")
def folder(case):
    return case[1].config.name


@pytest.fixture
def by_turns(request, case, jobs):
    """In the small grid, some variants run only greedy requests, and the others only sampled ones."""
    greedy = case[0] in ("qwen3-untied-k16", "llama")
    if jobs[1][0].greedy != greedy and not request.config.getoption("--full"):
        pytest.skip("the whole grid: make test-full")


@pytest.fixture(scope="module", params=("greedy", "sampled"))
def jobs(request, case):
    """``(prompts, params, AR alone)``"""
    _, engine, _ = case
    prompts = lossless.random_prompts(engine.config.vocab_size, 6, 120, seed=1)
    params = getattr(lossless, request.param)(6, max_new_tokens=32, ignore_eos=True)
    return prompts, params, decode(engine, prompts, params, replayed=True, mode="ar")


def test_alone(case, jobs):
    """Nearly all cycles are replays."""
    name, engine, draft_lens = case
    for mode in lossless.MODES:
        rates = [lossless.check_alone(engine, *jobs, way, replayed=True) for way in lossless.ways(draft_lens, [mode])]
        pinned, tolerance = of_this_isa(PINNED, 0.01, 0.1)
        assert rates[-1] == pytest.approx(pinned[name][mode][not jobs[1][0].greedy], abs=tolerance), mode


def test_together(case, jobs):
    _, engine, draft_lens = case
    for seed, way in enumerate([dict(mode="ar"), *lossless.ways(draft_lens)]):
        lossless.check_together(engine, *jobs, way, seed)


@pytest.mark.usefixtures("by_turns")
def test_preempted(case, jobs):
    _, engine, draft_lens = case
    for way in (dict(mode="ar"), *lossless.ways(draft_lens[1:])):
        lossless.check_preempted(engine, *jobs, way, num_pages=8)


@pytest.mark.usefixtures("by_turns")
def test_eager_and_replayed(case, jobs):
    """Op by op they give what ``jobs`` and test_alone() got from replays. After that, one_pass is recorded again."""
    _, engine, draft_lens = case
    for way in (dict(mode="ar"), *lossless.ways(draft_lens[-1:])):
        lossless.check_eager(engine, *jobs, way, again=way["mode"] == "one_pass")


def test_prefill(case, monkeypatch):
    lossless.check_prefill(case[1], monkeypatch)


def test_to_the_last_position(case):
    """Decodes to the end of the sequence, its last page and the rotation table, from prompts that nearly fill them."""
    _, engine, draft_lens = case
    prompts = [ids * 255 for ids in lossless.random_prompts(engine.config.vocab_size, 5, 1, seed=4)]
    prompts = [ids[:n] for ids, n in zip(prompts, (255, 254, 250, 241, 192), strict=True)]
    params = lossless.greedy(5, max_new_tokens=1000, ignore_eos=True)
    want = decode(engine, prompts, params, mode="ar")
    assert [len(ids) + len(t.tokens) for ids, t in zip(prompts, want, strict=True)] == [engine.max_seq_len] * 5
    for way in lossless.ways(draft_lens):
        lossless.check_alone(engine, prompts, params, want, way)
        lossless.check_together(engine, prompts, params, want, way)


def test_the_comparison_can_fail(case, jobs):
    """A second run gives the same bits; another position's logits, and another cache, are noticed."""
    prompts, params, want = jobs
    got = decode(case[1], prompts[:1], params[:1], mode="ar")
    assert_same(got, want[:1])
    got[0].logits[7] = got[0].logits[8]
    with pytest.raises(AssertionError, match="the logits of token 7 differ"):
        assert_same(got, want[:1])
    got[0].logits[7], got[0].cache = want[0].logits[7], b""
    with pytest.raises(AssertionError):
        assert_same(got, want[:1])


@pytest.mark.full
@pytest.mark.parametrize("seed", (2, 3))
def test_more_prompts(case, seed):
    """26 prompts per seed, 128 tokens each, half of them sampled: two_pass with every draft_len, the rest with some."""
    _, engine, draft_lens = case
    prompts = lossless.random_prompts(engine.config.vocab_size, 26, 100, seed)
    kwargs = dict(max_new_tokens=128, ignore_eos=True)
    params = lossless.greedy(13, **kwargs) + lossless.sampled(13, **kwargs)
    want = decode(engine, prompts, params, mode="ar")
    every = lossless.ways(range(1, engine.config.block_len), ["two_pass"])
    for way in every + lossless.ways(draft_lens, ["one_pass"]):
        lossless.check_alone(engine, prompts, params, want, way)
    for way in lossless.ways(draft_lens):
        lossless.check_together(engine, prompts, params, want, way, seed)
