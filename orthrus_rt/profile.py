"""Where a cycle's time goes: every op call of one, timed on the engine's own buffers beside the bytes it must move.

Calls are not grouped by guesswork: the cycle runs once with each op recorded, so the list is what it really calls.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from orthrus_rt import dispatch, ops
from orthrus_rt import state as st
from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.exclusive import exclusive, whole
from orthrus_rt.graph import Cycle
from orthrus_rt.kv import OutOfPages
from orthrus_rt.timing import measure, read_bandwidth

CUDA_CHUNK = 100  # calls enqueued at once behind a sleep that hides their launches; far below the driver's queue
DRAFT_PROB = [0.8, 0.1, 0.05]  # of a staged draft and its runners-up
CUDA_SLEEP_CYCLES = 20_000_000  # about 10 ms; up to 16 times as long where the host is slow to launch


@dataclass
class Call:
    """One op call of a recorded function.

    Attributes:
        name: the op, for ``row_linear`` with its weight's inputs and outputs.
        run: the same call again, on the same buffers.
        nbytes: what it must move at least, given what its buffers hold now.
    """

    op: str
    name: str
    run: Callable[[], object]
    nbytes: Callable[[], int]


def _size(*tensors) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def _row_linear_bytes(x, weight, out, *, weight_diff=None, num_rows_ar=None, residual=None, **_) -> int:
    """Each view's weight that has rows, once; activations in and out."""
    n = x.shape[0]
    ar = n if weight_diff is None else num_rows_ar
    weights = (weight.nbytes if ar else 0) + (weight_diff.nbytes if ar < n else 0)
    return weights + _size(x, residual, *(out if isinstance(out, tuple) else (out,)))


def _dual_attn_bytes(q, k_pages, v_pages, page_table, scratch_k, scratch_v, rows, scale, out, **_) -> int:
    """Each sequence's visible keys and values once; queries, block keys and values, output."""
    longest: dict[int, int] = {}
    for seq, prefix in zip(rows.seq.tolist(), rows.prefix_len.tolist(), strict=True):
        longest[seq] = max(prefix, longest.get(seq, 0))
    seen = sum(longest.values())
    _, heads, _, dim = k_pages.shape
    return _size(q, out, scratch_k, scratch_v) + 2 * seen * heads * dim * k_pages.element_size()


def _count_tokens_bytes(state, edits) -> int:
    """Both counters in and one out; every new token's id, its count in and out."""
    n, ring = state.num_slots, state.output.shape[1]
    new = (state.num_output - edits.num_counted[:n]).clamp(0, ring)
    return 3 * _size(state.num_output) + 3 * state.output.element_size() * int(new.sum())


# Least bytes of one call, from its arguments: every input and output once. Shapes: csrc/include/orthrus/params.h.
NBYTES = {
    "embed": lambda token, table, out: 2 * _size(out),
    "rms_norm": lambda x, weight, eps, out, row_index=None: 2 * _size(out),
    "row_linear": _row_linear_bytes,
    "qkv_commit": lambda qkv, *_: 2 * _size(qkv),
    "dual_attn": _dual_attn_bytes,
    "consensus": lambda state, partials, *_: _size(*partials),
    "process_logits": lambda logits, *_, **__: _size(logits),
    "count_tokens": _count_tokens_bytes,
}


def calls_of(run: Callable[[], object]) -> list[Call]:
    """The ops that ``run()`` calls, in order. Native CPU calls are taped instead of run, others run as they come."""
    calls: list[Call] = []

    def recorder(op: str, real: Callable):
        def record(*args, **kwargs):
            again = partial(real, *args, **kwargs)
            if dispatch.native() is not None:
                tape = dispatch.native().cpu.Tape()  # a call without Python's share of it
                with tape.record():
                    again()
                again = tape.replay if len(tape) else again
            else:
                again()
            weight = args[1]
            name = f"row_linear {weight.in_features} x {weight.out_features}" if op == "row_linear" else op
            calls.append(Call(op, name, again, partial(NBYTES[op], *args, **kwargs)))

        return record

    real = {op: getattr(ops, op) for op in dispatch.OPS}
    try:
        for op in dispatch.OPS:
            setattr(ops, op, recorder(op, real[op]))
        run()
    finally:
        for op in dispatch.OPS:
            setattr(ops, op, real[op])
    return calls


def time_calls(calls: list[Call], device: torch.device, *, repeats: int, reset: Callable[[], object] = int):
    """Median microseconds of every call, run in order ``repeats`` times, ``reset()`` before each time."""
    samples, sleep = [], CUDA_SLEEP_CYCLES
    while len(samples) <= repeats:
        reset()
        times, hidden = _once_cuda(calls, sleep) if device.type == "cuda" else (_once(calls), True)
        if hidden or sleep >= 16 * CUDA_SLEEP_CYCLES:
            samples.append(times)
        else:
            sleep *= 2
    return [statistics.median(column) for column in zip(*samples[1:], strict=True)]


def _once(calls: list[Call]) -> list[float]:
    times = []
    for call in calls:
        start = time.perf_counter()
        call.run()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def _once_cuda(calls: list[Call], sleep: int) -> tuple[list[float], bool]:
    """By events. The device sleeps while the host enqueues, so that no call waits for its own launch; whether that was
    so of all.
    """
    times, hidden = [], True
    for first in range(0, len(calls), CUDA_CHUNK):
        chunk = calls[first : first + CUDA_CHUNK]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(chunk) + 1)]
        torch.cuda._sleep(sleep)
        marks[0].record()
        for call, mark in zip(chunk, marks[1:], strict=True):
            call.run()
            mark.record()
        hidden &= not marks[0].query()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)]
    return times, hidden


@contextlib.contextmanager
def staged(engine, plan: CyclePlan, slots: int, context: int) -> Iterator[tuple[Cycle, Callable]]:
    """``(cycle, reset)`` of ``slots`` running sequences with ``context`` committed tokens of random keys and values.

    Every slot has K-1 drafts that look likely, so that a one-pass cycle is one in the middle of decoding: all its rows
    are valid. ``reset()`` puts the slots back where they were. The engine's own pages and buffers are used; whoever
    calls holds the engine's turn. An interrupt in here leaves the engine torn, as in any other call.

    Raises:
        ValueError: the engine has too few slots, pages or positions.
        RuntimeError: the engine is not idle.
    """
    runner, scheduler = engine.runner, engine.scheduler
    if scheduler.waiting or any(scheduler.slots):
        raise RuntimeError("profile: the engine must be idle")
    if not 1 <= slots <= runner.num_slots:
        raise ValueError(f"batch must be within [1, {runner.num_slots}] (max_batch_size), got {slots}")
    blocks = 2 if plan.mode == "one_pass" else 1  # its drafts begin up to a block ahead
    most = engine.max_seq_len - blocks * engine.config.block_len
    if not 1 <= context <= most:
        less = "a block" if blocks == 1 else "two blocks"
        raise ValueError(f"context must be within [1, {most}] (max_seq_len less {less}), got {context}")
    state = runner.state
    with whole(engine):
        try:
            engine._collect(0)  # what is under way belongs to requests that have ended: read it first
            runner.make_room([(plan, runner.num_slots)])
            for slot in range(slots):
                runner.kv.reserve(slot, context + engine.config.block_len)
            for page in set(runner.kv.page_table[:slots].flatten().tolist()):
                runner.kv.pages[:, :, page].normal_()
            cycle = runner.cycle(plan, slots)

            def reset():
                state.cache_seqlens.fill_(context)
                state.limit.fill_(engine.max_seq_len)
                state.stop_ids.fill_(-1)
                state.num_drafts.fill_(plan.block_len - 1)
                state.block_tokens.fill_(1)
                state.runner_up.copy_(runner_up)
                state.draft_prob.copy_(draft_prob)
                state.num_output.zero_()
                state.finish.fill_(st.EMPTY)
                state.finish[:slots] = st.RUNNING

            runner_up = torch.tensor([2, 3], dtype=torch.int32, device=state.runner_up.device)
            draft_prob = torch.tensor(DRAFT_PROB, device=state.draft_prob.device)
            reset()
            yield cycle, reset
        except OutOfPages as error:
            raise ValueError(f"batch {slots} with context {context} does not fit: {error}") from error
        finally:
            runner.reset()
            runner.kv.reset()


@exclusive
def profile(engine, *, mode=None, draft_len=None, fan_out=None, batch: int = 1, context: int = 256, repeats: int = 20):
    """The breakdown of one greedy cycle.

    Returns:
        ``(facts, rows)``. Facts: ``mode``, ``block_len``, ``fan_out``, ``batch``, ``context``,
        ``read_gb_s`` (measured now), ``cycle_us`` (replayed whole), ``ops_us`` (one by one). Rows, slowest
        first: ``op``, ``calls``, ``us``, ``share`` of all ops, ``mbytes``, ``gb_s``, ``of_read``.

    Raises:
        ValueError, RuntimeError: as :func:`staged`; another thread uses the engine, or it is closed.
    """
    device = engine.model.device
    if mode is None:
        mode = "two_pass" if engine.mode == "auto" else engine.mode
    with staged(engine, engine.make_plan(mode, draft_len, fan_out), batch, context) as (cycle, reset):

        def again():
            reset()
            cycle.run()

        cycle_us = measure(again, device, repeats=repeats)["p50"]
        reset()
        calls = calls_of(cycle.run_eager)
        times = time_calls(calls, device, repeats=repeats, reset=reset)
        moved = [call.nbytes() for call in calls]
    bandwidth = read_bandwidth(device)
    facts = {
        **cycle.plan._asdict(), "batch": batch, "context": context,
        "read_gb_s": bandwidth, "cycle_us": cycle_us, "ops_us": sum(times),
    }  # fmt: skip
    rows = {}
    for call, us, nbytes in zip(calls, times, moved, strict=True):
        row = rows.setdefault(call.name, {"op": call.name, "calls": 0, "us": 0.0, "share": 0.0, "mbytes": 0.0})
        row["calls"] += 1
        row["us"] += us
        row["mbytes"] += nbytes * 1e-6
    for row in rows.values():
        row["share"] = row["us"] / sum(times)
        row["gb_s"] = row["mbytes"] / row["us"] * 1e3
        row["of_read"] = row["gb_s"] / bandwidth
    return facts, sorted(rows.values(), key=lambda row: -row["us"])
