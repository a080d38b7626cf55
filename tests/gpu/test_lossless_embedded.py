"""The bitwise guarantee on CUDA, with the embedded model."""

import importlib.util
import os

import pytest

from orthrus_rt import embedded, prompts
from orthrus_rt.engine import Engine
from tests import lossless
from tests.traces import decode

HAS_BASE = embedded.GGUF_VARIABLE in os.environ or importlib.util.find_spec(embedded.GGUF_PACKAGE) is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_BASE, reason=f"needs {embedded.WHEEL}, or {embedded.GGUF_VARIABLE} that names its base"),
]


@pytest.fixture(scope="module", params=("bfloat16", "float32"))
def engine(request):
    with Engine.from_pretrained(
        "smollm2-135m", device="cuda", mode="two_pass", dtype=request.param, max_seq_len=1024, prefix_caching=False
    ) as engine:
        yield engine


def check(engine, params, each, max_new_tokens):
    """Prompts of every kind, alone with three block lengths, then together."""
    ids = [p.encode(engine.tokenizer) for kind in prompts.KINDS for p in prompts.load(kind)[:each]]
    params = getattr(lossless, params)(len(ids), max_new_tokens=max_new_tokens)
    want = decode(engine, ids, params, mode="ar")
    for way in lossless.ways((1, 5, 15)):
        # Over three sets of prompts the CPU gives at least 1.66 and 1.35; a broken drafter about 1.
        least = 1.4 if way["mode"] == "two_pass" else 1.15
        assert lossless.check_alone(engine, ids, params, want, way) > least, way
        lossless.check_together(engine, ids, params, want, way)


@pytest.mark.parametrize("params", ("greedy", "sampled"))
def test_a_prompt_of_each_kind(engine, params):
    check(engine, params, 1, 48)


@pytest.mark.full
@pytest.mark.parametrize("params", ("greedy", "sampled"))
def test_every_prompt(engine, params):
    check(engine, params, None, 128)


def test_tokens_per_cycle(engine):
    """Over all code prompts; the CPU gives 3.43 in bfloat16 and 3.34 in float32."""
    ids = [p.encode(engine.tokenizer) for p in prompts.load("code")]
    params = lossless.greedy(len(ids), max_new_tokens=64)
    want = decode(engine, ids, params, mode="ar")
    assert lossless.check_alone(engine, ids, params, want, dict(mode="two_pass", draft_len=15)) > 3
