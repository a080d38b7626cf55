"""An independent oracle: transformers' own Llama and Qwen3 blocks, holding one view's attention weights at a time."""

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM


def build(checkpoint, view: str):
    """The model of one view (``"ar"`` or ``"diffusion"``) in fp32; the diffusion view's weights under the AR names."""
    c = checkpoint.config
    kind, model_type = (Qwen3Config, Qwen3ForCausalLM) if c.family == "qwen3" else (LlamaConfig, LlamaForCausalLM)
    config = kind(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads_q,
        num_key_value_heads=c.num_heads_kv,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
        rope_parameters=dict(c.rope),
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=list(c.eos_token_ids),
        pad_token_id=0,
    )
    weights = {}
    for name, tensor in checkpoint.tensors.items():
        if ("_diff." in name) == (view == "diffusion") or ".self_attn." not in name:
            weights[name.replace("_diff.", ".")] = tensor.float()
    with torch.device("meta"):
        model = model_type(config)
    model.load_state_dict(weights, strict=False, assign=True)
    if c.tie_word_embeddings:
        model.tie_weights()
    fresh = model_type.base_model_prefix  # rotary buffers are not in any checkpoint: rebuild them off the meta device
    base = getattr(model, fresh)
    base.rotary_emb = type(base.rotary_emb)(config=config)
    missing = [n for n, p in model.named_parameters() if p.is_meta]
    if missing:
        raise AssertionError(f"the oracle lacks weights for {missing}")
    return model.eval()


@torch.inference_mode()
def ar_logits(ar_model, ids):
    """fp32 ``[len(ids), vocab_size]``."""
    return ar_model(torch.tensor([ids])).logits[0]


@torch.inference_mode()
def diffusion_logits(ar_model, diffusion_model, prefix, block):
    """fp32 ``[len(block), vocab_size]``: the block's rows see the AR cache of ``prefix`` and each other."""
    cache = DynamicCache()
    ar_model(torch.tensor([prefix]), past_key_values=cache, use_cache=True)
    n, k = len(prefix), len(block)
    return diffusion_model(
        torch.tensor([block]),
        past_key_values=cache,
        attention_mask=torch.zeros(1, 1, k, n + k),
        position_ids=torch.arange(n, n + k)[None],
        use_cache=True,
    ).logits[0]


@torch.inference_mode()
def greedy(ar_model, ids, max_new_tokens, stop=True):
    """transformers' own ``generate``, greedy; the new tokens alone."""
    kwargs = {} if stop else {"eos_token_id": None}
    out = ar_model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=max_new_tokens, **kwargs,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()
