"""The table of cosines and sines against transformers' own rotary embedding, bit for bit."""

import copy

import pytest
import torch
from transformers import LlamaConfig

from orthrus_rt.config import CheckpointError, parse
from orthrus_rt.rope import cos_sin_table
from tests.checkpoints import raw_config, tiny_config

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

    assert_same_as_transformers(
        table,
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=512,
            rope_parameters=dict(rope),
        ),
    )


def assert_same_as_transformers(table, config):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # takes seconds: for this process alone

    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(POSITIONS)[None])
    half = table.shape[1] // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=0, atol=0)
    torch.testing.assert_close(table[:, half:], sin[0, :, half:], rtol=0, atol=0)


PLAIN, YARN = {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "yarn", **VARIANTS["yarn"]}


@pytest.mark.parametrize(
    "said",
    [
        {"rope_parameters": PLAIN},
        {"rope_parameters": PLAIN, "rope_theta": 3e4},
        {"rope_parameters": PLAIN, "rope_scaling": YARN | {"rope_theta": 5e5}},
        {"rope_parameters": PLAIN, "rope_scaling": YARN, "rope_theta": 5e5},
        {"rope_parameters": ..., "rope_scaling": YARN},
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}, "original_max_position_embeddings": 64},
        {"rope_parameters": YARN, "original_max_position_embeddings": 64},
        {"rope_parameters": YARN | {"attention_factor": 0.5, "beta_fast": 16, "beta_slow": None, "truncate": False}},
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    ],
)
def test_config_is_read_as_by_transformers(said):
    raw = raw_config("llama", **said)
    theirs = LlamaConfig.from_dict(copy.deepcopy(raw))  # transformers fills in its argument
    assert_same_as_transformers(cos_sin_table(parse(raw, name="tiny"), POSITIONS), theirs)


def test_yarn_scales_cosines_and_sines():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, **VARIANTS["yarn"]}
    table = cos_sin_table(tiny_config(rope_parameters=rope), 1)
    assert table[0, 0] == pytest.approx(1.2079, abs=1e-4)  # 0.1 ln 8 + 1 at position 0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e-300},
        {"rope_type": "linear", "factor": 1e-300},
        YARN | {"attention_factor": 1e39},
        YARN | {"mscale": 1e300, "mscale_all_dim": 1},
        YARN | {"beta_fast": 5e-324},
        YARN | {"beta_fast": 1.7e308},
    ],
)
def test_parameters_that_make_no_table(rope):
    with pytest.raises(CheckpointError, match=r"^tiny qwen3: rope parameters must give finite angles .* got \{'rope_"):
        cos_sin_table(tiny_config(rope_parameters={"rope_theta": 10000.0} | rope), 8)


@pytest.mark.parametrize("rope_type", VARIANTS)
def test_heads_need_not_share_the_hidden_size_out(rope_type):
    """Qwen3's heads have a size of their own."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **VARIANTS[rope_type]}
    odd = tiny_config(hidden_size=72, num_attention_heads=5, num_key_value_heads=1, rope_parameters=rope)
    assert torch.equal(cos_sin_table(odd, 9), cos_sin_table(tiny_config(rope_parameters=rope), 9))


def test_a_row_does_not_depend_on_the_table_length():
    config = tiny_config(rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, **VARIANTS["llama3"]})
    assert torch.equal(cos_sin_table(config, 40)[:7], cos_sin_table(config, 7))
