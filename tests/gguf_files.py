"""A tiny Llama-family GGUF with a tokenizer, laid out as llama.cpp writes such files."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from orthrus_rt.config import ModelConfig
from orthrus_rt.embedded import LAYER_TENSOR_NAMES, TENSOR_NAMES
from orthrus_rt.storage import is_diffusion
from tests.checkpoints import random_tensors, tiny_config

CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll"]


def tokens() -> list[str]:
    letters = sorted({chr(c) for c in range(33, 127)} | {"Ġ", "Ċ"})
    return [*SPECIAL, *letters, *("".join(merge.split()) for merge in MERGES)]


def tiny_llama() -> ModelConfig:
    return tiny_config("llama", head_dim=32, vocab_size=len(tokens()), eos_token_id=2)


def permuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Puts rows whose RoPE pairs lane i with lane i + half into llama.cpp's order, which pairs 2i with 2i + 1."""
    head_dim = weight.shape[0] // num_heads
    out = torch.empty_like(weight)
    for head in range(num_heads):
        for i in range(head_dim // 2):
            for part in range(2):
                out[head * head_dim + 2 * i + part] = weight[head * head_dim + part * (head_dim // 2) + i]
    return out


def write(path: Path) -> dict[str, torch.Tensor]:
    """Writes the file; returns its tensors by canonical name, before quantisation and permutation."""
    config = tiny_llama()
    originals = {name: t for name, t in random_tensors(config).items() if not is_diffusion(name)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads_q)
    writer.add_head_count_kv(config.num_heads_kv)
    writer.add_rope_freq_base(config.rope["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens())
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens()])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in originals.items():
        gguf_name = _gguf_name(name)
        if gguf_name.endswith("attn_q.weight"):
            weight = permuted(weight, config.num_heads_q)
        elif gguf_name.endswith("attn_k.weight"):
            weight = permuted(weight, config.num_heads_kv)
        kind = storage_type(name)
        data = np.ascontiguousarray(weight.numpy())
        writer.add_tensor(gguf_name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return originals


def storage_type(name: str):
    """As in the embedded base: embedding Q8_0, norms F32, everything else Q4_1."""
    if "embed_tokens" in name:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F32 if "norm" in name else gguf.GGMLQuantizationType.Q4_1


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    for short, long in TENSOR_NAMES.items():
        if stem == long:
            return f"{short}.weight"
    _, _, layer, part = stem.split(".", 3)
    short = next(short for short, long in LAYER_TENSOR_NAMES.items() if long == part)
    return f"blk.{layer}.{short}.weight"
