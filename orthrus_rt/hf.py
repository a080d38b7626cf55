"""The interface of the published Orthrus code, on this engine."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from numbers import Real

import torch

from orthrus_rt.checkpoint import is_hub_id
from orthrus_rt.device import pick_device
from orthrus_rt.engine import Engine
from orthrus_rt.integers import integer
from orthrus_rt.sampling import SamplingParams, stop_ids

LEAST_TEMPERATURE = 1e-5  # the lowest at which the published code samples


class OrthrusForCausalLM:
    """An :class:`orthrus_rt.Engine` with ``from_pretrained`` and ``generate`` as in the published code.

    >>> import torch
    >>> from orthrus_rt.hf import OrthrusForCausalLM
    >>> model = OrthrusForCausalLM.from_pretrained("smollm2-135m", dtype=torch.bfloat16, max_seq_len=256)
    >>> input_ids = torch.tensor([model.tokenizer("def add(a, b):").input_ids])
    >>> output_ids = model.generate(input_ids=input_ids, max_new_tokens=8, use_diffusion_mode=True)
    >>> output_ids.shape[1] - input_ids.shape[1]
    8
    """

    def __init__(self, engine: Engine):
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls, model: str, *, dtype=torch.bfloat16, device_map="auto", revision=None, attn_implementation=None,
        trust_remote_code=None, **engine_arguments,
    ) -> OrthrusForCausalLM:  # fmt: skip
        """Load a checkpoint.

        Args:
            model: as in :meth:`orthrus_rt.Engine.from_pretrained`.
            dtype: a torch dtype or its name; ``"auto"`` is bfloat16.
            device_map: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or N, or ``{"": one of these}``: the whole model
                lives on one device.
            revision: branch, tag or commit of a hub id; None is main. Ignored unless ``model`` is a hub id.
            attn_implementation: accepted but ignored, as attention is the runtime's own.
            trust_remote_code: accepted but ignored, as no code is ever downloaded.
            engine_arguments: ``max_seq_len``, ``draft_len``, ``adapter`` and ``base_gguf`` of the engine.

        Raises:
            TypeError: an argument is none of these.
            CheckpointError, ValueError: as in :meth:`orthrus_rt.Engine.from_pretrained`.
        """
        if "torch_dtype" in engine_arguments:
            raise TypeError("from_pretrained: torch_dtype is not supported; its name is dtype")
        allowed = {"max_seq_len", "draft_len", "adapter", "base_gguf"}
        supported = ("dtype", "device_map", "revision", *sorted(allowed))
        if unknown := sorted(engine_arguments.keys() - allowed):
            what = f"{', '.join(unknown)} is not supported; supported are {', '.join(supported)}"
            raise TypeError(f"from_pretrained: {what}")
        if isinstance(device_map, Mapping) and device_map.keys() == {""}:
            device_map = device_map[""]
        if isinstance(device_map, int) and not isinstance(device_map, bool):
            device_map = f"cuda:{device_map}"
        if not isinstance(device_map, str | torch.device):
            raise ValueError(f"from_pretrained: device_map must name one device, got {device_map!r}")
        dtype = "bfloat16" if dtype == "auto" else dtype
        if revision is not None and is_hub_id(str(model)):
            model = f"{model}@{revision}"
        return cls(
            Engine.from_pretrained(
                model, device=str(device_map), dtype=dtype, mode="two_pass", max_batch_size=1, **engine_arguments
            )
        )

    @property
    def config(self):
        return self.engine.config

    @property
    def tokenizer(self):
        return self.engine.tokenizer

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        self.engine._check_open()
        return self.engine.model.dtype

    def eval(self) -> OrthrusForCausalLM:
        return self

    def to(self, device) -> OrthrusForCausalLM:
        """Return the model itself, if it is on ``device``.

        Raises:
            ValueError: ``device`` is another device, or a dtype; a model stays as it was loaded.
        """
        if isinstance(device, torch.dtype):
            raise ValueError(f"to: dtype must be passed to from_pretrained, got {device}")
        if pick_device(str(device)) != self.device:
            raise ValueError(f"to: device must be {self.device}, where device_map has put it, got {device}")
        return self

    def close(self) -> None:
        """Release weights and cache; the device can then take another model. Closing twice is harmless."""
        self.engine.close()

    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = 20,
        top_p: float | None = 0.8,
        eos_token_id: int | list[int] | None = None,
        streamer=None,
        use_diffusion_mode: bool = True,
        *,
        attention_mask: torch.Tensor | None = None,
        pad_token_id: int | None = None,
        do_sample: bool | None = None,
    ) -> torch.Tensor:
        """Continue one prompt.

        Args:
            input_ids: integers ``[1, n]``: a tensor, a list, an array, or what a tokenizer or its chat template
                returns, with its ``attention_mask`` then used unless one is passed.
            max_new_tokens: add at most this many tokens.
            max_length: limit on the total length, prompt included; overrides ``max_new_tokens``. 0 counts as None.
            temperature: greedy below 1e-5; otherwise ``top_k`` and ``top_p`` apply, and the seed is drawn from torch's
                global generator, so ``torch.manual_seed`` makes a run repeatable.
            top_k, top_p: off if None, or if they keep all tokens: ``top_k`` <= 0, ``top_p`` >= 1.
            eos_token_id: an id (0 is valid) or a list of ids, instead of the checkpoint's own.
            streamer: its ``put`` receives the prompt, then tokens as they are accepted; its ``end`` is called last.
            use_diffusion_mode: two-pass decoding; False decodes autoregressively. The tokens are the same.
            attention_mask: must be all ones, if given.
            pad_token_id: ignored, as one prompt needs no padding.
            do_sample: must agree with ``temperature``, if given: False is greedy.

        Returns:
            int64 ``[1, n + m]`` on the device of ``input_ids``: the prompt and m new tokens.

        Raises:
            TypeError: an argument is none of these.
            ValueError: a value is out of range, or the length exceeds the engine's ``max_seq_len``.
        """
        if isinstance(input_ids, Mapping) and "input_ids" in input_ids:
            attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
            input_ids = input_ids["input_ids"]
        input_ids = _tensor(input_ids)
        if input_ids.dim() != 2 or input_ids.shape[0] != 1:
            raise ValueError(f"generate: input_ids must have shape [1, n], got {list(input_ids.shape)}")
        if attention_mask is not None:
            mask = _tensor(attention_mask, "attention_mask")
            if mask.shape != input_ids.shape or not bool((mask == 1).all()):
                shape = list(input_ids.shape)
                got = "other values" if mask.shape == input_ids.shape else list(mask.shape)
                raise ValueError(f"generate: attention_mask must be all ones (no padding), of shape {shape}, got {got}")
        if isinstance(temperature, Real) and 0 < temperature < LEAST_TEMPERATURE:
            temperature = 0.0
        if do_sample is not None and isinstance(temperature, Real) and bool(do_sample) != (temperature != 0):
            raise ValueError(
                f"generate: do_sample must be {temperature != 0} at temperature {temperature}, got {do_sample!r}"
            )
        params = self._params(input_ids.shape[1], max_new_tokens, max_length, temperature, top_k, top_p, eos_token_id)
        stream = self.engine.stream(input_ids[0], params, mode="two_pass" if use_diffusion_mode else "ar")
        if streamer is not None:
            streamer.put(input_ids.cpu())
        tokens: list[int] = []
        with contextlib.closing(stream):
            for piece in stream:
                tokens += piece.token_ids
                if streamer is not None and piece.token_ids:
                    streamer.put(torch.tensor(piece.token_ids, dtype=torch.int64, device="cpu"))
        if streamer is not None:
            streamer.end()
        new = torch.tensor([tokens], dtype=torch.int64, device=input_ids.device)
        return torch.cat([input_ids.long(), new], dim=1)

    def _params(self, length, max_new_tokens, max_length, temperature, top_k, top_p, eos_token_id) -> SamplingParams:
        if max_length:
            if (max_length := integer("generate: max_length", max_length)) <= length:
                raise ValueError(f"generate: max_length must exceed the prompt's {length} tokens, got {max_length}")
            max_new_tokens = max_length - length
        elif max_new_tokens is None:
            raise ValueError("generate: max_new_tokens or max_length must be given")
        stop = () if eos_token_id is None else eos_token_id
        with contextlib.suppress(ValueError):
            stop = (integer("eos_token_id", eos_token_id),)
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=0 if top_k is None or (isinstance(top_k, Real) and top_k <= 0) else top_k,
            top_p=1.0 if top_p is None or (isinstance(top_p, Real) and top_p >= 1) else top_p,
            seed=None if temperature == 0 else int(torch.randint(2**62, (), device="cpu")),
            stop_token_ids=[t for t in stop_ids(stop) if 0 <= t < self.config.vocab_size],  # others never occur
            ignore_eos=eos_token_id is not None,
        )
        if length + params.max_new_tokens > self.engine.max_seq_len:
            raise ValueError(
                f"generate: {length + params.max_new_tokens} tokens in all exceed max_seq_len "
                f"{self.engine.max_seq_len}; pass a larger max_seq_len to from_pretrained"
            )
        return params


def _tensor(values, name: str = "input_ids") -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values
    try:
        return torch.tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{type(values).__name__} ({error})"
        raise ValueError(f"generate: {name} must be integers of shape [1, n], got {got}") from error
