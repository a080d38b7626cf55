"""An independent oracle: transformers' own Llama and Qwen3 blocks with one view's attention weights at a time."""

import inspect

import torch
from transformers import DynamicCache


@torch.inference_mode()
def ar_logits(ar_model, ids):
    """fp32 ``[len(ids), vocab_size]``."""
    return ar_model(torch.tensor([ids])).logits[0]


@torch.inference_mode()
def diffusion_logits(ar_model, diffusion_model, prefix, block):
    """fp32 ``[len(block), vocab_size]``: the block's rows see the AR cache of ``prefix`` and each other."""
    named = "cache" if "cache" in inspect.signature(ar_model.forward).parameters else "past_key_values"  # older
    cache = {named: DynamicCache()}
    ar_model(torch.tensor([prefix]), use_cache=True, **cache)
    n, k = len(prefix), len(block)
    return diffusion_model(
        torch.tensor([block]),
        attention_mask=torch.zeros(1, 1, k, n + k),
        position_ids=torch.arange(n, n + k)[None],
        use_cache=True,
        **cache,
    ).logits[0]
