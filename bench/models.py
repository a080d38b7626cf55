"""The shapes of known models, with random weights that are generated on the device tensor by tensor."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch

from orthrus_rt.checkpoint import Checkpoint, expected_tensors
from orthrus_rt.config import ModelConfig

# size -> hidden, MLP, layers, query heads, key/value heads, head_dim, vocabulary, tied head
SHAPES = {
    "135m": (576, 1536, 30, 9, 3, 64, 49152, True),  # the embedded model, a Llama; the others are Qwen3
    "1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "4b": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "tiny": (128, 256, 2, 4, 2, 64, 512, True),  # for trying out a benchmark
}


class RandomTensors(Mapping):
    """Tensors of the given shapes, seeded by name; nothing is kept."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device):
        self.shapes, self.device = shapes, device

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        out = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return out.normal_(0, shape[1] ** -0.5, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def config_of(size: str, block_len: int = 32) -> ModelConfig:
    """The config of a model in :data:`SHAPES`."""
    hidden, mlp, layers, heads_q, heads_kv, head_dim, vocab, tied = SHAPES[size]
    family = "llama" if size == "135m" else "qwen3"
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads_q=heads_q,
        num_heads_kv=heads_kv,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
        qk_norm=family == "qwen3",
        block_len=block_len,
        mask_token_id=min(151669, vocab - 1),
        eos_token_ids=(min(151645, vocab - 2),),
        rope={"rope_type": "default", "rope_theta": 1000000.0},
        name=f"random-{size}",
    )


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """``(in_features, out_features)`` of each weight that row_linear takes."""
    hidden, mlp, q_width = config.hidden_size, config.intermediate_size, config.num_heads_q * config.head_dim
    return {
        "qkv": (hidden, q_width + 2 * config.num_heads_kv * config.head_dim),
        "o": (q_width, hidden),
        "gate_up": (hidden, 2 * mlp),
        "down": (mlp, hidden),
        "lm_head": (hidden, config.vocab_size),
    }


def random_checkpoint(size: str, device, block_len: int = 32) -> Checkpoint:
    """A model in :data:`SHAPES` with random weights on ``device``."""
    config = config_of(size, block_len)
    return Checkpoint(config=config, tensors=RandomTensors(expected_tensors(config), device), tokenizer_dir=None)
