"""What the published implementation computes on two tiny checkpoints in the official layout: logits of both views,
tokens, and drafts accepted per cycle. On the first checkpoint every cycle accepts one draft whatever the diffusion view
attends to, so only its logits test that view. On the second checkpoint, acceptance does as well.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from orthrus_rt.prefill import prefill_rows
from orthrus_rt.sampling import SamplingParams
from tests import engines
from tests.forward import draft_rows, logits_of

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = ("qwen3-tied-k8", "qwen3-untied-k32-sharded")


@pytest.fixture(scope="module", params=CHECKPOINTS)
def golden(request):
    folder = GOLDEN / request.param
    engine = engines.make(str(folder), dtype="float32", max_seq_len=512)
    return engine, load_file(folder / "expected.safetensors")


def assert_close(got, want):
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("prompt", (0, 1))
def test_ar_logits(golden, prompt):
    engine, want = golden
    ids = want[f"{prompt}.prompt"].flatten().int()
    engine.kv.reserve(0, 512)
    got = logits_of(engine, prefill_rows([(ids.tolist(), 0, 0)], "cpu"))
    engine.kv.release(0)
    assert_close(got, want[f"{prompt}.ar_logits"].reshape(len(ids), -1))


@pytest.mark.parametrize("prompt", (0, 1))
def test_draft_logits(golden, prompt):
    engine, want = golden
    ids = want[f"{prompt}.prompt"].flatten().int()
    block = want[f"{prompt}.draft_block"].flatten().int()
    n, k = len(ids), len(block)
    engine.kv.reserve(0, 512)
    logits_of(engine, prefill_rows([(ids.tolist(), 0, 0)], "cpu"))
    rows = draft_rows(block, n)
    got = logits_of(engine, rows)
    engine.kv.release(0)
    assert_close(got, want[f"{prompt}.draft_logits"].reshape(k, -1))


@pytest.mark.parametrize("prompt", (0, 1))
def test_tokens_and_acceptance(golden, prompt):
    engine, want = golden
    ids = want[f"{prompt}.prompt"].flatten().tolist()
    expected = want[f"{prompt}.generated_no_eos"].flatten().tolist()
    expected = expected[len(ids) :] if expected[: len(ids)] == ids else expected
    params = SamplingParams(max_new_tokens=len(expected), ignore_eos=True)
    accepted, out, before = [], [], []
    for piece in engine.stream(ids, params):
        out += piece.token_ids
        after = list(piece.stats.accepted)
        before += [0] * (len(after) - len(before))
        accepted += [j for j, count in enumerate(after) if count > before[j]]
        before = after
    assert out == expected
    assert accepted == want[f"{prompt}.accepted_per_cycle"].flatten().tolist()
    assert engine.generate(ids, params, mode="ar").token_ids == expected
