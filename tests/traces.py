"""What a decoding did, to the bit: its tokens, the logits that each was chosen from, and the cache that it left.

The engine runs as usual, with replays of recordings. After each cycle the tap reads what the cycle left in its static
buffers: the last pass's normed hidden rows. From these, one more ``row_linear`` computes the logits that the choices
were made from. In greedy cycles this is checked: the cycle's own partial maxima must be entries of these logits.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field

import pytest
import torch

from orthrus_rt import ops
from orthrus_rt import state as st
from orthrus_rt.cycle import Cycle
from orthrus_rt.engine import Engine
from orthrus_rt.pages import num_pages


@dataclass
class Trace:
    """One request's decoding.

    Attributes:
        logits: by index of the generated token, what ``keep`` made of the AR logits row that chose it.
        best: by the same index, the id of that row's largest logit (the lowest such id).
        cache: digest of every layer's keys and values at the committed positions.
    """

    tokens: list[int] = field(default_factory=list)
    logits: dict[int, object] = field(default_factory=dict)
    best: dict[int, int] = field(default_factory=dict)
    cache: bytes | None = None
    tokens_per_cycle: float = 0.0
    preemptions: int = 0


def digest(tensor: torch.Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=16).digest()


class Tap:
    """Traces of everything that ``engine`` decodes inside :meth:`open`."""

    def __init__(self, engine: Engine, keep):
        self.engine, self.keep = engine, keep
        self.traces: dict[int, tuple[object, Trace]] = {}  # by id() of the request's Stats, which its output has too
        self.replays = self.eager_cycles = 0
        self._before_prompts = 0  # how many logits rows of slots precede those of prompts in the last pass

    @contextlib.contextmanager
    def open(self):
        tap, runner, scheduler = self, self.engine.runner, self.engine.scheduler
        run, take_prompts, vacate = Cycle.run, runner._take_prompts, scheduler.vacate

        def tapped_run(cycle):
            tap._cycle(cycle, run)

        def tapped_take_prompts(prompts, *args):
            before, tap._before_prompts = tap._before_prompts, 0
            logits = tap._logits(before + len(prompts.choosing))[before:]
            for request, row in zip(prompts.choosing, logits, strict=True):
                tap._keep(request, 0, row)
            return take_prompts(prompts, *args)

        def tapped_vacate(request):
            if request.finish_reason is not None:
                tap._trace(request).cache = tap._cache(request)
            return vacate(request)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Cycle, "run", tapped_run)
            patch.setattr(runner, "_take_prompts", tapped_take_prompts)
            patch.setattr(scheduler, "vacate", tapped_vacate)
            yield self

    def take(self, out) -> Trace:
        """The trace of a finished :class:`GenerationOutput`."""
        trace = self._trace(out)
        trace.tokens, trace.tokens_per_cycle = out.token_ids, out.stats.tokens_per_cycle
        trace.preemptions = out.stats.preemptions
        assert sorted(trace.logits) == list(range(len(trace.tokens))), "a token without its logits"
        return trace

    def _trace(self, owner) -> Trace:
        return self.traces.setdefault(id(owner.stats), (owner.stats, Trace()))[1]

    def _logits(self, num_rows: int) -> torch.Tensor:
        """Logits of the first ``num_rows`` rows of the last pass that choose a token."""
        runner, model = self.engine.runner, self.engine.model
        out = torch.empty(num_rows, model.config.vocab_size, dtype=torch.float32, device=model.device)
        normed = runner.activations.normed[:num_rows]
        ops.row_linear(normed, model.lm_head, out, epilogue="logits", workspace=runner.workspace.linear)
        return out

    def _cycle(self, cycle: Cycle, run) -> None:
        state, owners = cycle.state, list(self.engine.scheduler.slots)
        before, running = state.cache_seqlens.tolist(), (state.finish == st.RUNNING).tolist()
        replayed = cycle._replay is not None
        run(cycle)
        if cycle.prompt_rows is None:
            self.replays += replayed
            self.eager_cycles += not replayed
        verify = cycle.passes[-1]
        logits = self._logits(len(verify.logit_rows))
        if cycle.sampling is None:
            check_partials(verify.out, logits)
        own = len(verify.partials[0])
        self._before_prompts = own if cycle.prompt_rows else 0
        logits = logits[:own][verify.logit_rows[:own] < verify.rows.num_rows_ar]
        per_slot = len(logits) // state.num_slots
        for slot, after in enumerate(state.cache_seqlens.tolist()):
            for i in range(after - before[slot] if running[slot] else 0):
                index = before[slot] + i + 1 - len(owners[slot].prompt)
                self._keep(owners[slot], index, logits[slot * per_slot + i])

    def _keep(self, request, index: int, row: torch.Tensor) -> None:
        trace, kept, best = self._trace(request), self.keep(row), int((row == row.max()).int().argmax())
        if index in trace.logits and self.keep is digest:  # decoded again, after its pages were lost
            assert trace.logits[index] == kept
        trace.logits[index], trace.best[index] = kept, best

    def _cache(self, request) -> bytes:
        kv, slot = self.engine.kv, request.slot
        length = int(self.engine.runner.state.cache_seqlens[slot])
        pages = kv.pages[:, :, kv.page_table[slot, : num_pages(length)].long()]
        return digest(pages.transpose(3, 4).flatten(2, 3)[:, :, :length])


def check_partials(partials, logits: torch.Tensor) -> None:
    """The partial maxima are entries of ``logits`` to the bit, and the largest of them is the row's first maximum."""
    value, index = partials
    assert torch.equal(value.view(torch.int32), logits.gather(1, index.long()).view(torch.int32))
    best = value == value.amax(1, keepdim=True)
    chosen = torch.where(best, index, logits.shape[1]).amin(1)
    assert torch.equal(chosen.long(), (logits == logits.amax(1, keepdim=True)).int().argmax(1))


@contextlib.contextmanager
def eager_cycles(engine: Engine):
    """Every cycle runs op by op; none is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cycle, "make_recording", lambda cycle: None)
        engine.runner.drop_cycles()
        yield
    engine.runner.drop_cycles()


@contextlib.contextmanager
def few_pages(engine: Engine, count: int):
    """Only ``count`` pages of the idle engine's cache are free."""
    pool = engine.kv.pool
    held = pool.take(pool.num_free - count)
    try:
        yield
    finally:
        pool.give_back(held)


def decode(engine: Engine, prompts, params, *, together=False, keep=digest, replayed=None, **way) -> list[Trace]:
    """Decode every prompt alone, or all of them ``together``; ``way``: mode, draft_len, ... of generate().

    ``replayed``: True checks that over ten times as many cycles were replays as were not (the first of each kind cannot
    be one), False that none was.
    """
    each = list(params) if isinstance(params, list) else [params] * len(prompts)
    with Tap(engine, keep).open() as tap:
        if together:
            outs = engine.generate(prompts, each, **way)
        else:
            outs = [engine.generate(ids, p, **way) for ids, p in zip(prompts, each, strict=True)]
    if replayed is not None:
        assert (tap.replays > 10 * tap.eager_cycles) if replayed else tap.replays == 0
    traces = [tap.take(out) for out in outs]
    for trace, p in zip(traces, each, strict=True):
        if p.greedy:
            assert [trace.best[i] for i in range(len(trace.tokens))] == trace.tokens
    return traces


def arriving(engine: Engine, jobs, every: int) -> list[Trace]:
    """Submit one of ``jobs``, each ``(prompt, params)``, ``every`` so many steps; returns their traces."""
    traces, waiting, steps = {}, list(jobs), 0
    with Tap(engine, digest).open() as tap:
        while waiting or engine.has_unfinished():
            if waiting and steps % every == 0:
                traces[engine.submit(*waiting.pop(0))] = None
            steps += 1
            for out in engine.step():
                traces[out.request_id] = trace = tap._trace(out)
                trace.tokens += out.new_token_ids
                trace.tokens_per_cycle = out.stats.tokens_per_cycle
    return list(traces.values())


def assert_same(got: list[Trace], want: list[Trace], what="") -> None:
    """Equal tokens, equal logits for each token and equal caches, to the bit."""
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.tokens == b.tokens, (what, n)
        differ = [i for i in b.logits if a.logits[i] != b.logits[i]]
        assert not differ, f"{what}: prompt {n}: the logits of token {differ[0]} differ ({len(differ)} in all)"
        assert a.cache == b.cache is not None, (what, n)
