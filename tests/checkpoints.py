"""Tiny random checkpoints in the official layout, written by any test that needs a model on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthrus_rt.checkpoint import CheckpointError, expected_tensors, load
from orthrus_rt.config import ModelConfig, parse
from orthrus_rt.storage import is_diffusion

ARCHITECTURE = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def raw_config(family: str = "qwen3", **changes) -> dict:
    """A config.json of the tiny model; a value of ``...`` takes its key out."""
    raw = {
        "architectures": ["OrthrusLM" if family == "qwen3" else ARCHITECTURE[family]],
        "model_type": family,
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "eos_token_id": 2,
        "block_size": 8,
        "mask_token_id": 95,
    } | changes
    return {key: value for key, value in raw.items() if value is not ...}


def tiny_config(family: str = "qwen3", **changes) -> ModelConfig:
    """The same as a :class:`ModelConfig`, without a folder."""
    return parse(raw_config(family, **changes), name=f"tiny {family}")


def random_tensors(config: ModelConfig, *, dtype=torch.float32, seed: int = 0, diff_noise: float | None = None) -> dict:
    """Every tensor of the model, scaled so that activations stay near 1.

    ``diff_noise`` makes the diffusion view a noisy copy of the AR view (0 copies it), so that drafts are accepted more
    often than with two unrelated views, which None gives.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weight = 1 + 0.1 * noise
        else:
            weight = noise * (1.0 if "embed_tokens" in name else 2 * shape[1] ** -0.5)
        if diff_noise is not None and is_diffusion(name):
            weight = tensors[name.replace("_diff", "")].float() + diff_noise * weight
        tensors[name] = weight.to(dtype)
    return tensors


def write(folder: Path, raw: dict, tensors: dict, *, shards: int = 1, generation: dict | None = None) -> Path:
    """Write config.json, the weights in ``shards`` files (with an index if several) and generation_config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make(
    folder: Path,
    family: str = "qwen3",
    *,
    dtype=torch.float32,
    seed: int = 0,
    shards: int = 1,
    diff_noise: float | None = None,
    generation: dict | None = None,
    **changes,
) -> Path:
    """A whole tiny Orthrus checkpoint; ``changes`` go into config.json (see :func:`raw_config`)."""
    raw = raw_config(family, **changes)
    tensors = random_tensors(parse(raw, name=str(folder)), dtype=dtype, seed=seed, diff_noise=diff_noise)
    return write(folder, raw, tensors, shards=shards, generation=generation)


def make_base_and_adapter(folder: Path, family: str, *, dtype=torch.float32, seed: int = 0, **changes):
    """The same model as a plain base folder (as transformers writes it) and an adapter folder."""
    raw = raw_config(family, **changes)
    tensors = random_tensors(parse(raw, name=str(folder)), dtype=dtype, seed=seed)
    own = ("block_size", "mask_token_id")
    base_raw = {key: value for key, value in raw.items() if key not in own}
    base_raw["architectures"] = [ARCHITECTURE[family]]
    base = write(folder / "base", base_raw, {n: t for n, t in tensors.items() if not is_diffusion(n)})
    adapter = folder / "adapter"
    adapter.mkdir()
    facts = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    (adapter / "config.json").write_text(json.dumps({key: raw[key] for key in (*own, *facts)}))
    save_file({n: t for n, t in tensors.items() if is_diffusion(n)}, adapter / "diffusion_view.safetensors")
    return base, adapter


def edit(folder: Path, change, file: str = "model.safetensors") -> None:
    """Apply ``change`` to the dictionary of tensors in ``file``."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def message_of(folder, adapter=None) -> str:
    """What is said where this checkpoint cannot be loaded, or one of its tensors cannot be read."""
    with pytest.raises(CheckpointError) as error:
        loaded = load(folder, adapter=adapter)
        for name in loaded.tensors:
            loaded.tensors[name]
    return str(error.value)
