"""Hub ids: which files are fetched, when nothing is fetched, and what is used offline."""

import json
import re
import shutil

import huggingface_hub
import pytest

from orthrus_rt import checkpoint, info
from orthrus_rt.engine import Engine
from tests import checkpoints
from tests.checkpoints import message_of


@pytest.fixture
def folder(tmp_path):
    return checkpoints.make(tmp_path / "model")


@pytest.mark.parametrize(
    "elsewhere", ["original/params.json", "5/model.safetensors", "training.json", "consolidated.safetensors"]
)
def test_what_a_checkpoint_does_not_need_may_be_missing(monkeypatch, folder, tmp_path, elsewhere):
    """Offline, by the hub's own client, which knows all files of the repository."""
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


def test_weights_in_subfolders_are_not_fetched():
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
def test_id_is_fetched(monkeypatch, folder, name, revision):
    asked = []

    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
        asked.append((repo_id, revision, allow_patterns, ignore_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert checkpoint.load(name).config.name == name
    assert asked == [("owner/model", revision, checkpoint.HUB_PATTERNS, checkpoint.NO_HUB_PATTERNS)]


@pytest.mark.parametrize("adapter", [None, "owner/view"])
@pytest.mark.parametrize("is_here", ["no", "whole", "config.json", "model.safetensors"])
def test_info_fetches_no_weights(monkeypatch, folder, tmp_path, is_here, adapter):
    """Nothing at all is fetched if a snapshot is here, as its name would move to one without weights."""
    asked = []

    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns, local_files_only=False):
        if local_files_only and is_here == "no":
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        asked.append((repo_id, allow_patterns, local_files_only))
        files = tmp_path / repo_id.replace("/", "-")
        files.mkdir(exist_ok=True)
        if not local_files_only or is_here != "model.safetensors":
            (files / "config.json").write_bytes((folder / "config.json").read_bytes())
        if is_here in ("whole", "model.safetensors"):
            (files / "model.safetensors").touch()
        return str(files)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    facts = info.collect(device="cpu", dtype="bfloat16", model="owner/base", adapter=adapter)["model"]
    assert facts == info.model_facts(str(folder), None, None) | {"name": "owner/base"}
    ways = [] if is_here == "no" else [(checkpoint.HUB_PATTERNS, True)]
    ways += [] if is_here == "whole" else [(checkpoint.CONFIG_FILES, False)]
    assert asked == [(name, *way) for name in ("owner/base", adapter) if name for way in ways]


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"block_size": None}, {}, "it is a plain base model: pass adapter=FOLDER"),
        ({"model_type": "gpt2"}, {}, "gpt2"),
        ({}, {"mode": "two-pass"}, "mode must be one of auto, ar, two_pass, one_pass, got 'two-pass'"),
        ({}, {"draft_len": 99}, "draft_len must be within"),
        ({}, {"max_seq_len": 10**9}, "max_seq_len"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1e-300}}, {}, "rope parameters must give"),
        ({"head_dim": 2}, {}, "head_dim must be a multiple of"),
    ],
)
def test_no_weights_are_fetched_for_what_cannot_run(monkeypatch, folder, tmp_path, change, options, said):
    config = json.loads((folder / "config.json").read_text()) | change
    files = tmp_path / "fetched"
    files.mkdir()
    (files / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns, local_files_only=False):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        assert allow_patterns == ["config.json", "generation_config.json", "adapter_config.json"]
        return str(files)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=re.escape(said)):
        Engine.from_pretrained("owner/model", device="cpu", **options)


def test_info_of_a_base(monkeypatch, folder):
    """For a model of another family a view would not help, so the message does not mention one."""
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


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert message_of("owner/model").startswith(
        "'owner/model': is no folder here and could not be fetched from the Hugging Face hub (LocalEntryNotFound"
    )


def test_any_failure_is_one_error(monkeypatch):
    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
        raise ConnectionResetError("the line broke\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert message_of("owner/model").endswith("hub (ConnectionResetError: the line broke and more)")


@pytest.mark.parametrize("name", ["smollm", "./missing", "a/b/c", "/no/folder", "owner/", "owner/model@"])
def test_neither_folder_nor_id(name):
    expected = f"{name!r}: is neither a folder here, nor a hub id (owner/name), nor 'smollm2-135m'"
    assert message_of(name) == expected


def test_a_folder_here_goes_before_an_id(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    assert [checkpoint.is_hub_id(name) for name in ("owner/model", "owner/other")] == [False, True]
    assert info.model_facts("owner/model", None, None)["block_len"] == 8


def test_a_snapshot_in_a_cache_by_a_relative_path(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: folder.name)
    monkeypatch.chdir(folder.parent)
    loaded = checkpoint.load("owner/model")
    monkeypatch.chdir("/")
    assert loaded.tensors["model.norm.weight"].shape == (64,)
