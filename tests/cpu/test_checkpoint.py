"""Checkpoint folders and hub ids: what loads, and the one error for each way in which they can be wrong."""

import dataclasses
import json
import os
import re
import resource
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from orthrus_rt import checkpoint, info, room, storage
from orthrus_rt.checkpoint import CheckpointError
from orthrus_rt.engine import Engine
from tests import checkpoints

WEIGHTS = "model.safetensors"
Q_DIFF = "model.layers.1.self_attn.q_proj_diff.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    return checkpoints.make(tmp_path / "model")


def edit(folder, change, file=WEIGHTS):
    """Apply ``change`` to the dictionary of tensors in ``file``."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def message_of(*args, **kwargs):
    with pytest.raises(CheckpointError) as error:
        loaded = checkpoint.load(*args, **kwargs)
        for name in loaded.tensors:
            loaded.tensors[name]
    return str(error.value)


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
def test_unsupported_dtype(folder, dtype):
    edit(folder, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].to(dtype)}))
    assert f"{folder / WEIGHTS}: {EMBEDDING} must be one of F32, F16, BF16, got " in message_of(folder)


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


def test_a_file_that_changes_behind_its_header(folder):
    path, name = folder / WEIGHTS, "model.norm.weight"
    loaded = checkpoint.load(folder)
    edit(folder, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(checkpoint.CheckpointError) as error:
        loaded.tensors[name]
    said = f"{path}: has changed since it was opened: "
    assert str(error.value) == f"{said}{name} was of shape [64], got [3]"
    edit(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(checkpoint.CheckpointError, match=re.escape(said[:-2])):
        loaded.tensors[name]


def test_files_that_are_not_there(tmp_path, folder):
    assert message_of(tmp_path) == f"{tmp_path / 'config.json'}: is missing"
    (folder / WEIGHTS).unlink()
    assert message_of(folder) == (
        f"{folder}: must hold model.safetensors or model.safetensors.index.json, found neither "
        "(only safetensors weights are read)"
    )


def test_a_file_that_cannot_be_opened_is_not_called_missing(folder):
    """safetensors itself says so, whatever the reason."""
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


def test_more_layers_than_there_are_tensors(folder):
    """So many that their names alone would not fit into memory."""
    with pytest.raises(torch.OutOfMemoryError, match="take at least"):
        many = dataclasses.replace(checkpoint.load_config(str(folder)), num_layers=10**15)
        room.check_weights(many, torch.device("cpu"), torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**15}))
    assert message_of(folder) == (
        f"{folder / 'config.json'}: num_hidden_layers must be at most 36, the number of tensors there, got {10**15}"
    )


@pytest.mark.parametrize("name", ("x" * 5000, "a\0b", ""))
def test_what_names_no_folder(name):
    assert "is neither a folder here, nor a hub id" in message_of(name)


@pytest.mark.parametrize(("stored", "dtype"), [(1e5, "float16"), (3.4e38, "bfloat16")])
def test_what_a_dtype_does_not_have(folder, stored, dtype):
    edit(folder, lambda tensors: tensors.update({Q_DIFF: tensors[Q_DIFF].float() * 0 + stored}))
    with pytest.raises(CheckpointError, match=f"^{folder}: {Q_DIFF} holds numbers that torch.{dtype} does not have$"):
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

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 3])
    def test_index_stays_in_its_folder(self, folder, name):
        self.edit_index(folder, lambda index: index["weight_map"].update({EMBEDDING: name}))
        expected = f"{folder / self.INDEX}: weight_map must name files of its own folder, got {name!r}"
        assert message_of(folder) == expected

    def test_index_without_map(self, folder):
        self.edit_index(folder, lambda index: index.pop("weight_map"))
        assert message_of(folder).startswith(f"{folder / self.INDEX}: must hold weight_map, an object of tensor name")


class TestHub:
    @pytest.mark.parametrize(
        "elsewhere", ["original/params.json", "5/model.safetensors", "training.json", "consolidated.safetensors"]
    )
    def test_what_a_checkpoint_does_not_need_may_be_missing(self, monkeypatch, folder, tmp_path, elsewhere):
        """Offline, by the hub's own client, which knows all of the repository's files."""
        tree_cache = pytest.importorskip("huggingface_hub._tree_cache", reason="an older client lists no files")
        revision = "0123456789abcdef0123456789abcdef01234567"
        repo = tmp_path / "models--owner--model"
        here = shutil.copytree(folder, repo / "snapshots" / revision)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(revision)
        entry = tree_cache.TreeCacheEntry(size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
        files = [*(path.name for path in here.iterdir()), elsewhere]
        tree_cache.write_tree_cache(str(repo), revision, dict.fromkeys(files, entry))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        assert checkpoint.load("owner/model").config.name == "owner/model"
        assert checkpoint.load_config("owner/model") == checkpoint.load("owner/model").config
        for needed in ("config.json", "model.safetensors"):
            (here / needed).rename(tmp_path / needed)
            with pytest.raises(checkpoint.CheckpointError, match=r"IncompleteSnapshotError: .* are missing"):
                checkpoint.load("owner/model")
            (tmp_path / needed).rename(here / needed)

    def test_weights_in_subfolders_are_not_fetched(self):
        files = ["config.json", "model.safetensors", "original/model.safetensors", "a/b/c.json", "chat_template.jinja",
                 "model-00001-of-00002.safetensors", "model.safetensors.index.json", "consolidated.00.safetensors",
                 "tokenizer.json", "tokenizer_config.json", "README.md", "pytorch_model.bin"]  # fmt: skip
        how = dict(allow_patterns=checkpoint.HUB_PATTERNS, ignore_patterns=checkpoint.NO_HUB_PATTERNS)
        chosen = huggingface_hub.utils.filter_repo_objects(files, **how)
        assert list(chosen) == [
            "config.json", "model.safetensors", "chat_template.jinja", "model-00001-of-00002.safetensors",
            "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip

    @pytest.mark.parametrize(("name", "revision"), [("owner/model", None), ("owner/model@refs/pr/1", "refs/pr/1")])
    def test_id_is_fetched(self, monkeypatch, folder, name, revision):
        asked = []

        def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
            asked.append((repo_id, revision, allow_patterns, ignore_patterns))
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert checkpoint.load(name).config.name == name
        assert asked == [("owner/model", revision, checkpoint.HUB_PATTERNS, checkpoint.NO_HUB_PATTERNS)]

    @pytest.mark.parametrize("adapter", [None, "owner/view"])
    @pytest.mark.parametrize("is_here", ["no", "whole", "config.json"])
    def test_info_fetches_no_weights(self, monkeypatch, folder, tmp_path, is_here, adapter):
        """Nor anything, where a snapshot is here: its name would move to what has no weights here."""
        asked = []

        def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns, local_files_only=False):
            if local_files_only and is_here == "no":
                raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
            asked.append((repo_id, allow_patterns, local_files_only))
            files = tmp_path / repo_id.replace("/", "-")
            files.mkdir(exist_ok=True)
            (files / "config.json").write_bytes((folder / "config.json").read_bytes())
            if is_here == "whole":
                (files / "model.safetensors").touch()
            return str(files)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        facts = info.collect(device="cpu", dtype="bfloat16", model="owner/base", adapter=adapter)["model"]
        assert facts == info.model_facts(str(folder), None, None) | {"name": "owner/base"}
        ways = [] if is_here == "no" else [(checkpoint.HUB_PATTERNS, True)]
        ways += [] if is_here == "whole" else [(["config.json", "generation_config.json"], False)]
        assert asked == [(name, *way) for name in ("owner/base", adapter) if name for way in ways]

    @pytest.mark.parametrize(
        ("change", "options", "said"),
        [
            ({"block_size": None}, {}, "it is a plain base model: pass adapter=FOLDER"),
            ({"model_type": "gpt2"}, {}, "gpt2"),
            ({}, {"mode": "two-pass"}, "mode must be auto, ar, two_pass, one_pass, got 'two-pass'"),
            ({}, {"draft_len": 99}, "draft_len must be within"),
            ({}, {"max_seq_len": 10**9}, "max_seq_len"),
            ({"rope_parameters": {"rope_type": "linear", "factor": 1e-300}}, {}, "rope parameters must give"),
        ],
    )
    def test_no_weights_are_fetched_for_what_cannot_run(self, monkeypatch, folder, tmp_path, change, options, said):
        config = json.loads((folder / "config.json").read_text()) | change
        files = tmp_path / "fetched"
        files.mkdir()
        (files / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

        def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns, local_files_only=False):
            if local_files_only:
                raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
            assert allow_patterns == ["config.json", "generation_config.json"]
            return str(files)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(ValueError, match=re.escape(said)):
            Engine.from_pretrained("owner/model", device="cpu", **options)

    def test_info_of_a_base(self, monkeypatch, folder):
        """A view would not help another family: nothing is said of one then."""
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
        config = json.loads((folder / "config.json").read_text())
        del config["block_size"]
        (folder / "config.json").write_text(json.dumps(config))
        told = info.collect(device="cpu", dtype="bfloat16", model="owner/base")["model"]["error"]
        assert told.startswith(f"{folder}: holds no diffusion view, it is a plain base model: pass adapter=FOLDER")
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
        for adapter in (None, "owner/view"):
            facts = info.collect(device="cpu", dtype="bfloat16", model="owner/base", adapter=adapter)["model"]
            assert "gpt2" in facts["error"] and "view" not in facts["error"]

    def test_offline(self, monkeypatch, tmp_path):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        assert message_of("owner/model").startswith(
            "'owner/model': is no folder here and could not be fetched from the Hugging Face hub (LocalEntryNotFound"
        )

    def test_any_failure_is_one_error(self, monkeypatch):
        def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
            raise ConnectionResetError("the line broke\nand more")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert message_of("owner/model").endswith("hub (ConnectionResetError: the line broke and more)")

    @pytest.mark.parametrize("name", ["smollm", "./missing", "a/b/c", "/no/folder", "owner/", "owner/model@"])
    def test_neither_folder_nor_id(self, name):
        expected = f"{name!r}: is neither a folder here, nor a hub id (owner/name), nor 'smollm2-135m'"
        assert message_of(name) == expected


def test_a_folder_is_the_one_that_was_there_at_load(text_folder, tmp_path, monkeypatch):
    """A relative path, through a link too, in a program that goes elsewhere."""
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
    assert message_of(odd).endswith("model.safetensors': is no UTF-8, which safetensors needs of a path")
