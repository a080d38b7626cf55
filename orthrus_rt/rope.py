"""The table of cosines and sines of the rotary embedding."""

from __future__ import annotations

import torch

from orthrus_rt.config import CheckpointError, ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Angle per position of each half dim, fp32 ``[head_dim / 2]``, and the factor on cosines and sines."""
    if config.rope["rope_type"] == "default":
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
        return 1.0 / (config.rope["rope_theta"] ** exponent), 1.0

    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # The scaled variants are those of transformers. Any config class works, and one head is enough.
    carrier = LlamaConfig(
        hidden_size=config.head_dim,
        num_attention_heads=1,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope),
    )
    with torch.device("cpu"):  # their temporary tensors are on the default device
        return ROPE_INIT_FUNCTIONS[config.rope["rope_type"]](carrier, torch.device("cpu"))


def cos_sin_table(config: ModelConfig, max_positions: int) -> torch.Tensor:
    """fp32 ``[max_positions, head_dim]``: for each position the cosines of the half dims, then the sines.

    Angles are products rounded to fp32, as in transformers, so that the two agree in every bit.

    Raises:
        CheckpointError: the config's parameters, though each within its range, do not define a rotary embedding
            together.
    """
    wrong = f"{config.name}: rope parameters must give finite angles and a finite factor, got {config.rope}"
    try:
        inv_freq, scaling = inverse_frequencies(config)
    except (ArithmeticError, ValueError) as error:
        raise CheckpointError(f"{wrong} ({error})") from error
    angle = torch.arange(max_positions, dtype=torch.float32, device="cpu")[:, None] * inv_freq
    table = torch.cat([angle.cos(), angle.sin()], dim=1) * scaling
    if not table.isfinite().all():
        raise CheckpointError(wrong)
    return table
