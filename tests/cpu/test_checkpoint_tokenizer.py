"""The tokenizer that a checkpoint comes with."""

import json

import pytest
from tokenizers import Tokenizer, models, processors

from orthrus_rt import checkpoint, prompts
from orthrus_rt.checkpoint import CheckpointError
from orthrus_rt.engine import Engine
from tests import checkpoints

CHAT = "{{ bos_token }}{{ messages[0]['content'] }}"


@pytest.fixture
def folder(tmp_path):
    return checkpoints.make(tmp_path / "model")


def saved(folder, processor, settings):
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "<bos>": 1}, unk_token="hello"))
    tokenizer.add_special_tokens(["<bos>"])
    if processor:
        tokenizer.post_processor = processor
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return checkpoint.load(folder).load_tokenizer()


def test_chat_template_comes_along(folder):
    Tokenizer(models.WordLevel({"hello": 0, "<eos>": 1}, unk_token="hello")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = checkpoint.load(folder).load_tokenizer()
    assert tokenizer("hello")["input_ids"] == [0]
    assert tokenizer.eos_token_id == 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("processor", [None, processors.ByteLevel(trim_offsets=False)])
def test_bos_that_transformers_4_put_before_text(folder, kind, processor):
    """It is not added to a chat, whose template writes it."""
    settings = {"tokenizer_class": kind, "add_bos_token": True, "bos_token": "<bos>", "chat_template": CHAT}
    tokenizer = saved(folder, processor, settings)
    assert tokenizer("hello").input_ids == [1, 0] and tokenizer.decode([1, 0], skip_special_tokens=True) == "hello"
    assert prompts.encode(tokenizer, "hello", chat=False) == [1, 0]
    assert prompts.encode(tokenizer, "hello", chat=True) == [1, 0]


@pytest.mark.parametrize(
    "other",
    [
        {"add_bos_token": False},
        {"add_bos_token": None},
        {"add_bos_token": ...},
        {"bos_token": None},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ],
)
def test_no_bos_unless_it_is_asked_for(folder, other):
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<bos>"} | other
    settings = {key: value for key, value in settings.items() if value is not ...}
    assert saved(folder, None, settings)("hello").input_ids == [0]


def test_what_tokenizer_json_adds_stays(folder):
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<bos>"}
    for single, want in (("<bos> $A", [1, 0]), ("$A <bos>", [0, 1])):
        processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 1)])
        assert saved(folder, processor, settings)("hello").input_ids == want


def test_tokenizer_json_alone(folder):
    saved(folder, None, {})
    (folder / "tokenizer_config.json").unlink()
    assert checkpoint.load(folder).load_tokenizer()("hello").input_ids == [0]


def test_none(folder):
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder).load_tokenizer()
    assert str(error.value) == f"{folder}: has no tokenizer.json; pass token ids instead of text"


@pytest.mark.parametrize("content", ("", "{}", "not JSON", '{"model": 5}'))
def test_broken(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder).load_tokenizer()
    assert str(error.value).startswith(f"{folder / 'tokenizer.json'}: transformers cannot read it or a file ")


def test_an_engine_loads_its_tokenizer_once(text_folder):
    engine = Engine.from_pretrained(text_folder, device="cpu", max_seq_len=64)
    assert engine.tokenizer is engine.tokenizer
