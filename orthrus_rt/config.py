"""What a model is: the facts that kernels, cache and engine need, read from a checkpoint's config files."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """Shape and conventions of one Orthrus model (a Llama- or Qwen3-family base plus its diffusion view).

    Attributes:
        family: ``"llama"`` or ``"qwen3"``.
        qk_norm: both views normalise queries and keys per head (Qwen3).
        rope: the ``rope_parameters`` dictionary, ``rope_type`` and ``rope_theta`` always present.
        block_len: K, rows of a diffusion block; the checkpoint's ``block_size``.
        eos_token_ids: every id that ends a sequence, from config.json and generation_config.json.
        name: where it came from, for messages.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qk_norm: bool
    block_len: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    rope: dict = field(default_factory=dict)
    name: str = ""
