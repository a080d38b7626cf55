"""Against transformers: logits of both views from its own blocks, and its own greedy ``generate`` token for token."""

import dataclasses

import pytest
import torch
from transformers import Qwen3Config

from orthrus_rt import checkpoint as ckpt
from orthrus_rt import prompts
from orthrus_rt.prefill import prefill_rows
from orthrus_rt.sampling import SamplingParams
from orthrus_rt.transformers_model import build, greedy
from tests import checkpoints, engines
from tests import transformers_oracle as oracle
from tests.forward import draft_rows, logits_of
from tests.pins import SLOW

VARIANTS = {
    "qwen3": dict(family="qwen3"),
    "qwen3-untied": dict(family="qwen3", tie_word_embeddings=False),
    "llama": dict(family="llama"),
    "llama-rope-llama3": dict(
        family="llama",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "qwen3-rope-yarn": dict(
        family="qwen3",
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        },
    ),
}  # fmt: skip


def loaded(name, max_seq_len):
    """``(checkpoint, transformers' AR model, our engine)``"""
    checkpoint = ckpt.load(name)
    engine = engines.make(name, dtype="float32", max_seq_len=max_seq_len)
    return checkpoint, build(checkpoint), engine


@pytest.fixture(scope="module")
def embedded(wheel):
    return loaded("smollm2-135m", 2048)


def both_views_agree(checkpoint, ar, engine):
    diffusion = build(checkpoint, "diffusion")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, engine.config.vocab_size, (130,), generator=generator).tolist()
    n, k = len(ids), engine.config.block_len
    engine.kv.reserve(0, 256)
    got = logits_of(engine, prefill_rows([(ids, 0, 0)], "cpu"))
    want = oracle.ar_logits(ar, ids)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    block = [5] + [engine.config.mask_token_id] * (k - 1)
    rows = draft_rows(torch.tensor(block, dtype=torch.int32), n)
    got = logits_of(engine, rows)
    engine.kv.release(0)
    want = oracle.diffusion_logits(ar, diffusion, ids, block)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_both_views_tiny(variant, tmp_path):
    checkpoints.make(tmp_path, **VARIANTS[variant])
    both_views_agree(*loaded(str(tmp_path), 256))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_rotary_embedding_is_as_transformers_reads_it(tmp_path, adapter):
    """It is read from config.json (the base's if there is an adapter), so comparisons show a misreading of ours."""
    yarn = VARIANTS["qwen3-rope-yarn"]["rope_parameters"]
    folder, view = checkpoints.make(tmp_path / "whole", rope_scaling=yarn), None
    if adapter:
        folder, view = checkpoints.make_base_and_adapter(tmp_path, "qwen3", rope_scaling=yarn)
    checkpoint = ckpt.load(folder, adapter=view)
    want = build(checkpoint).config.rope_parameters
    assert want == Qwen3Config.from_pretrained(folder).rope_parameters == yarn
    misread = dataclasses.replace(checkpoint.config, rope={"rope_type": "default", "rope_theta": 1e4})
    assert build(dataclasses.replace(checkpoint, config=misread)).config.rope_parameters == yarn
    assert checkpoint.raw["rope_scaling"] == yarn  # unchanged


def test_yarn_that_leaves_the_original_length_to_its_default(tmp_path):
    """The default is max_position_embeddings as given, not as extended by the factor."""
    folder = checkpoints.make(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0}, max_position_embeddings=160)
    checkpoint = ckpt.load(folder)
    config = build(checkpoint).config
    assert config.max_position_embeddings == 160 and checkpoint.config.max_position_embeddings == 640
    assert config.rope_parameters["original_max_position_embeddings"] == 160
    assert checkpoint.config.rope["original_max_position_embeddings"] == 160


def test_what_we_do_not_read_is_read_too(tmp_path):
    """The transformers model gets all of config.json but shapes, so every comparison shows what we overlook."""
    checkpoint = ckpt.load(checkpoints.make(tmp_path))
    other = checkpoint.raw | {"is_causal": False, "hidden_act": "gelu"}
    other |= {"return_dict": False, "output_attentions": True, "is_encoder_decoder": True, "torch_dtype": "float16"}
    model = build(dataclasses.replace(checkpoint, raw=other | {"_attn_implementation": "flash_attention_2"}))
    assert model.config.is_causal is False and model.config.hidden_act == "gelu"
    assert len(greedy(model, [1, 2, 3], 4)) == 4


def test_logits_of_both_views_embedded(embedded):
    both_views_agree(*embedded)


def same_as_generate(embedded, chosen, max_new_tokens, *, together, draft_len=None):
    """Check our tokens against those of transformers' ``generate``. Returns the cycles of two_pass for each prompt."""
    _, ar, engine = embedded
    ids, params = [prompt.encode(engine.tokenizer) for prompt in chosen], SamplingParams(max_new_tokens)
    want = [greedy(ar, each, max_new_tokens) for each in ids]
    for mode in ("ar", "two_pass"):
        batches = [ids] if together else [[each] for each in ids]
        outs = [out for batch in batches for out in engine.generate(batch, params, mode=mode, draft_len=draft_len)]
        for prompt, out, tokens in zip(chosen, outs, want, strict=True):
            assert out.token_ids == tokens, (prompt.name, mode)
    return [out.stats.cycles for out in outs]


def test_tokens_of_generate_small_grid(embedded):
    pinned = {"code": 4, "chat": 6} | ({} if SLOW else {"long": 5, "math": 3, "data": 3, "prose": 5})
    chosen = [prompts.load(kind)[0] for kind in pinned]
    assert same_as_generate(embedded, chosen, 12, together=True, draft_len=5) == list(pinned.values())


@pytest.mark.full
def test_tokens_of_generate_whole_grid(embedded):
    assert len(prompts.load()) >= 50
    cycles = same_as_generate(embedded, prompts.load(), 128, together=False)
    assert sum(cycles) == pytest.approx(1677, rel=0.01)  # for 6,175 tokens
