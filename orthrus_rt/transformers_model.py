"""transformers' own Llama or Qwen3 with one view of a checkpoint: what this runtime is compared with."""

from __future__ import annotations

import copy
import math

import torch

from orthrus_rt.checkpoint import Checkpoint, expected_tensors
from orthrus_rt.config import CheckpointError
from orthrus_rt.out_of_memory import lacks_memory
from orthrus_rt.room import check_left
from orthrus_rt.storage import is_diffusion

# Keys of config.json about how the weights are stored, which class reads them, and what it returns.
NOT_OF_A_MODEL = {
    "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "is_encoder_decoder",
    "return_dict", "output_attentions", "output_hidden_states", "_attn_implementation", "attn_implementation",
}  # fmt: skip


def build(checkpoint: Checkpoint, view: str = "ar", *, dtype: torch.dtype = torch.float32, device="cpu"):
    """The causal model of one view, ``"ar"`` or ``"diffusion"``, with that view's weights under the AR names.

    Attention is transformers' ``eager`` one. Everything but shapes follows transformers' own reading of config.json.
    ``generate`` stops at the checkpoint's end-of-sequence ids.

    Raises:
        CheckpointError: transformers refuses a config that this runtime has accepted.
        torch.OutOfMemoryError: there is no room for the model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    c = checkpoint.config
    # Read independently: otherwise what we misread or overlook would be wrong in both.
    read = {key: checkpoint.raw[key] for key in checkpoint.raw.keys() - NOT_OF_A_MODEL}
    kind, model_type = (Qwen3Config, Qwen3ForCausalLM) if c.family == "qwen3" else (LlamaConfig, LlamaForCausalLM)
    ours = dict(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads_q,
        num_key_value_heads=c.num_heads_kv,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=list(c.eos_token_ids),
        pad_token_id=0,
    )
    device = torch.device(device)
    try:
        config = kind(**(copy.deepcopy(read) | ours))  # a copy, as kind fills in the rotary parameters
        with torch.device("meta"):
            model = model_type(config)
        base = getattr(model, model_type.base_model_prefix)
        with torch.device(device):  # rotary buffers are in no checkpoint: build them here, not on the meta device
            base.rotary_emb = type(base.rotary_emb)(config=config)
    except Exception as error:  # of any kind, from transformers' own checks or for want of one
        if lacks_memory(error):
            raise
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"{c.name}: transformers cannot read its config ({why})") from error
    names = [n for n in checkpoint.tensors if is_diffusion(n) == (view == "diffusion") or ".self_attn." not in n]
    # On a CPU weights that need no conversion stay in their file; one matrix's dtype stands for all.
    if device.type != "cpu" or checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].dtype != dtype:
        shapes = expected_tensors(c)
        nbytes = dtype.itemsize * sum(math.prod(shapes[name]) for name in names)
        check_left("the weights of transformers' model", nbytes, device, dtype)
    weights = {n.replace("_diff.", "."): checkpoint.tensors[n].to(device=device, dtype=dtype) for n in names}
    model.load_state_dict(weights, strict=False, assign=True)
    if c.tie_word_embeddings:
        model.tie_weights()
    missing = [n for n, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(f"transformers' {model_type.__name__} lacks weights for {', '.join(missing)}")
    return model.eval()


@torch.inference_mode()
def greedy(model, ids: list[int], max_new_tokens: int) -> list[int]:
    """The new tokens, without the prompt, of transformers' own greedy ``generate``."""
    out = model.generate(
        torch.tensor([ids], device=model.device), attention_mask=torch.ones(1, len(ids), dtype=torch.long,
        device=model.device), do_sample=False, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


@torch.inference_mode()
def logits(model, ids: list[int], count: int) -> torch.Tensor:
    """Logits ``[count, vocab_size]`` of the token after each of the last ``count`` ids, from one forward."""
    return model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=count).logits[0]
