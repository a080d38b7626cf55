"""Where a cycle's time goes: each of its op calls, timed on the engine's own buffers, with the bytes it must move, and
by how much the replayed cycle is shorter without them.

The list of calls is not a guess: the cycle runs once with every op recorded, so it holds what is really called.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from orthrus_rt import dispatch, ops
from orthrus_rt.cycle import Cycle
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.dry_run import dry_cycles
from orthrus_rt.exclusive import exclusive
from orthrus_rt.out_of_memory import naming_the_knobs
from orthrus_rt.recording import replay, taped
from orthrus_rt.timing import measure, read_bandwidth, time_each


@dataclass
class Call:
    """One op call of a recorded function.

    Attributes:
        op: as in dispatch.OPS.
        name: the op; for ``row_linear`` with its weight's numbers of inputs and outputs.
        run: repeats the call on the same buffers.
        nbytes: the bytes that it must move at least, given what its buffers hold at present.
    """

    op: str
    name: str
    run: Callable[[], object]
    nbytes: Callable[[], int]


def _size(*tensors) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def _row_linear_bytes(x, weight, out, *, weight_diff=None, num_rows_ar=None, residual=None, exact=True, **_) -> int:
    """The weight of each view that has rows, once; activations in and out."""
    n = x.shape[0]
    ar = n if weight_diff is None else num_rows_ar
    weights = (weight.read_bytes(exact) if ar else 0) + (weight_diff.read_bytes(exact) if ar < n else 0)
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
    """Both counters in and one out; per new token its id in, its count in and out."""
    n, ring = state.num_slots, state.output.shape[1]
    new = (state.num_output - edits.num_counted[:n]).clamp(0, ring)
    return 3 * _size(state.num_output) + 3 * state.output.element_size() * int(new.sum())


# Least bytes of one call, from its arguments: every large input and output once (csrc/include/orthrus/params.h).
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
    """The ops that ``run()`` calls, in order. Native CPU calls are put on tapes instead of run; other calls, and those
    of other threads, run as usual.
    """
    calls: list[Call] = []

    def record(op: str, name: str, again: Callable, *args, **kwargs):
        if dispatch.extension() is not None:
            tape = taped(again)  # the call without the time that Python takes
            again = partial(replay, tape) if len(tape) else again
        else:
            again()
        calls.append(Call(op, name, again, partial(NBYTES[op], *args, **kwargs)))

    with _instead(record):
        run()
    return calls


@contextlib.contextmanager
def _instead(act: Callable) -> Iterator[None]:
    """Instead of every op that this thread calls, ``act(op, name, call, *args, **kwargs)`` with what it was given;
    ``call()`` is the call itself.
    """
    thread, real = threading.get_ident(), {op: getattr(ops, op) for op in dispatch.OPS}

    def acting(op: str):
        def called(*args, **kwargs):
            if threading.get_ident() != thread:
                return real[op](*args, **kwargs)
            name = f"row_linear {args[1].in_features} x {args[1].out_features}" if op == "row_linear" else op
            return act(op, name, partial(real[op], *args, **kwargs), *args, **kwargs)

        return called

    try:
        for op in dispatch.OPS:
            setattr(ops, op, acting(op))
        yield
    finally:
        for op in dispatch.OPS:
            setattr(ops, op, real[op])


def shorter_by(cycle: Cycle, name: str, repeats: int, reset: Callable) -> float | None:
    """Microseconds by which a replay of the cycle is shorter without the calls of this name, whose results are then
    what their buffers held before: the median of ``repeats`` pairs of runs. None if the cycle runs op by op, or if
    there is no memory for another recording.
    """
    if cycle.op_by_op:
        return None
    try:
        with naming_the_knobs("recording a cycle without an op"):
            with _instead(lambda op, called, call, *args, **kwargs: None if called == name else call()):
                run, _ = cycle.make_recording()
            reset()
            run()
    except torch.OutOfMemoryError:
        return None
    whole, _, without = time_each([cycle.run, reset, run], cycle.model.device, repeats=repeats, reset=reset)
    return statistics.median(a - b for a, b in zip(whole, without, strict=True))


def time_calls(calls: list[Call], device: torch.device, *, repeats: int, reset: Callable = lambda: None):
    """Median microseconds of every call, run in order ``repeats`` times, ``reset()`` before each time."""
    columns = time_each([call.run for call in calls], device, repeats=repeats + 1, reset=reset)
    return [statistics.median(column[1:]) for column in columns]


@exclusive
def profile(engine, *, mode: str, draft_len=None, fan_out=None, batch: int = 1, context: int = 256, repeats: int = 10):
    """The breakdown of one greedy cycle.

    Returns:
        ``(facts, rows)``. Facts: ``mode``, ``block_len``, ``fan_out``, ``batch``, ``context``, ``read_gb_s`` (read
        bandwidth, measured in this call), ``cycle_us`` (the whole cycle replayed), ``ops_us`` (sum of the single
        ops). Rows, slowest first: ``op``, ``calls``, ``us``, ``share`` of all ops' time, ``in_cycle_us`` (by how much
        the replayed cycle is shorter without these calls, so that what overlaps with their neighbours does not count;
        None if it runs op by op; their prefetches for other ops go with them, so these need not add up), ``mbytes``,
        ``gb_s``, ``of_read`` (``gb_s / read_gb_s``). Times are medians of ``repeats``, in microseconds; MB and GB are
        decimal.

    Raises:
        ValueError: the engine has too few slots, pages or positions, or an argument is out of range.
        RuntimeError: the engine is not idle, is closed, or is in use by another thread.
    """
    if not engine._idle():
        raise RuntimeError("profile: the engine must be idle")
    device = engine.device
    plan = engine.make_plan(mode, draft_len, fan_out)
    if plan.mode == "auto" or repeats < 1:
        raise ValueError(f"profile: mode must be one of {', '.join(MODES)}, repeats >= 1, got {plan.mode}, {repeats}")
    with dry_cycles(engine, [plan], batch, context) as start:
        cycle, reset = start(plan), partial(start, plan)
        cycle_us = measure(cycle.run, device, repeats=repeats, reset=reset)["p50"]
        reset()
        calls = calls_of(cycle.run_eager)
        times = time_calls(calls, device, repeats=repeats, reset=reset)
        moved = [call.nbytes() for call in calls]
        in_cycle = {name: shorter_by(cycle, name, repeats, reset) for name in {call.name: 0 for call in calls}}
    bandwidth = read_bandwidth(device)
    facts = {
        **cycle.plan._asdict(), "batch": batch, "context": context,
        "read_gb_s": bandwidth, "cycle_us": cycle_us, "ops_us": sum(times),
    }  # fmt: skip
    rows = {}
    for call, us, nbytes in zip(calls, times, moved, strict=True):
        new = {"op": call.name, "calls": 0, "us": 0.0, "share": 0.0, "in_cycle_us": in_cycle[call.name], "mbytes": 0.0}
        row = rows.setdefault(call.name, new)
        row["calls"] += 1
        row["us"] += us
        row["mbytes"] += nbytes * 1e-6
    for row in rows.values():
        row["share"] = row["us"] / sum(times)
        row["gb_s"] = row["mbytes"] / row["us"] * 1e3
        row["of_read"] = row["gb_s"] / bandwidth
    return facts, sorted(rows.values(), key=lambda row: -row["us"])
