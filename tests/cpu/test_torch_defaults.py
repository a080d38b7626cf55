"""A program's default torch dtype and device do not affect an engine: its results stay the same to the bit."""

import contextlib

import pytest
import torch

from orthrus_rt import dispatch
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.hf import OrthrusForCausalLM
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints, engines

PARAMS = [
    SamplingParams(8, ignore_eos=True),
    SamplingParams(8, temperature=0.9, top_p=0.9, min_p=0.01, seed=3, ignore_eos=True),
    SamplingParams(8, repetition_penalty=1.3, logit_bias={5: 1.7}, min_tokens=3),
    SamplingParams(8, temperature=0.7, seed=4, presence_penalty=0.3, frequency_penalty=0.3, ignore_eos=True),
]
PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
REJECTION = SamplingParams(8, temperature=0.8, top_k=10, seed=7, ignore_eos=True, acceptance="rejection")


@contextlib.contextmanager
def defaults(dtype, device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def decoded(folder, how, mode):
    engine = engines.make(folder, mode=mode, max_seq_len=64, max_batch_size=4, draft_len=2, **how)
    if mode == "auto":
        engine.warmup()
    outs = engine.generate(PROMPTS, PARAMS)
    outs += [engine.generate([1, 2], REJECTION)] if mode == "two_pass" else []
    cycles = [out.stats.cycles for out in outs if mode != "auto"]  # auto decides by measured times
    return [out.token_ids for out in outs], cycles, engine.next_logits([1, 2, 3]).tolist()


@pytest.fixture(params=("native", "reference"))
def how(request):
    """Native kernels, or the plain torch reference in float16."""
    if request.param == "native" and dispatch.extension() is None:
        pytest.skip("the native module is not built")
    return {"dtype": "bfloat16" if request.param == "native" else "float16"}


@pytest.mark.parametrize("mode", (*MODES, "auto"))
def test_the_usual_tokens(folder, how, mode, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    want = decoded(folder, how, mode)
    with defaults(torch.bfloat16, "meta"):
        assert decoded(folder, how, mode) == want


@pytest.mark.parametrize("rope_type", ("linear", "yarn", "llama3"))
def test_scaled_positions_too(tmp_path, rope_type):
    factors = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factors = factors if rope_type == "llama3" else {"factor": 4.0}
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "original_max_position_embeddings": 128} | factors
    folder = str(checkpoints.make(tmp_path, rope_parameters=rope))
    want = engines.make(folder, max_seq_len=64).model.cos_sin
    with defaults(torch.bfloat16, "meta"):
        assert torch.equal(engines.make(folder, max_seq_len=64).model.cos_sin, want)


def test_the_published_call_too(text_folder):
    def sample():
        model = OrthrusForCausalLM.from_pretrained(text_folder, device_map="cpu", max_seq_len=64)
        torch.manual_seed(1)
        return model.generate(torch.tensor([[7, 8]], device="cpu"), max_new_tokens=8, temperature=1.0).tolist()

    want = sample()
    with defaults(torch.bfloat16, "meta"):
        assert sample() == want


@pytest.mark.parametrize("cast_to", (torch.float16, torch.bfloat16))
def test_nor_does_autocast_reach_it(folder, how, cast_to):
    want = decoded(folder, how, "two_pass")
    with torch.autocast("cpu", dtype=cast_to):
        assert decoded(folder, how, "two_pass") == want
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == cast_to  # autocast still applies to the program itself
