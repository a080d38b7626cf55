"""A plain base and a diffusion view in a folder of its own: what fits together, and what is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthrus_rt import checkpoint
from orthrus_rt.checkpoint import CheckpointError
from tests import checkpoints
from tests.checkpoints import edit, message_of
from tools.quantize_view import quantize_view

VIEW = "diffusion_view.safetensors"
Q_DIFF = "model.layers.1.self_attn.q_proj_diff.weight"


@pytest.fixture
def folders(tmp_path):
    return checkpoints.make_base_and_adapter(tmp_path, "qwen3")


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_base_and_adapter_are_the_whole_model(tmp_path, family):
    base, adapter = checkpoints.make_base_and_adapter(tmp_path, family, seed=3)
    whole = checkpoint.load(checkpoints.make(tmp_path / "whole", family, seed=3))
    joined = checkpoint.load(base, adapter=adapter)
    assert vars(joined.config) == vars(whole.config) | {"name": str(base)}
    assert checkpoint.load_config(str(base), adapter=str(adapter)) == joined.config
    assert set(joined.tensors) == set(whole.tensors)
    assert all(torch.equal(joined.tensors[name], whole.tensors[name]) for name in whole.tensors)


def test_a_view_by_a_relative_path_is_the_one_that_was_there_at_load(folders, monkeypatch):
    base, adapter = folders
    want = checkpoint.load(base, adapter=adapter).tensors[Q_DIFF]
    monkeypatch.chdir(adapter.parent)
    loaded = checkpoint.load(base.name, adapter=adapter.name)
    monkeypatch.chdir("/")
    assert torch.equal(loaded.tensors[Q_DIFF], want)


def test_view_may_be_called_model(folders):
    base, adapter = folders
    (adapter / VIEW).rename(adapter / "model.safetensors")
    assert Q_DIFF in checkpoint.load(base, adapter=adapter).tensors


def test_int8_view_is_within_half_a_step(folders):
    base, adapter = folders
    exact = load_file(adapter / VIEW)
    quantize_view(adapter / VIEW, adapter / "int8.safetensors")
    (adapter / "int8.safetensors").replace(adapter / VIEW)
    loaded = checkpoint.load(base, adapter=adapter)
    for name, weight in exact.items():
        if weight.dim() == 1:
            assert torch.equal(loaded.tensors[name], weight)
        else:
            step = weight.abs().amax(dim=1, keepdim=True) / 127
            assert loaded.tensors[name].dtype == torch.float32
            assert ((loaded.tensors[name] - weight).abs() <= 0.5001 * step).all()


def test_int8_view_in_shards(folders):
    """Its index lists the scales too, each next to its tensor."""
    base, adapter = folders
    quantize_view(adapter / VIEW, adapter / "int8.safetensors")
    (adapter / "int8.safetensors").replace(adapter / VIEW)
    single = dict(checkpoint.load(base, adapter=adapter).tensors)
    tensors = load_file(adapter / VIEW)
    (adapter / VIEW).unlink()
    weight_map = {name: f"layer-{name.split('.')[2]}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, adapter / file)
    index = adapter / f"{VIEW}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    sharded = dict(checkpoint.load(base, adapter=adapter).tensors)
    assert set(sharded) == set(single)
    assert all(torch.equal(sharded[name], single[name]) for name in single)

    elsewhere = weight_map | {f"{Q_DIFF}_scale": "layer-0.safetensors"}
    index.write_text(json.dumps({"weight_map": elsewhere}))
    expected = f"{index}: weight_map puts {Q_DIFF}_scale into layer-0.safetensors, which does not hold it"
    assert message_of(base, adapter) == expected


def test_base_alone(folders):
    base, _ = folders
    assert message_of(base) == (
        f"{base}: holds no diffusion view (no *_diff tensors), it is a plain base model: "
        "pass adapter=FOLDER with the diffusion view trained on it"
    )


def test_base_of_another_family(folders):
    """The error does not suggest an adapter."""
    base, _ = folders
    edit_config(base, model_type="gemma3")
    assert message_of(base).startswith(f"{base / 'config.json'}: model_type must be one of qwen3, orthrus, llama, got")


def test_base_that_has_a_view_already(tmp_path, folders):
    _, adapter = folders
    whole = checkpoints.make(tmp_path / "whole")
    expected = (
        f"{whole}: already holds a diffusion view (model.layers.0.self_attn.k_norm_diff.weight), so {adapter} does"
    )
    assert message_of(whole, adapter).startswith(expected)


def test_a_quantised_view_is_not_quantised_again(tmp_path, folders):
    """Its scales would be lost, and the rest would look complete."""
    _, adapter = folders
    quantize_view(adapter / VIEW, adapter / "int8.safetensors")
    with pytest.raises(ValueError, match=r"holds model.layers.0.*\(torch\.\w+\): it is quantised already"):
        quantize_view(adapter / "int8.safetensors", tmp_path / "again.safetensors")
    os.umask(umask := os.umask(0))
    assert (adapter / "int8.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    edit(adapter, lambda tensors: tensors[Q_DIFF][0, 0].fill_(torch.nan), VIEW)
    with pytest.raises(ValueError, match=f"{Q_DIFF} holds NaN or inf"):  # of which a scale would leave no trace
        quantize_view(adapter / VIEW, tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize(
    "fact",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
    ],
)
def test_adapter_that_states_another_base(folders, fact):
    base, adapter = folders
    config = json.loads((base / "config.json").read_text())
    found = (config | config["rope_parameters"])[fact]
    for stated in (7, 0):
        edit_config(adapter, **{fact: stated})
        want = f"{adapter}: is for another base: {fact} must be {stated}, got {found} from {base}"
        assert message_of(base, adapter) == want


@pytest.mark.parametrize(("fact", "value"), [("head_dim", 128), ("num_key_value_heads", 4)])
def test_a_base_that_leaves_a_fact_to_its_default(tmp_path, fact, value):
    """``null``, as transformers may write it, or no entry at all; an adapter may do the same."""
    base, adapter = checkpoints.make_base_and_adapter(tmp_path, "qwen3", **{fact: value})
    for theirs in (None, ...):
        edit_config(base, **{fact: theirs})
        edit_config(adapter, **{fact: value})
        checkpoint.load(base, adapter=adapter)
        edit_config(adapter, **{fact: 7})
        assert message_of(base, adapter) == (
            f"{adapter}: is for another base: {fact} must be 7, got {value} from {base}"
        )
        edit_config(adapter, **{fact: theirs})
        checkpoint.load(base, adapter=adapter)


def test_adapter_that_states_nothing_is_checked_by_shape(tmp_path):
    base, _ = checkpoints.make_base_and_adapter(tmp_path / "a", "qwen3")
    _, adapter = checkpoints.make_base_and_adapter(tmp_path / "b", "qwen3", hidden_size=32)
    (adapter / "config.json").write_text('{"block_size": 8, "mask_token_id": 95}')
    assert message_of(base, adapter) == (
        f"{adapter / VIEW}: model.layers.0.self_attn.q_proj_diff.weight must have shape [256, 64], got [256, 32]"
    )


def test_fingerprint_tells_bases_of_one_shape_apart(tmp_path):
    base, adapter = checkpoints.make_base_and_adapter(tmp_path / "a", "qwen3", seed=0)
    other, _ = checkpoints.make_base_and_adapter(tmp_path / "b", "qwen3", seed=1)
    loaded = checkpoint.load(base, adapter=adapter)
    fingerprint = checkpoint.fingerprint(loaded.tensors, loaded.config)
    edit_config(adapter, base_fingerprint=fingerprint)
    checkpoint.load(base, adapter=adapter)
    expected = f"{adapter}: is for another base: base_fingerprint must be '{fingerprint}', got '"
    assert message_of(other, adapter).startswith(expected)
    edit_config(adapter, base_fingerprint=None)
    checkpoint.load(other, adapter=adapter)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"rope_parameters": {"rope_theta": 7}}, "rope_parameters.rope_theta must be 7, got 10000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling.type must be 'linear', got 'default'"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor must be 8.0, got None"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}, None),
        ({"rope_parameters": None, "rope_scaling": {}}, None),
        ({"rope_parameters": {"rope_type": "default", "truncate": True, "beta_fast": 32, "beta_slow": 1}}, None),
        ({"rope_parameters": {"mscale": 0}}, None),
        ({"rope_parameters": {"truncate": False}}, "rope_parameters.truncate must be False, got True"),
    ],
)
def test_an_adapter_may_state_the_rotary_embedding(folders, stated, message):
    base, adapter = folders
    edit_config(adapter, rope_theta=None, rope_parameters=None)
    edit_config(adapter, **stated)
    if message is None:
        checkpoint.load(base, adapter=adapter)
    else:
        assert message_of(base, adapter) == f"{adapter}: is for another base: {message} from {base}"


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, got '1e-6'"),
        ({"rope_theta": "10000.0"}, "rope_theta must be a number, got '10000.0'"),
        ({"hidden_size": "64"}, "hidden_size must be a number, got '64'"),
        ({"rope_scaling": {"beta_fast": "32"}}, "rope_scaling.beta_fast must be a number, got '32'"),
        ({"rope_scaling": {"truncate": "true"}}, "rope_scaling.truncate must be true or false, got 'true'"),
    ],
)
def test_a_fact_in_quotes_is_not_put_down_to_another_base(folders, stated, message):
    base, adapter = folders
    edit_config(adapter, **stated)
    assert message_of(base, adapter) == f"{adapter / 'config.json'}: {message}"


def test_what_the_base_says_of_the_rotary_embedding_goes_before_defaults(folders):
    base, adapter = folders
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 64, "truncate": False}
    edit_config(base, rope_parameters=yarn)
    edit_config(adapter, rope_theta=None, rope_parameters=yarn)
    checkpoint.load(base, adapter=adapter)
    edit_config(adapter, rope_parameters=yarn | {"beta_fast": 32})
    expected = f"{adapter}: is for another base: rope_parameters.beta_fast must be 32, got 64"
    assert message_of(base, adapter).startswith(expected)


def test_an_adapter_whose_rotary_embedding_is_no_object(folders):
    base, adapter = folders
    edit_config(adapter, rope_scaling=[4])
    assert message_of(base, adapter) == f"{adapter / 'config.json'}: rope_scaling must be an object, got [4]"


def test_fingerprint_does_not_depend_on_the_dtype_stored(tmp_path):
    prints = set()
    for dtype in (torch.float32, torch.bfloat16):
        loaded = checkpoint.load(checkpoints.make(tmp_path / str(dtype), dtype=dtype))
        prints.add(checkpoint.fingerprint(loaded.tensors, loaded.config))
    assert len(prints) == 1


@pytest.mark.parametrize("key", ["block_size", "mask_token_id"])
def test_adapter_must_state_its_block(folders, key):
    base, adapter = folders
    edit_config(adapter, **{key: ...})
    assert message_of(base, adapter) == f"{adapter / 'config.json'}: {key} is missing, an adapter must state it"


def test_what_an_adapter_states_of_its_block_goes_before_the_base(folders):
    base, adapter = folders
    edit_config(base, block_size=5, mask_token_id=4)
    config = checkpoint.load(base, adapter=adapter).config
    assert (config.block_len, config.mask_token_id) == (8, 95)


def test_bad_adapter_value_names_both_files(folders):
    base, adapter = folders
    edit_config(adapter, mask_token_id=96)
    where = f"{base / 'config.json'} with {adapter / 'config.json'}"
    assert message_of(base, adapter) == f"{where}: mask_token_id must be within the vocabulary [0, 96), got 96"


def test_missing_tensor(folders):
    base, adapter = folders
    edit(adapter, lambda tensors: tensors.pop(Q_DIFF), VIEW)
    assert message_of(base, adapter) == f"{adapter}: {Q_DIFF} is missing, expected shape [256, 64]"


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_base_tensor_in_an_adapter(folders, name):
    base, adapter = folders
    edit(adapter, lambda tensors: tensors.update({name: torch.ones(96, 64)}), VIEW)
    assert message_of(base, adapter) == f"{adapter / VIEW}: {name} is not part of this model"


def test_an_adapter_that_is_none(tmp_path, folders):
    base, _ = folders
    assert message_of(base, "/nope") == (
        "adapter: '/nope' is neither a folder with a diffusion view, nor a hub id (owner/name)"
    )
    expected = f"adapter: {str(tmp_path)!r} is no folder with a diffusion view: it holds no config.json"
    assert message_of(base, tmp_path) == expected


def test_adapter_without_weights(folders):
    base, adapter = folders
    (adapter / VIEW).unlink()
    assert message_of(base, adapter).startswith(
        f"{adapter}: must hold {VIEW} or {VIEW}.index.json or model.safetensors or model.safetensors.index.json, found"
    )


def test_int8_without_scale(folders):
    base, adapter = folders
    edit(adapter, lambda tensors: tensors.update({Q_DIFF: tensors[Q_DIFF].to(torch.int8)}), VIEW)
    assert message_of(base, adapter) == (
        f"{adapter / VIEW}: {Q_DIFF} is int8, so {Q_DIFF}_scale must be there too, but it is missing"
    )


@pytest.mark.parametrize(
    ("scale", "got"), [(torch.ones(255), "F32 of shape [255]"), (torch.ones(256).half(), "F16 of shape [256]")]
)
def test_int8_with_a_wrong_scale(folders, scale, got):
    base, adapter = folders
    edit(
        adapter,
        lambda tensors: tensors.update({Q_DIFF: tensors[Q_DIFF].to(torch.int8), f"{Q_DIFF}_scale": scale}),
        VIEW,
    )
    assert message_of(base, adapter) == f"{adapter / VIEW}: {Q_DIFF}_scale must be F32 of shape [256], got {got}"


def test_a_scale_that_changes_behind_its_header(folders):
    base, adapter = folders
    quantize_view(adapter / VIEW, adapter / "int8.safetensors")
    (adapter / "int8.safetensors").replace(adapter / VIEW)
    loaded = checkpoint.load(base, adapter=adapter)
    edit(adapter, lambda tensors: tensors.update({f"{Q_DIFF}_scale": torch.ones(1)}), VIEW)
    with pytest.raises(CheckpointError, match=f"{VIEW}: has changed since it was opened"):
        loaded.tensors[Q_DIFF]


def test_a_file_that_may_or_may_not_be_there(folders):
    """Behind a link to itself; permissions would not stop every user."""
    base, adapter = folders
    (adapter / "config.json").unlink()
    (adapter / "config.json").symlink_to(adapter / "config.json")
    said = "cannot be read (Too many levels of symbolic links)"
    assert message_of(base, adapter) == f"{adapter / 'config.json'}: {said}"


def test_scale_without_int8(folders):
    base, adapter = folders
    edit(adapter, lambda tensors: tensors.update({f"{Q_DIFF}_scale": torch.ones(256)}), VIEW)
    assert message_of(base, adapter) == f"{adapter / VIEW}: {Q_DIFF}_scale is not part of this model"


def test_nan_scale(folders):
    base, adapter = folders
    scale = torch.full((256,), torch.nan)
    edit(
        adapter,
        lambda tensors: tensors.update({Q_DIFF: tensors[Q_DIFF].to(torch.int8), f"{Q_DIFF}_scale": scale}),
        VIEW,
    )
    assert message_of(base, adapter) == f"{adapter / VIEW}: {Q_DIFF} holds NaN or inf"


def test_base_gguf_is_for_the_embedded_model(folders):
    base, adapter = folders
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(str(base), adapter=adapter, base_gguf="x.gguf")
    assert str(error.value) == f"base_gguf: applies to 'smollm2-135m' only, got it with {str(base)!r}"
