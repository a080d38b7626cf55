"""Checkpoint folders: what loads, and one error for each way in which they can be wrong."""

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from orthrus_rt import checkpoint, room, storage
from orthrus_rt.checkpoint import CheckpointError
from orthrus_rt.engine import Engine
from orthrus_rt.model import Model
from tests import checkpoints
from tests.checkpoints import edit, message_of

WEIGHTS = "model.safetensors"
Q_DIFF = "model.layers.1.self_attn.q_proj_diff.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    return checkpoints.make(tmp_path / "model")


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_comes_back_as_stored(tmp_path, family, tied, dtype):
    folder = checkpoints.make(tmp_path, family, dtype=dtype, tie_word_embeddings=tied)
    loaded = checkpoint.load(str(folder))
    stored = load_file(folder / WEIGHTS)
    assert set(loaded.tensors) == set(stored) == set(checkpoint.expected_tensors(loaded.config))
    assert (HEAD in loaded.tensors) is not tied
    for name, tensor in loaded.tensors.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, stored[name])
    assert loaded.tokenizer_dir is None


def test_number_of_tensors_and_config(folder):
    loaded = checkpoint.load(folder)
    assert len(loaded.tensors) == 2 + 2 * (2 + 3 + 2 * 6)
    assert vars(loaded.config) == vars(checkpoints.tiny_config()) | {"name": str(folder)}


def test_shards_hold_the_same_model(tmp_path):
    single = checkpoint.load(checkpoints.make(tmp_path / "single", tie_word_embeddings=False))
    sharded = checkpoint.load(checkpoints.make(tmp_path / "sharded", tie_word_embeddings=False, shards=3))
    assert set(single.tensors) == set(sharded.tensors)
    assert all(torch.equal(single.tensors[name], sharded.tensors[name]) for name in single.tensors)


def test_generation_config_adds_eos_ids(tmp_path):
    folder = checkpoints.make(tmp_path, generation={"eos_token_id": [2, 7]})
    assert checkpoint.load(folder).config.eos_token_ids == (2, 7)


def test_old_rotary_buffers_are_ignored(tmp_path, folder):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    edit(folder, lambda tensors: tensors.update(buffer))
    assert not set(buffer) & set(checkpoint.load(folder).tensors)


def test_tied_head_may_be_stored(folder):
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert HEAD not in checkpoint.load(folder).tensors


def test_tied_head_must_equal_the_embedding(folder):
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
    expected = f"{folder / WEIGHTS}: lm_head.weight must equal model.embed_tokens.weight (config.json: tie_word_embeddi"
    assert message_of(folder).startswith(expected)


def test_tied_head_must_have_the_embedding_shape(folder):
    edit(folder, lambda tensors: tensors.update({HEAD: torch.ones(95, 64)}))
    assert message_of(folder) == f"{folder / WEIGHTS}: lm_head.weight must have shape [96, 64], got [95, 64]"


def test_untied_head_must_be_stored(tmp_path):
    folder = checkpoints.make(tmp_path, tie_word_embeddings=False)
    edit(folder, lambda tensors: tensors.pop(HEAD))
    assert message_of(folder) == f"{folder}: lm_head.weight is missing, expected shape [96, 64]"


def test_missing_tensor(folder):
    edit(folder, lambda tensors: tensors.pop(Q_DIFF))
    assert message_of(folder) == f"{folder}: {Q_DIFF} is missing, expected shape [256, 64]"


def test_missing_tensors_are_counted(folder):
    lost = ("model.layers.0.self_attn.q_norm_diff.weight", Q_DIFF)
    edit(folder, lambda tensors: [tensors.pop(name) for name in lost])
    assert message_of(folder) == f"{folder}: {lost[0]} and 1 other tensors are missing, expected shape [64]"


@pytest.mark.parametrize(
    "extra", ["model.layers.2.self_attn.q_proj_diff.weight", "model.layers.0.self_attn.q_proj.bias", "foo"]
)
def test_extra_tensor(folder, extra):
    edit(folder, lambda tensors: tensors.update({extra: torch.ones(4, 4)}))
    assert message_of(folder) == f"{folder / WEIGHTS}: {extra} is not part of this model"


def test_llama_has_no_qk_norms(tmp_path):
    folder = checkpoints.make(tmp_path, "llama")
    extra = "model.layers.0.self_attn.q_norm_diff.weight"
    edit(folder, lambda tensors: tensors.update({extra: torch.ones(64)}))
    assert message_of(folder) == f"{folder / WEIGHTS}: {extra} is not part of this model"


def test_misshapen_tensor(folder):
    edit(folder, lambda tensors: tensors.update({Q_DIFF: tensors[Q_DIFF].T.contiguous()}))
    assert message_of(folder) == f"{folder / WEIGHTS}: {Q_DIFF} must have shape [256, 64], got [64, 256]"


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.int8])
@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.0.self_attn.q_norm_diff.weight"])
def test_unsupported_dtype(folder, name, dtype):
    edit(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert f"{folder / WEIGHTS}: {name} must be one of F32, F16, BF16, got " in message_of(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf(tmp_path, dtype, value):
    folder = checkpoints.make(tmp_path, dtype=dtype)
    edit(folder, lambda tensors: tensors[Q_DIFF].view(-1)[-1].fill_(value))
    assert message_of(folder) == f"{folder / WEIGHTS}: {Q_DIFF} holds NaN or inf"


def test_largest_fp16_is_no_inf(tmp_path):
    folder = checkpoints.make(tmp_path, dtype=torch.float16)
    edit(folder, lambda tensors: tensors[Q_DIFF].fill_(65504.0))
    assert checkpoint.load(folder).tensors[Q_DIFF].max() == 65504


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_truncated_file(folder, cut):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:cut])
    assert message_of(folder).startswith(f"{path}: is not a whole safetensors file, truncated or corrupt (")


@pytest.mark.parametrize("way", ["renamed", "written", "another size"])
def test_a_file_that_changes_while_it_is_loaded(folder, way):
    """What is read after that would belong to another model than what was read before."""
    path, name = folder / WEIGHTS, "model.norm.weight"
    other = checkpoints.make(folder / "other", seed=1) / WEIGHTS
    if way == "another size":
        edit(other.parent, lambda tensors: tensors.pop(name))
        os.utime(other, ns=(0, path.stat().st_mtime_ns))
    loaded = checkpoint.load(folder)
    loaded.tensors[name]
    if way == "written":
        path.write_bytes(other.read_bytes())
        os.utime(path, ns=(0, other.stat().st_mtime_ns + 1))  # even if the clock is coarse
    else:
        other.rename(path)
    with pytest.raises(CheckpointError) as error:
        loaded.tensors[name]
    assert str(error.value) == f"{path}: has changed since it was opened"


def test_a_file_that_changes_while_it_is_opened(folder, monkeypatch):
    path, other = folder / WEIGHTS, checkpoints.make(folder / "other", num_hidden_layers=1) / WEIGHTS

    def safe_open(*args, **kwargs):
        other.rename(path)
        return safetensors.safe_open(*args, **kwargs)

    monkeypatch.setattr(storage, "safe_open", safe_open)
    assert message_of(folder) == f"{path}: has changed while it was opened"


def test_a_link_to_a_folder_is_followed_once(tmp_path, folder):
    """Versions are often switched by moving such a link."""
    other, link = checkpoints.make(tmp_path / "other", seed=1), tmp_path / "current"
    link.symlink_to(folder)
    loaded = checkpoint.load(link)
    link.unlink()
    link.symlink_to(other)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(loaded.tensors[name], load_file(folder / WEIGHTS)[name])
    assert not torch.equal(loaded.tensors[name], load_file(other / WEIGHTS)[name])


def test_a_file_that_cannot_be_mapped(folder, monkeypatch):
    def safe_open(*_, **__):
        raise RuntimeError("unable to mmap 9 bytes from file <f>: Cannot allocate memory (12)\nException raised from")

    monkeypatch.setattr(storage, "safe_open", safe_open)
    said = "cannot be mapped into memory (unable to mmap 9 bytes from file <f>: Cannot allocate memory (12))"
    assert message_of(folder) == f"{folder / WEIGHTS}: {said}"


def test_a_peft_adapter_is_not_ignored(folder):
    file = folder / "adapter_config.json"
    file.write_text("{}")
    assert message_of(folder) == f"{file}: remove this PEFT adapter's file, once the adapter is merged into the weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_keeps_no_mapping_but_of_the_embedding(folder, dtype):
    """Each would take the whole file's size of the address space, which may be limited."""
    model = Model(checkpoint.load(folder), device="cpu", dtype=dtype, max_seq_len=64)
    assert Path("/proc/self/maps").read_text().count(str(folder / WEIGHTS)) <= 1
    assert model.final_norm.dtype is torch.float32


def test_files_that_are_not_there(tmp_path, folder):
    assert message_of(tmp_path) == f"{tmp_path / 'config.json'}: is missing"
    (folder / WEIGHTS).unlink()
    assert message_of(folder) == (
        f"{folder}: must hold model.safetensors or model.safetensors.index.json, found neither "
        "(only safetensors weights are read)"
    )


def test_a_file_that_cannot_be_opened_is_not_called_missing(folder):
    """safetensors itself reports it as missing, whatever the reason."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        with pytest.raises(CheckpointError) as error:
            storage.scan(folder, WEIGHTS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert str(error.value) == f"{folder / WEIGHTS}: cannot be read (Too many open files)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON ("),
        ("[" * 200_000, "is not valid JSON ("),
        (b"\xff", "is not valid JSON ("),
        ("[]", "must hold a JSON object, got list"),
    ],
)
def test_broken_config(folder, content, message):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message_of(folder).startswith(f"{folder / 'config.json'}: {message}")


def test_a_config_that_cannot_be_read(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert message_of(folder) == f"{folder / 'config.json'}: cannot be read (Is a directory)"


def test_more_layers_than_there_are_tensors(folder):
    """There are so many that their names alone would not fit into memory."""
    with pytest.raises(torch.OutOfMemoryError, match="take at least"):
        many = dataclasses.replace(checkpoint.load_config(str(folder)), num_layers=10**15)
        room.check_weights(many, torch.device("cpu"), torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**15}))
    assert message_of(folder) == (
        f"{folder / 'config.json'}: num_hidden_layers must be at most 36, the number of tensors there, got {10**15}"
    )


@pytest.mark.parametrize("name", ("x" * 5000, "a\0b", "", Path("/no/folder")))
def test_what_names_no_folder(name):
    assert "is neither a folder here, nor a hub id" in message_of(name)


@pytest.mark.parametrize(("stored", "dtype"), [(1e5, "float16"), (-1e5, "float16"), (3.4e38, "bfloat16")])
def test_what_a_dtype_does_not_have(folder, stored, dtype):
    def change(tensors):
        tensors[Q_DIFF] = tensors[Q_DIFF].float() * 0
        tensors[Q_DIFF][0, 0] = stored

    edit(folder, change)
    with pytest.raises(
        CheckpointError, match=f"^{folder}: {Q_DIFF} holds numbers that torch.{dtype} cannot represent$"
    ):
        Engine.from_pretrained(str(folder), device="cpu", dtype=dtype, max_seq_len=64)


class TestShards:
    INDEX = "model.safetensors.index.json"
    SECOND = "model-00002-of-00002.safetensors"

    @pytest.fixture
    def folder(self, tmp_path):
        return checkpoints.make(tmp_path, shards=2)

    def edit_index(self, folder, change):
        index = json.loads((folder / self.INDEX).read_text())
        change(index)
        (folder / self.INDEX).write_text(json.dumps(index))

    def held_by_second(self, folder):
        return sorted(load_file(folder / self.SECOND))[0]

    def test_a_single_file_goes_before_them(self, folder, tmp_path):
        """As in transformers."""
        shutil.copy(checkpoints.make(tmp_path / "single", seed=1) / WEIGHTS, folder)
        single = load_file(folder / WEIGHTS)
        assert torch.equal(checkpoint.load(folder).tensors[EMBEDDING], single[EMBEDDING])

    def test_missing(self, folder):
        (folder / self.SECOND).unlink()
        assert message_of(folder) == f"{folder / self.SECOND}: is missing"

    def test_truncated(self, folder):
        path = folder / self.SECOND
        path.write_bytes(path.read_bytes()[:-8])
        assert message_of(folder).startswith(f"{path}: is not a whole safetensors file")

    def test_tensor_that_the_index_promises(self, folder):
        name = self.held_by_second(folder)
        edit(folder, lambda tensors: tensors.pop(name), self.SECOND)
        expected = f"{folder / self.INDEX}: weight_map puts {name} into {self.SECOND}, which does not hold it"
        assert message_of(folder) == expected

    def test_tensor_that_the_index_puts_elsewhere(self, folder):
        name, first = self.held_by_second(folder), self.SECOND.replace("2-of", "1-of")
        self.edit_index(folder, lambda index: index["weight_map"].update({name: first}))
        assert (
            message_of(folder) == f"{folder / self.INDEX}: weight_map puts {name} into {first}, which does not hold it"
        )

    def test_old_rotary_buffers_that_the_index_lists(self, folder):
        buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
        edit(folder, lambda tensors: tensors.update({buffer: torch.ones(32)}), self.SECOND)
        self.edit_index(folder, lambda index: index["weight_map"].update({buffer: self.SECOND}))
        assert buffer not in checkpoint.load(folder).tensors

    def test_tensor_in_two_shards(self, folder):
        edit(folder, lambda tensors: tensors.update({EMBEDDING: torch.ones(96, 64)}), self.SECOND)
        first = self.SECOND.replace("2-of", "1-of")
        assert message_of(folder) == f"{folder / self.SECOND}: {EMBEDDING} is in {first} too"

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a\0b", 3])
    def test_index_stays_in_its_folder(self, folder, name):
        self.edit_index(folder, lambda index: index["weight_map"].update({EMBEDDING: name}))
        expected = f"{folder / self.INDEX}: weight_map must name files of its own folder, got {name!r}"
        assert message_of(folder) == expected

    @pytest.mark.parametrize("given", [None, {}, ["model.norm.weight"]])
    def test_index_without_map(self, folder, given):
        self.edit_index(folder, lambda index: index.update(weight_map=given))
        expected = f"{folder / self.INDEX}: must hold weight_map, an object of tensor name to file, got {given!r}"
        assert message_of(folder) == expected


def test_a_folder_is_the_one_that_was_there_at_load(text_folder, tmp_path, monkeypatch):
    """A relative path, also one through a link, in a program that changes its folder later."""
    folder = Path(text_folder)
    (tmp_path / "link").symlink_to(folder.parent)
    for start, given in ((folder.parent, folder.name), (tmp_path, f"link/../{folder.parent.name}/{folder.name}")):
        monkeypatch.chdir(start)
        loaded = [checkpoint.load(given) for _ in range(2)]
        want, tokens = loaded[0].load_tokenizer()("hello").input_ids, loaded[0].tensors["model.norm.weight"]
        monkeypatch.chdir("/")
        assert loaded[1].load_tokenizer()("hello").input_ids == want
        assert torch.equal(loaded[1].tensors["model.norm.weight"], tokens)


def test_a_path_that_safetensors_cannot_take(folder, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff")
    shutil.copytree(folder, odd)
    assert message_of(odd).endswith("model.safetensors': must be UTF-8, as safetensors requires of a path")
