"""The device side of the engine: plans memory up front, runs prompts and cycles, posts results to the host."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from orthrus_rt import dispatch, nvtx, ops
from orthrus_rt import state as st
from orthrus_rt.cycle import COUPLED, Cycle
from orthrus_rt.cycle_plan import CyclePlan, batch_bucket, most_hypotheses
from orthrus_rt.flights import Flights
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.model import Activations, Model, Workspace, forward
from orthrus_rt.out_of_memory import KNOBS, knobs_of_rows, naming_the_knobs
from orthrus_rt.policy import Policy
from orthrus_rt.prefill import PrefillPass, PrefillShape, PromptChunks, Prompts, prefill_rows, round_up
from orthrus_rt.rejection import run_by_rejection, verify
from orthrus_rt.request import Request
from orthrus_rt.results import SlotResults
from orthrus_rt.sampling import MAX_LOGIT_BIAS
from orthrus_rt.state import SlotEdits, SlotSampling, SlotState
from orthrus_rt.stopwatch import Stopwatch
from orthrus_rt.uploads import put, upload

PREFILL_CHUNK = 512  # prompt tokens per pass, of one prompt or of several
# The same while other sequences decode, by device, as their next tokens wait for that pass. On a CPU every row takes
# time, so fewer rows delay those sequences less, while the prompt takes little longer (bench_long_prompt). On a GPU
# rows are cheap.
CHUNK_BESIDE = {"cpu": 128, "cuda": PREFILL_CHUNK}
# Kept of cycles, and again of passes and cycles with prompts; on a GPU each is a graph. `auto` with 32 slots uses some
# 120 shapes with prompts, and recording stops the device.
MAX_RECORDINGS = 256


class Runner:
    """Static buffers for ``num_slots`` sequences of at most ``max_seq_len`` tokens, and all that runs on them."""

    def __init__(self, model: Model, *, num_slots: int, max_seq_len: int, shapes, num_pages: int, max_stop_ids):
        self.model, self.num_slots = model, num_slots
        block_len = model.config.block_len
        self.kv = PagedKvCache(
            model.config, num_slots=num_slots, max_seq_len=max_seq_len, num_pages=num_pages, device=model.device,
            dtype=model.dtype,
        )  # fmt: skip
        ring = max(64, 4 * block_len)
        state = SlotState.allocate(
            num_slots, block_len, ring, max_stop_ids, model.device, max_fan_out=most_hypotheses(block_len - 1)
        )
        results = SlotResults(num_slots, ring, model.device)
        self.flights = Flights(results)
        for name, view in results.views.items():
            view.copy_(getattr(state, name))
        self.state = replace(state, **results.views)
        self.sampling = SlotSampling.allocate(num_slots, model.device)
        self.stopwatch = Stopwatch(model.device)
        self._cycles: dict[tuple, Cycle] = {}  # least recently used first, as in _with_prompts
        # Not on the CPU, where every padding row takes arithmetic.
        self.pads_prefill = model.device.type == "cuda" and dispatch.row_invariant(model.device, model.dtype)
        self._with_prompts: dict[tuple, PrefillPass | Cycle] = {}
        self._room, self._knobs = (0, 0), KNOBS
        self.make_room(shapes)

    def make_room(self, shapes: list[tuple[CyclePlan, int]]) -> None:
        """Make buffers large enough for these cycles, ``(plan, slots)``. If they grow, whatever was built on the
        smaller ones is dropped, so nothing may be running.
        """
        room = tuple(map(max, self._room, *((n * plan.max_rows, n * plan.max_rows_diff) for plan, n in shapes)))
        if room == self._room:
            return
        decoded, rows_diff = room
        rows = self.most_prompt_rows + decoded
        self._knobs = knobs_of_rows(plan.mode for plan, _ in shapes)
        with naming_the_knobs(f"making room for {decoded} rows a pass", self._knobs):
            activations = Activations(self.model, rows, rows_diff, max_logit_rows=decoded + self.num_slots)
            workspace = Workspace.allocate(self.model, max_rows=rows, max_seq_len=self.kv.max_seq_len)
        self.drop_cycles()  # they refer to the old buffers
        self.activations, self.workspace, self._room = activations, workspace, room

    @property
    def most_prompt_rows(self) -> int:
        """The most prompt rows of one pass."""
        return min(PREFILL_CHUNK, self.num_slots * self.kv.max_seq_len)

    @property
    def most_prompt_rows_beside(self) -> int:
        """The most prompt rows of a step in which other sequences decode."""
        return min(self.most_prompt_rows, CHUNK_BESIDE[self.model.device.type])

    def drop_cycles(self) -> None:
        """Free every cycle and prefill pass built so far, with its graph."""
        # Launches whose results have not been read may still be running.
        if self.model.device.type == "cuda" and (self._cycles or self._with_prompts or self.flights.may_fly):
            torch.cuda.synchronize(self.model.device)
        self._cycles.clear()
        self._with_prompts.clear()

    def cycle(
        self, plan: CyclePlan, num_slots: int, sampling: SlotSampling | None = None, shape: PrefillShape | None = None
    ) -> Cycle:
        """The cycle for the batch bucket of ``num_slots`` slots, built on first use. For cycles with prompts of a
        ``shape`` see :meth:`_cached`.
        """
        bucket = batch_bucket(num_slots, self.num_slots)

        def build(shape: PrefillShape | None = None, plain: Cycle | None = None) -> Cycle:
            with naming_the_knobs(f"building the {plan.mode} cycle of {bucket} slots", knobs_of_rows([plan.mode])):
                return Cycle(
                    self.model, self.kv, self.state, bucket, plan,
                    sampling=sampling, activations=self.activations, workspace=self.workspace,
                    shape=shape, plain=plain,
                )  # fmt: skip

        key = (plan, bucket, sampling is not None, sampling is not None and sampling.edits is not None)
        plain = _kept(self._cycles, key, build)
        return plain if shape is None else self._cached(shape, key, partial(build, plain=plain))

    @property
    def graph_bytes(self) -> int:
        """Device memory of recorded graphs."""
        return sum(known.graph_bytes for known in (*self._cycles.values(), *self._with_prompts.values()))

    @property
    def cycle_bytes(self) -> int:
        """Memory of the rows of the kept cycles and passes with prompts."""
        return sum(known.nbytes for known in (*self._cycles.values(), *self._with_prompts.values()))

    def begin(self, request: Request) -> None:
        """Write the request into its slot; the slot does not run until its prefill is complete."""
        state, slot = self.state, request.slot
        put(state.finish, slot, st.EMPTY)
        put(state.cache_seqlens, slot, request.length - 1)
        put(state.num_drafts, slot, 0)
        put(state.num_output, slot, len(request.tokens))
        put(state.limit, slot, request.limit)
        padding = [-1] * (state.stop_ids.shape[1] - len(request.stop_ids))
        state.stop_ids[slot] = upload([*request.stop_ids, *padding], torch.int32, state.stop_ids.device)
        params, sampling = request.params, self.sampling
        put(sampling.temperature, slot, params.temperature)
        put(sampling.top_k, slot, params.top_k)
        put(sampling.top_p, slot, params.top_p)
        put(sampling.min_p, slot, params.min_p)
        put(sampling.seed, slot, request.stats.seed or 0)
        if params.scored:
            self.make_room_for_logits()
        if params.edits and sampling.edits is None:
            with naming_the_knobs("counting tokens for penalties"):
                sampling.edits = SlotEdits.allocate(
                    self.num_slots, self.model.config.vocab_size, MAX_LOGIT_BIAS, state.stop_ids
                )
        if sampling.edits is not None:
            sampling.edits.begin(slot, request.prompt, request.tokens, params)

    def make_room_for_logits(self) -> None:
        """Allocate logits for all rows that choose a token, and their scores; kept until :meth:`make_room`."""
        with naming_the_knobs("making room for logits", self._knobs):
            self.activations.logits(1)
            self.activations.partials(1, "scores")

    @property
    def plain_sampling(self) -> SlotSampling:
        """The sampling parameters without penalties, bias and min_tokens."""
        return replace(self.sampling, edits=None)

    def _sampling(self, requests: list[Request]) -> SlotSampling | None:
        """The sampling parameters that these requests need; None if the logits' partial maxima are enough."""
        if not any(r.params.scored for r in requests):
            return None
        return self.sampling if any(r.params.edits for r in requests) else self.plain_sampling

    def reset(self) -> None:
        """Forget whatever was launched; no slot runs afterwards."""
        self.flights.clear()
        self.state.finish.fill_(st.EMPTY)

    def clear(self, slot: int) -> None:
        """Make the slot's rows invalid from the next cycle on."""
        put(self.state.finish, slot, st.EMPTY)

    def move(self, source: int, target: int) -> None:
        """Move a slot's state; its pages are moved by the scheduler."""
        for tensor in (*vars(self.state).values(), *self.sampling.tensors()):
            tensor[target] = tensor[source]
        self.clear(source)

    @nvtx.ranged("prefill")
    def prefill(self, chunks: PromptChunks) -> None:
        """Run these tokens through the AR view, in one pass."""
        prompts = Prompts(chunks)
        this = self._prefill_pass(prompts.shape(self._sampling(prompts.choosing) is not None))
        this.prompt_rows.load(prompts.laid, prompts.picked)
        with self.stopwatch.time("recording" if this.due_to_record else "prefill"):
            this.run()
        self._take_prompts(prompts, self._score(prompts.choosing, this) if prompts.choosing else [])

    def _score(self, requests: list[Request], this: PrefillPass) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Partial maxima of these requests' first choices, from the output of a prefill pass."""
        n, by_rejection = len(requests), {}
        value, index = (t if t is None else t[:n] for t in this.out)
        for i, request in enumerate(requests):
            if request.rejection:  # must run before the logits are processed in place
                by_rejection[i] = verify(request, value[i : i + 1], [], len(request.prompt))
        if sampling := self._sampling(requests):
            logits = value
            value, index = out = self.activations.partials(n, "scores")
            rows, picked = this.prompt_rows.rows, this.prompt_rows.logit_rows[:n]
            ops.process_logits(logits, rows, picked, sampling, self.state.cache_seqlens, COUPLED, out)
        partials = [(value[i : i + 1], index[i : i + 1]) for i in range(n)]
        for i, choice in by_rejection.items():
            partials[i] = partials[i][0].amax(1, keepdim=True), choice.to(value.device)[:, None]
        return partials

    def _take_prompts(self, prompts: Prompts, partials: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Let requests decode whose last prompt row has run; ``partials``: first choices, of those that choose one.

        To consensus that row is a verification without drafts, whose choice is the first known token. A resumed request
        already knows that token.
        """
        for request in prompts.ended:
            put(self.state.finish, request.slot, st.RUNNING)
            if request.tokens:
                put(self.state.block_tokens[request.slot], 0, request.tokens[-1])
        for request, mine in zip(prompts.choosing, partials, strict=True):
            view = self.state.view(slice(request.slot, request.slot + 1))
            ops.consensus(view, mine, st.STEP_VERIFY, st.NEXT_NONE, None, self.model.config.mask_token_id, 1)
        if prompts.choosing:
            self.flights.post(prompts.choosing, None)

    def _prefill_pass(self, shape: PrefillShape) -> PrefillPass:
        def build(shape: PrefillShape) -> PrefillPass:
            with naming_the_knobs("preparing a prefill"):
                return PrefillPass(self.model, self.kv, self.activations, self.workspace, shape)

        return self._cached(shape, (), build)

    def _cached(self, shape: PrefillShape, cycle: tuple, build):
        """``build(shape)`` of a ``cycle`` (its key) or, if that is empty, of a prefill pass. Where passes with prompts
        are padded, the shape is padded first and what was built is kept.
        """
        if not self.pads_prefill:
            this = build(shape)
            if self.model.device.type == "cpu":
                this.record()  # an op's Python is three times as fast here as after an op that has swept the caches
            return this
        shape = shape.padded(self.most_prompt_rows, self.num_slots, in_cycle=bool(cycle))
        return _kept(self._with_prompts, (shape, *cycle), partial(build, shape))

    def warm_up_prefills(self, scored: bool = False) -> None:
        """Record prefill passes of one prompt for every padded number of rows (here all invalid) where such passes are
        padded. ``scored``: for a prompt whose first token is sampled.
        """
        most = self.most_prompt_rows
        sizes = {min(round_up(n), most) for n in range(1, most + 1)} if self.pads_prefill else ()
        for rows in sorted(sizes):
            for chosen in (0, 1) if rows == most and not scored else (1,):
                this = self._prefill_pass(PrefillShape(rows, 1, rows, chosen, scored))
                this.prompt_rows.load([], [])
                this.warm_up()

    def next_logits(self, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """AR logits fp32 ``[vocab_size]`` of the token after ``token_ids``, and the hidden row ``[hidden_size]`` that
        the head computes them from. Both are valid until the next pass. Uses slot 0, which must be free.
        """
        self.kv.reserve(0, len(token_ids))
        try:
            out = torch.empty(1, self.model.config.vocab_size, dtype=torch.float32, device=self.model.device)
            for first in range(0, len(token_ids), PREFILL_CHUNK):
                rows = prefill_rows([(token_ids[first : first + PREFILL_CHUNK], first, 0)], self.model.device)
                forward(
                    self.model, self.kv, rows, self.activations, self.workspace, epilogue="logits", out=out,
                    logit_rows=upload([rows.num_rows - 1], torch.int32, self.model.device),
                )  # fmt: skip
        finally:
            self.kv.release(0)
        return out[0], self.activations.normed[0]

    def decode_and_prefill(self, requests: list[Request], plan: CyclePlan, policy: Policy | None, chunks: PromptChunks):
        """Launch one cycle whose last pass also takes the prompts' tokens. No request may use rejection sampling."""
        prompts = Prompts(chunks)
        sampling = self._sampling(requests + prompts.choosing)
        shape = prompts.shape(sampling is not None)
        cycle = self.cycle(plan, 1 + max(r.slot for r in requests), sampling, shape)
        cycle.prompt_rows.load(prompts.laid, prompts.picked)
        with self.stopwatch.time("recording" if cycle.due_to_record else "mixed_cycle"):
            cycle.run()
        self.flights.post(requests, plan, None, policy)
        value, index = cycle.first_choices
        self._take_prompts(prompts, [(value[i : i + 1], index[i : i + 1]) for i in range(len(prompts.choosing))])

    def decode(self, requests: list[Request], plan: CyclePlan, policy: Policy | None = None) -> None:
        """Launch one cycle of ``requests``, which hold the running slots; ``policy``: what chose the plan, if any."""
        cycle = self.cycle(plan, 1 + max(r.slot for r in requests), self._sampling(requests))
        by_rejection, steady = any(r.rejection for r in requests), cycle.steady
        with self.stopwatch.time(f"{plan.mode}_cycle" if steady or by_rejection else "recording") as stretch:
            if by_rejection:
                run_by_rejection(cycle, requests)
            else:
                cycle.run()
        self.flights.post(requests, plan, stretch if steady else None, policy)


def _kept(built: dict, key: tuple, build):
    """``built[key]``, or else ``build()``. Keeps the MAX_RECORDINGS most recently used. (A graph that is evicted while
    it runs is freed when it completes.)
    """
    this = built.pop(key, None) or build()
    if len(built) >= MAX_RECORDINGS:
        del built[next(iter(built))]
    built[key] = this
    return this
