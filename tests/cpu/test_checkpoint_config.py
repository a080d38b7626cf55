"""config.json and generation_config.json: what is read, and one error for each thing that is not supported."""

import math
import sys

import pytest
import torch

from orthrus_rt.config import CheckpointError, parse
from orthrus_rt.rope import cos_sin_table
from tests.checkpoints import raw_config, tiny_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}

UNSUPPORTED = [
    ({"model_type": "mistral"}, "model_type must be one of qwen3, orthrus, llama, got 'mistral'"),
    ({"model_type": ...}, "model_type must be one of qwen3, orthrus, llama, got None"),
    ({"architectures": ["Qwen3MoeForCausalLM"]}, "architectures must name one of OrthrusLM"),
    ({"attention_bias": True}, "attention_bias must be false (biases are not supported), got True"),
    ({"mlp_bias": True}, "mlp_bias must be false (biases are not supported), got True"),
    ({"is_causal": False}, "is_causal must be true, got False"),
    ({"is_causal": 0}, "is_causal must be true or false, got 0"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu' or 'swish', got 'gelu'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config must be absent"),
    ({"quantization_config": {}}, "quantization_config must be absent (weights must be fp32, fp16 or bf16), got {}"),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "every layer must use full attention, but layer_types holds ['sliding_attention']",
    ),
    (
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1},
        "every layer must use full attention, but sliding_window is 128",
    ),
    (
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": None},
        "every layer must use full attention, but sliding_window is 128",
    ),
    (
        {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 1},
        "every layer must use full attention, but sliding_window is 0",
    ),
    (  # transformers' own defaults are 4096 and 28
        {"use_sliding_window": True, "num_hidden_layers": 29},
        "every layer must use full attention, but sliding_window is 4096",
    ),
    (LLAMA | {"sliding_window": 4}, "every layer must use full attention, but sliding_window is 4"),
    (LLAMA | {"sliding_window": 0}, "every layer must use full attention, but sliding_window is 0"),
    (LLAMA | {"attention_chunk_size": 4}, "every layer must use full attention, but attention_chunk_size is 4"),
    (LLAMA | {"attention_chunk_size": 0}, "every layer must use full attention, but attention_chunk_size is 0"),
    (
        LLAMA | {"layer_types": ["full_attention", "chunked_attention"], "attention_chunk_size": 4},
        "every layer must use full attention, but layer_types holds ['chunked_attention']",
    ),
    (
        {"per_layer_config": {"1": {"intermediate_size": 32}}},
        "per_layer_config must be absent (all layers are alike), got {'1': {'intermediate_size': 32}}",
    ),
    ({"kv_sharing_modes": ["store", "reuse"]}, "kv_sharing_modes must be absent (all layers are alike), got ['store'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be one of default, linear, yarn"),
    (
        {"rope_parameters": {"rope_type": "longrope"}},
        "rope_type must be one of default, linear, yarn, llama3, got 'lo",
    ),
    ({"rope_parameters": {"rope_type": "spiral"}}, "got 'spiral'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a positive number, got None"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor must be a positive number, got None"),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters must be one set for all",
    ),
    ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta must be a positive number, got -1.0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1 (the whole head rotates), got 0.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor must be 1"),
    ({"partial_rotary_factor": 0}, "partial_rotary_factor must be 1 (the whole head rotates), got 0"),
    ({"rope_parameters": {"partial_rotary_factor": False}}, "partial_rotary_factor must be 1"),
    ({"hidden_size": ...}, "hidden_size must be a positive integer, got None"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
    ({"vocab_size": "96"}, "vocab_size must be a positive integer, got '96'"),
    ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads 3, got 4"),
    ({"head_dim": 63}, "head_dim must be even, got 63"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
    ({"block_size": ...}, "block_size must be a positive integer, got None"),
    ({"block_size": 1}, "block_size must be >= 2, got 1"),
    ({"mask_token_id": ...}, "mask_token_id must be within the vocabulary [0, 96), got None"),
    ({"mask_token_id": 96}, "mask_token_id must be within the vocabulary [0, 96), got 96"),
    ({"mask_token_id": -1}, "mask_token_id must be within the vocabulary [0, 96), got -1"),
    ({"model_type": ["qwen3"]}, "model_type must be one of qwen3, orthrus, llama, got ['qwen3']"),
    ({"architectures": 5}, "architectures must name one of OrthrusLM, OrthrusForCausalLM, Qwen3ForCausalLM, got 5"),
    ({"architectures": [["OrthrusLM"]]}, "architectures must name one of OrthrusLM"),
    ({"rope_parameters": 5}, "rope_parameters must be an object, got 5"),
    (
        {"rope_scaling": YARN | {"attn_factor": 0.878}},
        "rope_scaling.attn_factor must be 1, got 0.878: some readers use it, others do not; remove it",
    ),
    ({"rope_parameters": YARN | {"extrapolation_factor": 2}}, "rope_parameters.extrapolation_factor must be 1, got 2"),
    ({"rope_scaling": YARN | {"attention_facto": 1.1}}, "rope_scaling.attention_facto is not supported, got 1.1"),
    ({"rope_parameters": [1]}, "rope_parameters must be an object, got [1]"),
    ({"rope_parameters": ..., "rope_scaling": "x"}, "rope_scaling must be an object, got 'x'"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type must be one of default, linear, yarn, llama3, got ['y"),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": "x"}},
        "original_max_position_embeddings must be a positive number, got 'x'",
    ),
    ({"rope_parameters": 5, "rope_scaling": YARN}, "rope_parameters must be an object, got 5"),
    ({"rope_scaling": {"full_attention": YARN}}, "rope_scaling must be one set for all layers, got one per ['full_"),
    (
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": YARN},
        "rope_scaling must give rope_theta: it replaces rope_parameters, whose rope_theta is 1000000.0, and would get",
    ),
    (
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": YARN, "rope_theta": 5e5},
        "whose rope_theta is 1000000.0, and would get 500000.0",
    ),
    (
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
        "original_max_position_embeddings must be 128 as in rope_scaling, got 64 beside it",
    ),
    (
        {"rope_parameters": YARN, "original_max_position_embeddings": 64},
        "original_max_position_embeddings must be 128 as in rope_parameters, got 64 beside it",
    ),
    ({"rope_scaling": YARN | {"rope_theta": 1}}, "rope_theta must be above 1 for yarn, got 1"),
    ({"rope_scaling": YARN | {"truncate": "false"}}, "truncate must be true or false, got 'false'"),
    ({"max_position_embeddings": 10**400}, "max_position_embeddings must be a positive integer, got 1000"),
    ({"layer_types": 5}, "layer_types must be a list of 2 names (num_hidden_layers), got 5"),
    ({"layer_types": ["sliding_attention", 3]}, "layer_types must be a list of 2 names (num_hidden_layers), got ['sl"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types must be a list of 2 names (num_hidden_layers), got ['full"),
    ({"layer_types": []}, "layer_types must be a list of 2 names (num_hidden_layers), got []"),
    (
        {"transformers_weights": "other.safetensors"},
        "transformers_weights must be model.safetensors or model",
    ),
    (
        {"rope_scaling": YARN, "original_max_position_embeddings": None},
        "original_max_position_embeddings must be 128 as in rope_scaling, got None beside it",
    ),
    ({"max_position_embeddings": 1}, "max_position_embeddings must be >= 2, got 1"),
    (
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": "x"},
        "max_window_layers must be an integer, got 'x'",
    ),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number, got inf"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number, got 1000"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
    ({"eos_token_id": "2"}, "eos_token_id must be an integer or a list of integers, got ['2']"),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED)
def test_one_clear_error_each(changes, message):
    with pytest.raises(CheckpointError) as error:
        parse(raw_config(**changes), name="tiny", where="folder/config.json")
    assert str(error.value).startswith("folder/config.json: ")
    assert message in str(error.value)


def test_an_end_that_never_comes_is_left_out(caplog):
    """With a warning that names the file that says so."""
    raw, generation = raw_config(eos_token_id=-1), {"eos_token_id": [2, 96, 95, 10**20]}
    config = parse(raw, generation, name="tiny", where_generation="f/generation_config.json")
    assert config.eos_token_ids == (2, 95)
    assert caplog.messages == [
        "tiny: eos_token_id [-1] never comes, vocab_size is 96",
        f"f/generation_config.json: eos_token_id [96, {10**20}] never comes, vocab_size is 96",
    ]


@pytest.mark.parametrize("key", ["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 10**400, "x", "", True, [], [1]])
def test_a_number_that_yarn_may_have(key, value):
    with pytest.raises(CheckpointError) as error:
        parse(raw_config(rope_parameters=YARN | {key: value}), name="tiny", where="folder/config.json")
    assert str(error.value) == f"folder/config.json: {key} must be a positive number, got {value!r}"
    assert tiny_config(rope_parameters=YARN | {key: None}).rope[key] is None


def test_a_zero_stands_for_what_yarn_does_without_it():
    """As in transformers, except for the attention factor: 0 would remove attention altogether."""
    plain = cos_sin_table(tiny_config(rope_parameters=YARN), 64)
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        assert torch.equal(cos_sin_table(tiny_config(rope_parameters=YARN | {key: 0}), 64), plain)
    with pytest.raises(CheckpointError, match="attention_factor must be a positive number, got 0"):
        tiny_config(rope_parameters=YARN | {"attention_factor": 0})


def test_rope_keys_that_change_nothing():
    idle = {"attn_factor": 1.0, "extrapolation_factor": 1, "finetuned": True, "mrope_section": [8, 12, 12], "new": None}
    assert torch.equal(
        cos_sin_table(tiny_config(rope_parameters=YARN | idle), 64),
        cos_sin_table(tiny_config(rope_parameters=YARN), 64),
    )


def test_facts_of_both_families():
    qwen = tiny_config()
    assert (qwen.family, qwen.qk_norm, qwen.block_len, qwen.mask_token_id) == ("qwen3", True, 8, 95)
    assert tiny_config(model_type="orthrus") == qwen
    llama = tiny_config("llama", head_dim=..., num_key_value_heads=..., tie_word_embeddings=...)
    assert (llama.family, llama.qk_norm, llama.head_dim, llama.num_heads_kv) == ("llama", False, 16, 4)
    assert not llama.tie_word_embeddings
    assert tiny_config(head_dim=...).head_dim == 128
    assert [tiny_config(block_size=n).block_len for n in (2, 256, 257)] == [2, 256, 256]
    assert tiny_config(mask_token_id=0).mask_token_id == 0


@pytest.mark.parametrize(
    ("ours", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 3], {}, (2, 3)),
        (2, {"eos_token_id": 5}, (2, 5)),
        (2, {"eos_token_id": [5, 2, 7]}, (2, 5, 7)),
        (None, {"eos_token_id": [5]}, (5,)),
        (..., None, ()),
        (0, {"eos_token_id": 0}, (0,)),
    ],
)
def test_every_eos_id_counts(ours, generation, expected):
    assert parse(raw_config(eos_token_id=ours), generation, name="tiny").eos_token_ids == expected


def test_bad_eos_id_of_generation_config_is_named():
    with pytest.raises(CheckpointError, match=r"tiny \(generation_config.json\): eos_token_id must be an integer"):
        parse(raw_config(), {"eos_token_id": [True]}, name="tiny")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 512},
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "yarn", "rope_type": "linear", "rope_theta": None, "factor": 4},
            },
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        ),
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_old_and_new_rope_keys_say_the_same(old, new):
    from_old = tiny_config(rope_parameters=..., **old)
    assert from_old.rope == new
    assert from_old == tiny_config(rope_parameters=new)


@pytest.mark.parametrize(
    "both",
    [
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": YARN | {"rope_theta": 1e6}},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": YARN, "rope_theta": 1e6},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": YARN | {"rope_theta": 1e6}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": YARN, "rope_theta": 1e6},
        {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_scaling": {}, "original_max_position_embeddings": 128},
    ],
)
def test_rope_scaling_replaces_rope_parameters(both):
    """Qwen3's recipe for long contexts adds it to config.json."""
    assert tiny_config(**both).rope == YARN | {"rope_theta": 1e6}


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"rope_type": "default"}, "rope_theta"),
        ({"rope_type": "linear"}, "factor"),
        (YARN, "factor"),
        (YARN, "beta_fast"),
        (LLAMA3, "factor"),
        (LLAMA3, "original_max_position_embeddings"),
    ],
)
def test_an_integer_of_any_size_is_a_number(rope, key):
    """This includes integers beyond 64 bits, which torch does not take for numbers."""
    tables = [cos_sin_table(tiny_config(rope_parameters=rope | {key: value}), 64) for value in (10**20, 1e20)]
    assert torch.equal(*tables)


@pytest.mark.parametrize("rope", [YARN, LLAMA3])
def test_the_length_that_scaling_starts_from_stays_an_integer(rope):
    """As transformers asks."""
    assert isinstance(tiny_config(rope_parameters=rope).rope["original_max_position_embeddings"], int)


@pytest.mark.parametrize(
    "unused",
    [
        {"use_sliding_window": False, "sliding_window": 4096},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 28},
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2},
        {"max_window_layers": None},
        {"use_sliding_window": True, "sliding_window": 128},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "full_attention"], "sliding_window": 128, "use_sliding_window": True},
    ],
)
def test_a_sliding_window_that_no_layer_uses_is_no_error(unused):
    assert tiny_config(**unused) == tiny_config()


@pytest.mark.parametrize(
    "unused",
    [
        {"layer_types": ["full_attention", "full_attention"], "sliding_window": 4},
        {"layer_types": ["full_attention", "full_attention"], "attention_chunk_size": 4},
        {"sliding_window": None, "attention_chunk_size": None, "per_layer_config": {}, "kv_sharing_modes": None},
    ],
)
def test_neither_is_a_window_of_llama_that_layer_types_overrides(unused):
    assert tiny_config("llama", **unused) == tiny_config("llama")


@pytest.mark.parametrize(("most", "positions"), [(160, 512), (512, 512), (1000, 1000)])
def test_yarn_reaches_as_far_as_it_stretches(most, positions):
    """Qwen3's recipe for long contexts leaves max_position_embeddings unchanged."""
    assert tiny_config(rope_scaling=YARN, max_position_embeddings=most).max_position_embeddings == positions
    far = tiny_config(rope_scaling=YARN | {"factor": 1e308}, max_position_embeddings=most)
    assert far.max_position_embeddings == sys.maxsize


@pytest.mark.parametrize(
    "same",
    [
        {"hidden_act": "swish"},  # another name of silu
        {"rms_norm_eps": ...},
        {"architectures": ["Qwen3ForCausalLM", "another"]},
        {"transformers_weights": "model.safetensors"},
        {"transformers_weights": "model.safetensors.index.json"},
    ],
)
def test_other_ways_to_say_the_same(same):
    assert tiny_config(**same) == tiny_config()


@pytest.mark.parametrize(("rope", "most"), [(LLAMA3, 512), (YARN | {"factor": 8.0}, 1024)])
def test_what_other_scaling_than_linear_stretches_is_all_there_is(rope, most):
    config = tiny_config(rope_parameters=rope)
    assert config.most_positions == config.max_position_embeddings == most
