"""What a model is: the facts that kernels, cache and engine need, read from a checkpoint's config files."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from orthrus_rt.cycle_plan import MAX_BLOCK_LEN

log = logging.getLogger("orthrus_rt")

# model_type in config.json -> family. Published Orthrus checkpoints say qwen3, their code says orthrus.
FAMILIES = {"qwen3": "qwen3", "orthrus": "qwen3", "llama": "llama"}
ARCHITECTURES = {
    "qwen3": ("OrthrusLM", "OrthrusForCausalLM", "Qwen3ForCausalLM"),
    "llama": ("LlamaForCausalLM", "OrthrusLM", "OrthrusForCausalLM"),
}
# rope_type -> keys that it requires
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ROPE_COMMON = ("rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "truncate")
ROPE_AT_ONE = ("attn_factor", "extrapolation_factor")  # of YaRN: some readers use them, others do not
# Keys that change nothing in a Llama or Qwen3 model.
ROPE_IDLE = ("finetuned", "mrope_section", "mrope_interleaved")
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # optional, numbers


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and tensor or key, what was expected and found."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and conventions of one Orthrus model (a Llama- or Qwen3-family base plus its diffusion view).

    Attributes:
        family: ``"llama"`` or ``"qwen3"``.
        qk_norm: both views normalise queries and keys per head (Qwen3).
        rope: as transformers' ``rope_parameters``, ``rope_type`` and ``rope_theta`` always present.
        block_len: K, the most rows of a diffusion block: the checkpoint's ``block_size``, at most MAX_BLOCK_LEN.
        max_position_embeddings: positions of a sequence unless more are requested; with YaRN, the stretched number.
        eos_token_ids: every id that may end a sequence, from config.json and generation_config.json.
        name: the checkpoint's name, for messages.
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
    rope: dict
    name: str

    @property
    def most_positions(self) -> int:
        """The most positions that may be requested. Linear scaling stretches the range as well. But some checkpoints
        state the stretched number and others the original one, so more than stated is given only on request.
        """
        factor = self.rope["factor"] if self.rope["rope_type"] == "linear" else 1
        return max(self.max_position_embeddings, int(min(sys.maxsize, factor * self.max_position_embeddings)))


def parse(
    raw: dict,
    generation: dict | None = None,
    *,
    name: str,
    where: str | None = None,
    where_generation: str | None = None,
) -> ModelConfig:
    """Build a :class:`ModelConfig` from the contents of config.json and generation_config.json.

    Args:
        raw: config.json, with ``block_size`` and ``mask_token_id`` (the caller merges in an adapter's).
        generation: generation_config.json, if there is one; only its EOS ids are read.
        name: the result's ``name``.
        where: file that messages name; ``name`` if omitted.
        where_generation: the same for ``generation``.

    Raises:
        CheckpointError: a key is missing or out of range, or asks for something that is not supported.
    """
    where = where or name
    where_generation = where_generation or f"{where} (generation_config.json)"
    family = family_of(raw, where)
    _refuse_unsupported(raw, where)
    hidden_size = _positive(raw, "hidden_size", where)
    num_layers = _positive(raw, "num_hidden_layers", where)
    num_heads_q = _positive(raw, "num_attention_heads", where)
    num_heads_kv = _positive(raw, "num_key_value_heads", where, default=num_heads_q)
    head_dim = _positive(raw, "head_dim", where, default=128 if family == "qwen3" else hidden_size // num_heads_q)
    if num_heads_q % num_heads_kv:
        raise CheckpointError(
            f"{where}: num_attention_heads must be a multiple of num_key_value_heads {num_heads_kv}, got {num_heads_q}"
        )
    if head_dim % 2:
        raise CheckpointError(f"{where}: head_dim must be even, got {head_dim}")
    _refuse_sliding_window(raw, family, num_layers, where)

    vocab_size = _positive(raw, "vocab_size", where)
    block_len = _positive(raw, "block_size", where)
    if block_len < 2:
        raise CheckpointError(f"{where}: block_size must be >= 2, got {block_len}")
    rope = _rope(raw, where)
    eos = _eos_ids(raw, vocab_size, where) + _eos_ids(generation or {}, vocab_size, where_generation)
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_positive(raw, "intermediate_size", where),
        num_layers=num_layers,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        head_dim=head_dim,
        rms_norm_eps=_number(raw, "rms_norm_eps", where, default=1e-6),
        max_position_embeddings=_most_positions(raw, rope, where),
        tie_word_embeddings=_bool(raw, "tie_word_embeddings", where),
        qk_norm=family == "qwen3",
        block_len=min(block_len, MAX_BLOCK_LEN),
        mask_token_id=_mask_id(raw, vocab_size, where),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        rope=rope,
        name=name,
    )


def family_of(raw: dict, where: str) -> str:
    """The model's family according to its config.json; :class:`CheckpointError` if it is not in FAMILIES."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"{where}: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}")
    family = FAMILIES[model_type]
    architectures = raw.get("architectures") or []
    if architectures and not (_are_names(architectures) and set(architectures) & set(ARCHITECTURES[family])):
        raise CheckpointError(
            f"{where}: architectures must name one of {', '.join(ARCHITECTURES[family])}, got {architectures}"
        )
    return family


def _refuse_unsupported(raw, where):
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise CheckpointError(f"{where}: {key} must be false (biases are not supported), got {raw[key]!r}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise CheckpointError(f"{where}: hidden_act must be 'silu' or 'swish', got {raw['hidden_act']!r}")
    # transformers obeys it: if false, each token would see those after it.
    if not _bool({"is_causal": True} | raw, "is_causal", where):
        raise CheckpointError(f"{where}: is_causal must be true, got {raw['is_causal']!r}")
    if raw.get("quantization_config") is not None:
        wanted = "quantization_config must be absent (weights must be fp32, fp16 or bf16)"
        raise CheckpointError(f"{where}: {wanted}, got {raw['quantization_config']!r}")
    weights, read = raw.get("transformers_weights"), ("model.safetensors", "model.safetensors.index.json")
    if weights not in (None, *read):  # transformers would read that file
        raise CheckpointError(f"{where}: transformers_weights must be {' or '.join(read)}, got {weights!r}")
    for key in ("per_layer_config", "kv_sharing_modes"):
        if raw.get(key):
            raise CheckpointError(f"{where}: {key} must be absent (all layers are alike), got {raw[key]!r}")


def _refuse_sliding_window(raw, family, num_layers, where):
    # Absent keys have the defaults of transformers' configuration of Qwen3.
    layer_types, window = raw.get("layer_types"), raw.get("sliding_window", 4096)
    full_layers = raw.get("max_window_layers", 28) or 0
    # transformers' cache obeys these in a Llama model without any further setting.
    windows = [key for key in ("sliding_window", "attention_chunk_size") if raw.get(key) is not None]
    if layer_types is not None and not (_are_names(layer_types) and len(layer_types) == num_layers):
        wanted = f"a list of {num_layers} names (num_hidden_layers)"
        raise CheckpointError(f"{where}: layer_types must be {wanted}, got {layer_types!r}")
    if not _is_int(full_layers):
        raise CheckpointError(f"{where}: max_window_layers must be an integer, got {full_layers!r}")
    if layer_types:
        other = sorted(set(layer_types) - {"full_attention"})
        in_use = f"layer_types holds {other}" if other else ""
    elif windows and family == "llama":
        in_use = f"{windows[0]} is {raw[windows[0]]}"
    elif raw.get("use_sliding_window") and window is not None:
        in_use = f"sliding_window is {window}" if full_layers < num_layers else ""
    else:
        in_use = ""
    if in_use:
        raise CheckpointError(f"{where}: every layer must use full attention, but {in_use}")


def _rope(raw, where):
    """One flat dictionary, as transformers reads it: the older ``rope_scaling`` replaces ``rope_parameters``, and keys
    missing from either may stand at the top level of config.json.
    """
    given = {key: raw.get(key) or {} for key in ("rope_scaling", "rope_parameters")}
    for key, rope in given.items():
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: {key} must be an object, got {rope!r}")
        nested = [name for name, value in rope.items() if isinstance(value, dict)]
        if nested:
            raise CheckpointError(f"{where}: {key} must be one set for all layers, got one per {nested}")
    key = "rope_scaling" if given["rope_scaling"] else "rope_parameters"
    rope = dict(given[key])
    rope_type = rope.pop("type", None)
    rope_type = rope.setdefault("rope_type", rope_type or "default")
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise CheckpointError(f"{where}: rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
    _check_rope_keys(rope, f"{where}: {key}")
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = raw.get("rope_theta", 10000.0)
        # Refused instead of used: transformers takes the one above, so its text and ours would differ.
        replaced = given["rope_parameters"].get("rope_theta")
        if replaced not in (None, rope["rope_theta"]):
            raise CheckpointError(
                f"{where}: rope_scaling must give rope_theta: it replaces rope_parameters, whose rope_theta is "
                f"{replaced!r}, and would get {rope['rope_theta']!r}"
            )
    for name in ("rope_theta", *ROPE_TYPES[rope_type]):
        rope[name] = _number(rope, name, where)  # torch takes no int beyond 64 bits
    if rope_type == "yarn":
        for name in YARN_OPTIONS:
            absent = (None,) if name == "attention_factor" else (None, 0)  # as in transformers
            if rope.get(name) not in absent:
                rope[name] = _number(rope, name, where)
        _bool(rope, "truncate", where)
        if rope["rope_theta"] <= 1:
            raise CheckpointError(f"{where}: rope_theta must be above 1 for yarn, got {rope['rope_theta']!r}")
    partial = rope.pop("partial_rotary_factor", None)
    partial = raw.get("partial_rotary_factor") if partial is None else partial
    if partial not in (None, 1):
        raise CheckpointError(f"{where}: partial_rotary_factor must be 1 (the whole head rotates), got {partial!r}")
    if rope_type in ("yarn", "llama3"):
        name = "original_max_position_embeddings"
        beside = raw.get(name, raw.get("max_position_embeddings"))
        original = rope.setdefault(name, beside)
        if (number := _number(rope, name, where)) > sys.maxsize:
            rope[name] = number  # any smaller int stays an int, as transformers requires
        if name in raw and raw[name] != original:  # readers differ in which of the two they take
            raise CheckpointError(f"{where}: {name} must be {original!r} as in {key}, got {beside!r} beside it")
    return rope


def _check_rope_keys(rope, where):
    """Refuse keys that may mean something to other readers. Whether transformers knows them too does not matter."""
    for name in ROPE_AT_ONE:  # DeepSeek-R1-0528-Qwen3-8B has the first
        if rope.get(name) not in (None, 1):
            raise CheckpointError(
                f"{where}.{name} must be 1, got {rope[name]!r}: some readers use it, others do not; "
                "remove it and state attention_factor, the whole factor of queries' and keys' rotation"
            )
    known = {key for keys in ROPE_TYPES.values() for key in keys}
    known.update(YARN_OPTIONS, ROPE_COMMON, ROPE_AT_ONE, ROPE_IDLE)
    for name, value in rope.items():
        if name not in known and value is not None:
            raise CheckpointError(f"{where}.{name} is not supported, got {value!r}: other readers may use it")


def _most_positions(raw, rope, where):
    most = _positive(raw, "max_position_embeddings", where)
    if rope["rope_type"] == "yarn":  # recipes add the scaling and leave max_position_embeddings as it was
        stretched = rope["factor"] * rope["original_max_position_embeddings"]
        most = max(most, int(min(sys.maxsize, stretched)))
    if most < 2:
        raise CheckpointError(f"{where}: max_position_embeddings must be >= 2, got {most}")
    return most


def _eos_ids(raw, vocab_size, where):
    ids = raw.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(_is_int(token) for token in ids):
        raise CheckpointError(f"{where}: eos_token_id must be an integer or a list of integers, got {ids!r}")
    possible = [token for token in ids if 0 <= token < vocab_size]
    if possible != ids:  # the others do no harm, and transformers accepts them
        never = [token for token in ids if token not in possible]
        log.warning("%s: eos_token_id %s never comes, vocab_size is %d", where, never, vocab_size)
    return possible


def _mask_id(raw, vocab_size, where):
    token = raw.get("mask_token_id")
    if not _is_int(token) or not 0 <= token < vocab_size:
        raise CheckpointError(f"{where}: mask_token_id must be within the vocabulary [0, {vocab_size}), got {token!r}")
    return token


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _are_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _bool(raw, key, where):
    value = raw.get(key)
    if not (value is None or isinstance(value, bool)):
        raise CheckpointError(f"{where}: {key} must be true or false, got {value!r}")
    return bool(value)


def _positive(raw, key, where, default=None):
    value = raw.get(key)
    value = default if value is None else value
    if not _is_int(value) or not 1 <= value <= sys.maxsize:
        raise CheckpointError(f"{where}: {key} must be a positive integer, got {value!r}")
    return value


def _number(raw, key, where, default=None):
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{where}: {key} must be a positive number, got {value!r}")
    return float(value)
