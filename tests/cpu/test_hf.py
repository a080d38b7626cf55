"""The interface that users of the published code know."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, TextStreamer

from orthrus_rt import SamplingParams, hf
from orthrus_rt.checkpoint import EMBEDDED_NAME
from orthrus_rt.hf import LEAST_TEMPERATURE, OrthrusForCausalLM
from orthrus_rt.outputs import RequestOutput, Stats

pytestmark = pytest.mark.usefixtures("paced")


@pytest.fixture(scope="module")
def folder(text_folder):
    return text_folder


@pytest.fixture(scope="module")
def model(text_folder):
    return OrthrusForCausalLM.from_pretrained(
        text_folder, dtype=torch.bfloat16, device_map="cpu", max_seq_len=128, trust_remote_code=True
    ).eval()


@pytest.fixture
def input_ids(model):
    return torch.tensor([model.tokenizer("hello").input_ids])


class Recorder:
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value)

    def end(self):
        self.calls.append("end")


@pytest.mark.parametrize(
    ("model", "loads"), [("owner/name", "owner/name@v2"), (EMBEDDED_NAME, EMBEDDED_NAME), (".", "."), ("./no", "./no")]
)
def test_a_revision_is_of_hub_ids(monkeypatch, model, loads):
    asked = []
    monkeypatch.setattr(hf.Engine, "from_pretrained", lambda model, **_: asked.append(model))
    OrthrusForCausalLM.from_pretrained(model, revision="v2")
    assert asked == [loads]


def test_its_engine_makes_no_room_for_modes_that_it_does_not_run(model):
    assert model.engine.mode == "two_pass" and not model.engine._autos


def test_returns_prompt_and_new_tokens(model, input_ids):
    want = model.engine.generate(input_ids[0], SamplingParams(max_new_tokens=20), mode="ar").token_ids
    for diffusion in (True, False):
        out = model.generate(input_ids=input_ids, max_new_tokens=20, use_diffusion_mode=diffusion)
        assert out.dtype == torch.int64 and out.tolist() == [input_ids[0].tolist() + want]
    for fewer in (None, 1):  # max_length goes before it
        assert model.generate(input_ids, max_new_tokens=fewer, max_length=12).shape == (1, 12)


def test_streamer_gets_prompt_tokens_and_end(model, input_ids):
    recorder = Recorder()
    out = model.generate(input_ids, max_new_tokens=20, streamer=recorder)
    prompt, *pieces, end = recorder.calls
    assert torch.equal(prompt, input_ids) and end == "end" and len(pieces) < 20
    assert torch.cat(pieces).tolist() == out[0, input_ids.shape[1] :].tolist()


def test_text_streamer_prints_the_text(model, input_ids, capsys):
    streamer = TextStreamer(model.tokenizer, skip_prompt=True)
    out = model.generate(input_ids, max_new_tokens=20, streamer=streamer)
    assert capsys.readouterr().out == model.tokenizer.decode(out[0, input_ids.shape[1] :]) + "\n"


def test_eos_token_id_replaces_the_checkpoints_own(model, input_ids):
    tokens = model.generate(input_ids, max_new_tokens=20, eos_token_id=-1 % 2**31)[0, input_ids.shape[1] :].tolist()
    for eos in (tokens[3], [tokens[3], 10**6]):
        out = model.generate(input_ids, max_new_tokens=20, eos_token_id=eos)
        assert out[0, input_ids.shape[1] :].tolist() == tokens[: tokens.index(tokens[3]) + 1]


@pytest.mark.parametrize(("eos", "stop"), [(0, (0,)), ([], ()), ([3, 0], (3, 0)), (None, ())])
def test_whatever_end_of_sequence_ids_are_given_replace_the_checkpoints_own(model, eos, stop):
    """Including 0, and no ids at all."""
    params = model._params(5, 8, None, 0.0, None, None, eos)
    assert (params.stop_token_ids, params.ignore_eos) == (stop, eos is not None)


def test_an_end_of_sequence_id_beyond_the_vocabulary_never_comes(model, input_ids):
    for never in (model.config.vocab_size, -1, torch.tensor([-1, 2**40])):  # as transformers accepts them
        out = model.generate(input_ids, max_length=128, eos_token_id=never)
        assert out.shape == (1, 128)  # all that there is room for


def test_manual_seed_makes_sampling_repeatable(model, input_ids):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(input_ids, max_new_tokens=20, temperature=1.0, top_k=None, top_p=None).tolist()

    assert sample(1) == sample(1) != sample(2)


def test_mask_of_ones_and_pad_id_are_tolerated(model, input_ids):
    out = model.generate(input_ids, max_new_tokens=4, attention_mask=torch.ones_like(input_ids), pad_token_id=0)
    assert torch.equal(out, model.generate(input_ids, max_new_tokens=4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_beams": 2, "max_new_tokens": 4}, TypeError, r"generate\(\) got an unexpected .* 'num_beams'"),
        ({"do_sample": True, "max_new_tokens": 4}, ValueError, "do_sample must be False at temperature 0.0, got True"),
        (
            {"do_sample": False, "max_new_tokens": 4, "temperature": 0.5},
            ValueError,
            "do_sample must be True at temperature 0.5, got False",
        ),
        ({"max_new_tokens": 4, "attention_mask": [[0, 1, 1, 1, 1]]}, ValueError, "must be all ones"),
        ({}, ValueError, "max_new_tokens or max_length must be given"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1, got 0"),
        ({"max_length": 0}, ValueError, "max_new_tokens or max_length must be given"),
        ({"max_length": 5}, ValueError, "max_length must exceed the prompt's 5 tokens, got 5"),
        ({"max_new_tokens": 124}, ValueError, "129 tokens in all exceed max_seq_len 128"),
        ({"max_new_tokens": 4, "attention_mask": [[1, 1, 1]]}, ValueError, r"of shape \[1, 5\], got \[1, 3\]"),
        ({"max_new_tokens": 4, "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, ValueError, "must be all ones"),
        ({"max_new_tokens": 4, "top_p": 0.0}, ValueError, "top_p"),
        ({"max_new_tokens": 4, "temperature": -1e-6}, ValueError, "temperature"),
        ({"max_new_tokens": 4, "temperature": None, "do_sample": False}, ValueError, "temperature must be a number"),
        ({"max_length": "20"}, ValueError, "max_length must be an integer, got '20'"),
        (
            {"max_new_tokens": 4, "eos_token_id": True},
            ValueError,
            "stop_token_ids must be a list of integers, got True",
        ),
        ({"max_new_tokens": 4, "attention_mask": [[2, 2, 2, 2, 2]]}, ValueError, "got other values"),
    ],
)
def test_errors(model, input_ids, arguments, error, message):
    with pytest.raises(error, match=message):
        model.generate(input_ids, **arguments)


def test_whatever_a_tokenizer_returns(model):
    """Its output itself, or lists or arrays of it."""
    batch = model.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt")
    want = model.generate(input_ids=batch.input_ids, max_new_tokens=6)
    for prompt in (batch, dict(batch), batch.input_ids.tolist(), batch.input_ids.numpy()):
        out = model.generate(prompt, max_new_tokens=6)
        assert torch.equal(out, want) and out.dtype == torch.int64
    mask = batch.attention_mask.tolist()
    assert torch.equal(model.generate(batch.input_ids.int(), max_new_tokens=6, attention_mask=mask), want)
    masked = {"input_ids": batch.input_ids, "attention_mask": 0 * batch.attention_mask}
    assert torch.equal(model.generate(masked, max_new_tokens=6, attention_mask=mask), want)
    with pytest.raises(ValueError, match="attention_mask must be all ones"):
        model.generate(masked, max_new_tokens=6)
    for nothing in ("text", None, [[1], [2, 3]], {"ids": [[1]]}):
        with pytest.raises(ValueError, match=r"generate: input_ids must be integers of shape \[1, n\], got "):
            model.generate(nothing, max_new_tokens=6)


def test_arguments_in_the_published_order():
    """``generate`` of src/model.py, github.com/chiennv2000/orthrus."""
    published = (
        "self input_ids max_new_tokens max_length temperature top_k top_p eos_token_id streamer use_diffusion_mode"
    )
    parameters = inspect.signature(OrthrusForCausalLM.generate).parameters.values()
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == published.split()


def test_what_the_published_code_takes_as_off(model, input_ids):
    greedy = model.generate(input_ids, max_new_tokens=8)
    for off in ({"temperature": 9e-6}, {"temperature": 9e-6, "do_sample": False}, {"max_length": 0}):
        assert torch.equal(model.generate(input_ids, max_new_tokens=8, **off), greedy)

    def sample(**filters):
        torch.manual_seed(1)
        return model.generate(input_ids, max_new_tokens=8, temperature=2.0, **filters).tolist()

    assert sample(top_k=-1, top_p=1.5) == sample(top_k=None, top_p=None) != sample()


def test_what_says_the_same_is_accepted(model, input_ids):
    want = model.generate(input_ids, max_new_tokens=20)
    assert torch.equal(model.generate(input_ids, max_new_tokens=20, do_sample=False), want)
    assert torch.equal(model.generate(input_ids, max_new_tokens=20, do_sample=0), want)
    for temperature in (1.0, LEAST_TEMPERATURE):
        assert model.generate(input_ids, max_new_tokens=4, do_sample=True, temperature=temperature).shape == (1, 9)
    eos, kinds = int(want[0, 8]), (int, np.int64, np.array, torch.tensor)
    ends = [model.generate(input_ids, max_new_tokens=20, eos_token_id=kind(eos)) for kind in kinds]
    assert all(torch.equal(out, ends[0]) for out in ends) and ends[0].shape[1] <= 9


def test_a_failure_before_the_first_token_sends_the_streamer_nothing(model, input_ids, monkeypatch):
    def stream(*_, **__):
        yield RequestOutput("x", [], "error", Stats("", 0, 0))
        raise FloatingPointError("no logit is above -inf")

    monkeypatch.setattr(model.engine, "stream", stream)
    recorder = Recorder()
    with pytest.raises(FloatingPointError):
        model.generate(input_ids, max_new_tokens=4, streamer=recorder)
    assert len(recorder.calls) == 1  # the prompt


def test_a_streamer_that_fails_ends_the_request(model, input_ids):
    takes_the_prompt_alone = SimpleNamespace(put=lambda ids: 1 / (ids.dim() - 1))
    with pytest.raises(ZeroDivisionError) as error:
        model.generate(input_ids, max_new_tokens=20, streamer=takes_the_prompt_alone)
    assert error.traceback  # which keeps the stream alive, so only closing it ends the request
    assert not model.engine.has_unfinished()


def test_greedy_decoding_draws_no_seed(model, input_ids):
    before = torch.get_rng_state()
    model.generate(input_ids, max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_prompt_at_a_time(model):
    with pytest.raises(ValueError, match=r"input_ids must have shape \[1, n\], got \[2, 3\]"):
        model.generate(torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=4)


def test_the_published_quickstart(text_folder, capsys):
    model = OrthrusForCausalLM.from_pretrained(
        text_folder,
        dtype=torch.bfloat16,
        device_map="cpu",
        attn_implementation="flash_attention_2",
        trust_remote_code=True,
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Count the words of a paragraph."}]
    input_ids = tokenizer.apply_chat_template(
        messages, return_tensors="pt", add_generation_prompt=True, enable_thinking=False
    ).input_ids
    output_ids = model.generate(
        input_ids=input_ids.to(model.device), max_new_tokens=20, use_diffusion_mode=True,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )  # fmt: skip
    assert output_ids.shape[1] > input_ids.shape[1]
    assert capsys.readouterr().out == tokenizer.decode(output_ids[0, input_ids.shape[1] :]) + "\n"


def test_from_pretrained_refuses_what_it_cannot_honour():
    with pytest.raises(TypeError, match="quantization_config is not supported; supported are dtype"):
        OrthrusForCausalLM.from_pretrained("x", quantization_config={})
    with pytest.raises(TypeError, match="torch_dtype is not supported; its name is dtype"):
        OrthrusForCausalLM.from_pretrained("x", torch_dtype=torch.bfloat16)
    for device_map in ({"model": 0, "lm_head": 1}, {"": "cpu", "lm_head": "cpu"}, {}, None, True):
        with pytest.raises(ValueError, match="device_map must name one device"):
            OrthrusForCausalLM.from_pretrained("x", device_map=device_map)
    with pytest.raises(ValueError, match="dtype must be one of"):
        OrthrusForCausalLM.from_pretrained("x", dtype=torch.int8)


@pytest.mark.parametrize(
    ("device_map", "device"),
    [("cpu", "cpu"), ({"": "cpu"}, "cpu"), ({"": 1}, "cuda:1"), (0, "cuda:0"), ({"": torch.device("cuda")}, "cuda")],
)
def test_a_device_map_of_one_device(monkeypatch, device_map, device):
    asked = []
    monkeypatch.setattr(hf.Engine, "from_pretrained", lambda _, *, device, **__: asked.append(device))
    OrthrusForCausalLM.from_pretrained("x", device_map=device_map)
    assert asked == [device]


def test_dtype_auto_is_bfloat16(monkeypatch):
    asked = []
    monkeypatch.setattr(hf.Engine, "from_pretrained", lambda _, *, dtype, **__: asked.append(dtype))
    OrthrusForCausalLM.from_pretrained("x", dtype="auto")
    assert asked == ["bfloat16"]


def test_a_model_stays_where_it_is(model, monkeypatch):
    assert model.to("cpu") is model.to(torch.device("cpu")) is model.to(device="cpu:0") is model
    monkeypatch.setattr(hf, "pick_device", torch.device)
    with pytest.raises(ValueError, match=r"to: device must be cpu, where device_map has put it, got cuda:1"):
        model.to("cuda:1")
    with pytest.raises(ValueError, match=r"to: dtype must be passed to from_pretrained, got torch\.float32"):
        model.to(torch.float32)


def test_a_model_can_be_closed(text_folder):
    model = OrthrusForCausalLM.from_pretrained(text_folder, device_map="cpu", max_seq_len=64)
    for _ in range(2):
        model.close()
    with pytest.raises(RuntimeError, match="this engine is closed"):
        model.generate([[1, 2]], max_new_tokens=1)
    with pytest.raises(RuntimeError, match="this engine is closed"):
        print(model.dtype)


def test_arguments_reach_the_engine(model, input_ids, monkeypatch):
    asked, real = [], model.engine.stream

    def stream(ids, params, **kwargs):
        asked.append((params, kwargs))
        return real(ids, params, **kwargs)

    monkeypatch.setattr(model.engine, "stream", stream)
    model.generate(input_ids, max_new_tokens=4, temperature=0.7)
    model.generate(input_ids, max_new_tokens=40, max_length=input_ids.shape[1] + 3, temperature=0.7, top_k=5, top_p=0.5,
                   eos_token_id=7, use_diffusion_mode=False)  # fmt: skip
    (by_default, how), (given, how_given) = asked
    assert (by_default.max_new_tokens, by_default.temperature, by_default.top_k, by_default.top_p) == (4, 0.7, 20, 0.8)
    assert (by_default.stop_token_ids, by_default.ignore_eos, how["mode"]) == ((), False, "two_pass")
    assert (given.max_new_tokens, given.temperature, given.top_k, given.top_p) == (3, 0.7, 5, 0.5)
    assert (given.stop_token_ids, given.ignore_eos, how_given["mode"]) == ((7,), True, "ar")
    assert model.engine.runner.num_slots == 1
