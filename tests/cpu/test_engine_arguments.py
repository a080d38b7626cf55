"""What an engine refuses, what the errors say, and what it takes."""

from collections import UserDict

import numpy as np
import pytest
import torch

from orthrus_rt.cycle_plan import cycle_plan
from orthrus_rt.device import pick_device
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints, engines

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(checkpoints.make(tmp_path_factory.mktemp("engine"), vocab_size=24, mask_token_id=23, head_dim=32))


@pytest.fixture(scope="module")
def engine(folder):
    return engines.make(folder, dtype="float32", max_seq_len=512)


def test_what_is_a_batch(engine):
    """Arrays in a list are prompts, integers of any kind are one prompt's ids, and an empty list holds no prompt."""
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    want = engine.generate([1, 2, 3], params).token_ids
    for batch in ([np.array([1, 2, 3])], (torch.tensor([1, 2, 3]),), [(1, 2, 3)]):
        (out,) = engine.generate(batch, params)
        assert out.token_ids == want
    for prompt in (list(np.array([1, 2, 3], dtype=np.int32)), list(torch.tensor([1, 2, 3])), np.array([1, 2, 3])):
        assert engine.generate(prompt, params).token_ids == want
    assert engine.generate([], params) == engine.generate([]) == engine.generate((), []) == []
    with pytest.raises(ValueError, match="params must be one SamplingParams or 0 of them, got 1"):
        engine.generate([], [params])
    for nothing in ([[]], [np.array([], dtype=np.int64)], np.array([], dtype=np.int64)):
        with pytest.raises(ValueError, match=r"prompt_ids(\[0\])? must hold at least one token, got none"):
            engine.generate(nothing, params)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([70000], r"prompt_ids\[2\]\[0\] must be within the vocabulary \[0, 24\), got 70000"),
        (5, r"prompt_ids\[2\] must be a list of ints or a 1-D integer tensor: 'int' object is not iterable"),
        ([1] * 512, r"prompt_ids\[2\] must be shorter than max_seq_len \(512 tokens\), got 512"),
    ],
)
def test_of_a_batch_the_prompt_is_named(engine, wrong, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([PROMPT, PROMPT, wrong])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt_ids must hold at least one token, got none"),
        ([1] * 512, r"prompt_ids must be shorter than max_seq_len \(512 tokens\), got 512"),
        (iter([1] * 512), r"prompt_ids must be shorter than max_seq_len \(512 tokens\), got 512"),
        ([1, 24], r"prompt_ids\[1\] must be within the vocabulary \[0, 24\), got 24"),
        ([-1], r"prompt_ids\[0\] must be within the vocabulary \[0, 24\), got -1"),
        ("12", "prompt_ids must be token ids, got text"),
        ({1, 2}, "prompt_ids must be token ids in their order, got set"),
        (b"12", "prompt_ids must be token ids, got text"),
        (bytearray(b"12"), "prompt_ids must be token ids, got text"),
        (UserDict(input_ids=[1]), "prompt_ids must be token ids, got UserDict; pass its input_ids"),
        ([1.5], "prompt_ids must be a list of ints or a 1-D integer tensor"),
        ([1, True], "prompt_ids must be a list of ints or a 1-D integer tensor, got a bool"),
        ([1, torch.tensor(True)], "prompt_ids must be a list of ints or a 1-D integer tensor, got a bool"),
        (torch.ones(2, dtype=torch.int64, device="meta"), "prompt_ids: a tensor must hold its ids in memory"),
        (torch.ones(2, dtype=torch.int64).to_sparse(), "prompt_ids: a tensor must hold its ids in memory"),
        (torch.ones(2), "a tensor or array must be 1-D and integer"),
        (torch.ones(2, dtype=torch.bool), r"a tensor or array must be 1-D and integer, got torch.bool \[2\]"),
        (torch.ones(1, 2, dtype=torch.int64), "a tensor or array must be 1-D and integer"),
        (np.ones((1, 2), dtype=np.int64), r"a tensor or array must be 1-D and integer, got int64 \[1, 2\]"),
    ],
)
def test_bad_prompts(engine, prompt, message):
    with pytest.raises(ValueError, match=message):
        engine.stream(prompt)


def test_bad_arguments(engine, folder):
    for kwargs, message in [
        ({"draft_len": 8}, r"draft_len must be within \[1, 7\]"),
        ({"draft_len": 0}, r"draft_len must be within \[1, 7\]"),
        ({"mode": "three_pass"}, "mode must be one of auto, ar, two_pass, one_pass, got 'three_pass'"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        ({"max_seq_len": 513}, r"max_seq_len must be within \[2, 512\] \(the positions of this model\), got 513"),
        ({"max_seq_len": 1}, r"max_seq_len must be within \[2, 512\] \(the positions of this model\), got 1"),
        ({"device": "abacus"}, "device must be auto, cpu, cuda or cuda:N, got 'abacus'"),
        ({"device": "meta"}, "device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ({"device": "cpu:3"}, "device must be auto, cpu, cuda or cuda:N, got 'cpu:3'"),
        ({"device": None}, "device must be auto, cpu, cuda or cuda:N, got None"),
        ({"num_pages": 10**15}, r"num_pages must be < 2\*\*31, got 1000000000000000"),
        ({"max_batch_size": 10**30}, r"max_batch_size must be < 2\*\*31, got 1000000"),
        ({"max_batch_size": 2**31 - 1}, r"max_batch_size \* 8 pages must be < 2\*\*31, got 17179869176"),
    ]:
        with pytest.raises(ValueError, match=message):
            Engine.from_pretrained(folder, **({"mode": "two_pass", "device": "cpu"} | kwargs))
    with Engine.from_pretrained(folder, device="cpu", mode="two_pass", dtype=torch.float32) as default:
        assert default.max_seq_len == 512  # the checkpoint's own limit is below 4096
    assert default.closed
    with pytest.raises(ValueError, match=r"prompt_ids\[0\] must be token ids, got UserDict; pass its input_ids"):
        engine.generate([UserDict(input_ids=[1])])
    with pytest.raises(ValueError, match="params must be one SamplingParams for one prompt, got a list of 1"):
        engine.generate(PROMPT, [SamplingParams()])
    for params in ({"stop_token_ids": (3, 24)}, {"logit_bias": {3: 1, 24: 1}}):
        with pytest.raises(
            ValueError, match=rf"{next(iter(params))}: ids must be within the vocabulary .*24\), got 24"
        ):
            engine.stream(PROMPT, SamplingParams(**params))
    for kwargs, message in [
        ({"draft_len": 1.5}, "draft_len must be an integer, got 1.5"),
        ({"draft_len": torch.tensor(True)}, r"draft_len must be an integer, got tensor\(True\)"),
        ({"mode": "one_pass", "fan_out": 2.5}, "fan_out must be an integer, got 2.5"),
        ({"max_batch_size": 2.5}, "max_batch_size must be an integer, got 2.5"),
        ({"max_seq_len": "64"}, "max_seq_len must be an integer, got '64'"),
        ({"num_pages": 9.0}, "num_pages must be an integer, got 9.0"),
        ({"max_batch_size": True}, "max_batch_size must be an integer, got True"),
        ({"prefix_caching": "false"}, "prefix_caching must be True or False, got 'false'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Engine.from_pretrained(folder, **({"mode": "two_pass", "device": "cpu"} | kwargs))
    with pytest.raises(ValueError, match=r"prompt_ids: a tensor or array must be 1-D and integer, got int64 \[2, 2\]"):
        engine.generate(np.array([[3, 4], [5, 6]]), SamplingParams())
    assert engine.generate(np.array([3, 4]), SamplingParams(2, ignore_eos=True)).stats.prompt_tokens == 2
    with pytest.raises(ValueError, match="params must be SamplingParams, got dict"):
        engine.generate(PROMPT, {"temperature": 1.0})
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device is available"):
            pick_device("cuda")


def test_params_that_are_false_are_no_params(engine):
    for params in ({}, 0, ""):
        with pytest.raises(ValueError, match="params must be SamplingParams, got"):
            engine.submit(PROMPT, params)


def test_acceptance_is_checked_at_the_call_and_when_it_is_queued(folder):
    rejection = SamplingParams(4, temperature=0.8, seed=7, acceptance="rejection")
    engine = engines.make(folder, mode="two_pass", max_seq_len=64)
    early = engine._make_request(PROMPT, rejection, None)
    stream = engine.stream(PROMPT, mode="ar")
    next(stream)
    calls = [(engine.check, PROMPT, rejection), (engine.stream, PROMPT, rejection), (engine._queue, early)]
    for call, *what in calls:
        with pytest.raises(ValueError, match="belongs to mode two_pass alone, got mode 'ar'"):
            call(*what)


def test_a_refused_fan_out_names_the_bound_that_holds(engine):
    assert cycle_plan("one_pass", None, 22, engine.config, on_cpu=True).fan_out == 22
    with pytest.raises(ValueError, match=r"within \[1, 22\] for at most 7 drafts per cycle, got 0"):
        cycle_plan("one_pass", None, 0, engine.config, on_cpu=True)
