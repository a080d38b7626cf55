"""The table of cosines and sines against transformers' own rotary embedding, bit for bit."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from orthrus_rt.rope import cos_sin_table
from tests.checkpoints import tiny_config

POSITIONS = 600  # past max_position_embeddings, 512

VARIANTS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("rope_type", VARIANTS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_same_bits_as_transformers(rope_type, head_dim):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **VARIANTS[rope_type]}
    table = cos_sin_table(tiny_config("llama", head_dim=head_dim, rope_parameters=rope), POSITIONS)
    assert table.shape == (POSITIONS, head_dim)
    assert table.dtype == torch.float32

    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=512,
            rope_parameters=dict(rope),
        )
    )
    cos, sin = theirs(torch.zeros(1), torch.arange(POSITIONS)[None])
    torch.testing.assert_close(table[:, : head_dim // 2], cos[0, :, : head_dim // 2], rtol=0, atol=0)
    torch.testing.assert_close(table[:, head_dim // 2 :], sin[0, :, head_dim // 2 :], rtol=0, atol=0)


def test_yarn_scales_cosines_and_sines():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, **VARIANTS["yarn"]}
    table = cos_sin_table(tiny_config(rope_parameters=rope), 1)
    assert table[0, 0] == pytest.approx(1.2079, abs=1e-4)  # 0.1 ln 8 + 1 at position 0


@pytest.mark.parametrize("rope_type", VARIANTS)
def test_heads_need_not_share_the_hidden_size_out(rope_type):
    """Qwen3's have a size of their own."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **VARIANTS[rope_type]}
    odd = tiny_config(hidden_size=72, num_attention_heads=5, num_key_value_heads=1, rope_parameters=rope)
    assert torch.equal(cos_sin_table(odd, 9), cos_sin_table(tiny_config(rope_parameters=rope), 9))


def test_a_row_does_not_depend_on_the_table_length():
    config = tiny_config(rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, **VARIANTS["llama3"]})
    assert torch.equal(cos_sin_table(config, 40)[:7], cos_sin_table(config, 7))
