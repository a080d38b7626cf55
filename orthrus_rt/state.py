"""Per-slot decode state, resident on the engine's device. Mirrors ``SlotState`` in csrc/include/orthrus/params.h."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from orthrus_rt.uploads import put, upload

# FinishReason
EMPTY, RUNNING, STOP, LENGTH, NO_CHOICE = -1, 0, 1, 2, 3
# ConsensusStep: which pass the choices are from
STEP_DRAFT, STEP_VERIFY, STEP_STAGE, STEP_VERIFY_AND_DRAFT = 0, 1, 2, 3
# NextPass: what to stage
NEXT_NONE, NEXT_DRAFT, NEXT_VERIFY, NEXT_AR, NEXT_ONE_PASS = 0, 1, 2, 3, 4
# Choices kept per draft row: the draft itself, the second and the third likeliest token.
CANDIDATES = 3

# process_logits gives one partial maximum per this many tokens.
SCORE_TILE = 128


def num_score_tiles(vocab_size: int) -> int:
    return -(-vocab_size // SCORE_TILE)


def empty_partials(num_rows: int, num_partials: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """``(value, id)``: fp32 and int32 ``[num_rows, num_partials]``."""
    shape = (num_rows, num_partials)
    value = torch.empty(shape, dtype=torch.float32, device=device)
    return value, torch.empty(shape, dtype=torch.int32, device=device)


@dataclass
class SlotEdits:
    """Changes to a slot's logits before any filter. Ids outside the vocabulary have no effect.

    Attributes:
        penalties: fp32 ``[num_slots, 3]``: repetition (> 0; divides positive and multiplies other logits of tokens
            seen), presence and frequency (subtracted for tokens generated). ``1, 0, 0`` changes nothing.
        token_counts: int32 ``[num_slots, vocab_size]``: times generated so far, or -1 if only in the prompt.
        num_counted: int32 ``[num_slots]`` tokens of the output ring that have been counted.
        bias_ids, bias_values: int32 and fp32 ``[num_slots, max_bias]``, added in order; padded with -1.
        stop_ids: int32 ``[num_slots, max_stop_ids]``, padded with -1; may be the tensor of :class:`SlotState`.
        min_position: int32 ``[num_slots]``: stop ids cannot be chosen for absolute positions below this.
    """

    penalties: torch.Tensor
    token_counts: torch.Tensor
    num_counted: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor
    stop_ids: torch.Tensor
    min_position: torch.Tensor

    @staticmethod
    def allocate(num_slots: int, vocab_size: int, max_bias: int, stop_ids: torch.Tensor) -> SlotEdits:
        """Edits that change nothing."""
        i32, f32 = (dict(dtype=dtype, device=stop_ids.device) for dtype in (torch.int32, torch.float32))
        return SlotEdits(
            penalties=torch.tensor([1.0, 0.0, 0.0], **f32).repeat(num_slots, 1),
            token_counts=torch.zeros(num_slots, vocab_size, **i32),
            num_counted=torch.zeros(num_slots, **i32),
            bias_ids=torch.full((num_slots, max_bias), -1, **i32),
            bias_values=torch.zeros(num_slots, max_bias, **f32),
            stop_ids=stop_ids,
            min_position=torch.zeros(num_slots, **i32),
        )

    def begin(self, slot: int, prompt: list[int], tokens: list[int], params) -> None:
        """Write the edits of ``params`` (a SamplingParams) for a slot with this ``prompt`` and these generated
        ``tokens``.
        """
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self.penalties[slot] = upload(penalties, torch.float32, self.penalties.device)
        put(self.min_position, slot, min(len(prompt) + params.min_tokens, 2**31 - 1))
        put(self.num_counted, slot, len(tokens))
        self.bias_ids[slot] = -1
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            self.bias_ids[slot, : len(ids)] = upload(ids, torch.int32, self.bias_ids.device)
            self.bias_values[slot, : len(ids)] = upload(values, torch.float32, self.bias_values.device)
        if params.penalised:
            counts = dict.fromkeys(prompt, -1) | Counter(tokens)
            ids, times = (upload(list(x), torch.int32, self.penalties.device) for x in (counts, counts.values()))
            self.token_counts[slot] = 0
            self.token_counts[slot, ids.long()] = times

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for name, tensor in vars(self).items() if name != "stop_ids")  # it is SlotState's


@dataclass
class SlotSampling:
    """Sampling parameters, each ``[num_slots]``, as ``process_logits`` takes them; temperature 0 is greedy. The dtypes
    are int32 (``top_k``), int64 (``seed``) and fp32.

    A choice's noise is keyed by (seed, position, token id) alone and shared by both views, so a seed gives the same
    text in every mode: a draft is accepted where the diffusion view, under the same noise, chose as the AR view does.
    ``edits`` is None if no slot needs any.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    edits: SlotEdits | None = None

    @staticmethod
    def allocate(num_slots: int, device) -> SlotSampling:
        """All slots greedy."""
        dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64)
        return SlotSampling(*(torch.zeros(num_slots, dtype=dtype, device=device) for dtype in dtypes))

    def filters(self) -> tuple[torch.Tensor, ...]:
        """Temperature, top-k, top-p and min-p."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors with a slot's parameters."""
        return (*self.filters(), self.seed, *(vars(self.edits).values() if self.edits is not None else ()))


@dataclass
class SlotState:
    """Decode state of ``num_slots`` sequences on one device, int32 unless stated otherwise.

    Entry i of a block belongs to the token at position ``cache_seqlens + i``.

    Attributes:
        cache_seqlens: ``[num_slots]`` committed tokens, whose AR keys/values are in the cache.
        block_tokens: ``[num_slots, max_block_len]`` the known next token t0, then the drafts.
        num_drafts: ``[num_slots]`` drafts to verify, fewer than a cycle's ``block_len``.
        num_verified: ``[num_slots]`` drafts that the last verification checked.
        num_accepted: ``[num_slots]`` drafts that it accepted.
        limit: ``[num_slots]`` total tokens the sequence may have, prompt included.
        stop_ids: ``[num_slots, max_stop_ids]`` ids that end the sequence, padded with -1.
        finish: ``[num_slots]`` EMPTY, RUNNING, STOP, LENGTH or NO_CHOICE (the row that was to give the next token has
            no logit above -inf, as all are NaN or masked).
        output: ``[num_slots, output_capacity]`` ring of emitted tokens.
        num_output: ``[num_slots]`` tokens emitted so far.
        runner_up: ``[num_slots, max_block_len, 2]`` other likely tokens in a draft's place (``one_pass``).
        draft_prob: fp32 ``[num_slots, max_block_len, 3]`` probabilities of the draft and of the runners-up.
        hypotheses: ``[num_slots, max_fan_out, 2]`` what each block of a one-pass cycle supposes: drafts accepted (-1:
            no block) and anchor (-1: the last accepted token); csrc/include/orthrus/hypotheses.h.
    """

    cache_seqlens: torch.Tensor
    block_tokens: torch.Tensor
    num_drafts: torch.Tensor
    num_verified: torch.Tensor
    num_accepted: torch.Tensor
    limit: torch.Tensor
    stop_ids: torch.Tensor
    finish: torch.Tensor
    output: torch.Tensor
    num_output: torch.Tensor
    runner_up: torch.Tensor
    draft_prob: torch.Tensor
    hypotheses: torch.Tensor

    def view(self, slots: slice) -> SlotState:
        """A view of some of the slots, over the same memory."""
        return SlotState(*(tensor[slots] for tensor in vars(self).values()))

    @property
    def num_slots(self) -> int:
        return self.cache_seqlens.shape[0]

    @property
    def max_block_len(self) -> int:
        return self.block_tokens.shape[1]

    @property
    def max_fan_out(self) -> int:
        return self.hypotheses.shape[1]

    @staticmethod
    def allocate(
        num_slots: int, max_block_len: int, output_capacity: int, max_stop_ids: int, device, *, max_fan_out: int = 0
    ) -> SlotState:
        """All slots EMPTY."""

        def zeros(*shape, dtype=torch.int32):
            return torch.zeros(shape, dtype=dtype, device=device)

        return SlotState(
            cache_seqlens=zeros(num_slots),
            block_tokens=zeros(num_slots, max_block_len),
            num_drafts=zeros(num_slots),
            num_verified=zeros(num_slots),
            num_accepted=zeros(num_slots),
            limit=zeros(num_slots),
            stop_ids=zeros(num_slots, max_stop_ids) - 1,
            finish=zeros(num_slots) + EMPTY,
            output=zeros(num_slots, output_capacity),
            num_output=zeros(num_slots),
            runner_up=zeros(num_slots, max_block_len, CANDIDATES - 1),
            draft_prob=zeros(num_slots, max_block_len, CANDIDATES, dtype=torch.float32),
            hypotheses=zeros(num_slots, max_fan_out, 2) - 1,
        )
