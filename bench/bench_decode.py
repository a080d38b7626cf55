"""Whole decode cycles through the engine and through two baselines: how long, how near the floor, how fast.

Official shapes have random weights, so what a two-pass cycle accepts is simulated (``--accepted``, by default what the
published models reach, or would with fewer drafts if each were as likely as another), and every such row says so;
one-pass cycles are timed alone. The embedded model decodes the built-in prompts with its own acceptance. The floor is
the bytes of what a cycle must read in bf16 (each pass's weights, committed keys and values) over the bandwidth measured
in this call. Baselines: ``eager`` (growing cache; one sequence) and ``graphed`` (static cache, torch.mm, SDPA), see
bench/baselines.py. ``device_ms``: how long the device is busy in a cycle, where that is measured.

    python -m bench.bench_decode --model 8b --context 512 8192 32768 --batch 1 4 16 64 --out DIR
    python -m bench.bench_decode --model smollm2-135m --batch 1 8 --out DIR
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from bench import common
from bench.acceptance import mean_accepted, per_position, simulated, trace
from bench.baselines import GrowingCache, StaticCache, Weights
from bench.models import random_checkpoint
from orthrus_rt import checkpoint as ckpt
from orthrus_rt import prompts
from orthrus_rt.cycle_plan import MODES, cycle_plan
from orthrus_rt.engine import Engine
from orthrus_rt.model import Model
from orthrus_rt.prefill import PrefillPass
from orthrus_rt.sampling import SamplingParams

EMBEDDED = ckpt.EMBEDDED_NAME
# Accepted of 31 drafts per cycle by the published models (twice their tokens per forward pass, less the bonus).
PUBLISHED = {"1.7b": 7.5, "4b": 9.4, "8b": 9.7, "tiny": 3.0}
WARM_UP = 4  # cycles
MANY = 1 << 30


class Bench:
    """One model on one device, and what is common to its rows."""

    max_seq_len = 2048  # of the embedded model's engines

    def __init__(self, args):
        self.args, self.device = args, args.device
        self.dtype = torch.bfloat16
        self.real = args.model == EMBEDDED
        if self.real:
            self.checkpoint = ckpt.load(EMBEDDED)
        else:
            self.checkpoint = random_checkpoint(args.model, self.device, args.block_len)
        self.config = self.checkpoint.config
        self.draft_len = args.draft_len or self.config.block_len - 1
        self.accepted = args.accepted
        if self.accepted is None and not self.real:
            self.accepted = mean_accepted(per_position(PUBLISHED[args.model], 31), self.draft_len)
        if not self.real:
            per_position(self.accepted, self.draft_len)  # checks it
        self.bandwidth = common.read_bandwidth(self.device)
        self.cycles = WARM_UP + args.cycles + 1  # of a row, one that is profiled among them
        self.model = None
        if self.positions() > (most := self.config.max_position_embeddings):
            raise ValueError(f"--context: {self.positions()} positions are needed, and the model has {most}")

    def trace(self, mode: str, batch: int) -> torch.Tensor:
        """Accepted drafts of every measured cycle and sequence, ``[cycles, batch]``; used over again around those."""
        if mode != "two_pass":
            return torch.zeros(1, batch, dtype=torch.int32)
        return trace(self.accepted, self.draft_len, self.args.cycles, batch)

    def room(self, context: int, mode: str, batch: int) -> int:
        """Positions of a sequence that starts at ``context`` and never ends while it is measured."""
        accepted = self.trace(mode, batch)
        grown = 1 + accepted[torch.arange(self.cycles) % len(accepted)]
        return context + int(grown.sum(0).max()) + 4 * (self.draft_len + 1)

    def positions(self) -> int:
        """As many as any row needs."""
        cases = ((max(self.args.context), mode, max(self.args.batch)) for mode in self.args.modes)
        return self.max_seq_len if self.real else max(self.room(*case) for case in cases)

    def engine(self, mode: str, batch: int, max_seq_len: int) -> Engine:
        """An engine over weights that all engines of this call share."""

        def shared(checkpoint, **kwargs):
            if self.model is None:
                self.model = Model(checkpoint, **kwargs | {"max_seq_len": self.positions()})
            return self.model

        with mock.patch("orthrus_rt.engine.Model", shared):
            return Engine(
                self.checkpoint, device=self.device, dtype=self.dtype, mode=mode, max_seq_len=max_seq_len,
                draft_len=self.draft_len, fan_out=self.args.fan_out, max_batch_size=batch, num_pages=None,
                prefix_caching=False,
            )  # fmt: skip

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def floor_ms(self, mode: str, batch: int, context: float) -> float:
        """Time to read, in bf16, each pass's weights and every sequence's cache once. Coded weights may be below it."""
        c = self.config
        cache = 2 * batch * context * c.num_layers * c.num_heads_kv * c.head_dim * 2
        passes = {"ar": [("",)], "two_pass": [("_diff",), ("",)], "one_pass": [("", "_diff")]}[mode]
        return sum(self.weight_bytes(views) + cache for views in passes) / self.bandwidth * 1e-6

    def weight_bytes(self, views: tuple[str, ...]) -> int:
        """bf16 bytes of the matrices that a pass with rows of these views reads, the head included."""
        head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        total = 0
        for name, shape in ckpt.expected_tensors(self.config).items():
            attention = "self_attn" in name
            view = "_diff" if name.endswith("_diff.weight") else ""
            mine = view in views if attention else "mlp" in name or name == head
            total += 2 * shape[0] * shape[1] if mine and len(shape) == 2 else 0
        return total

    def row(self, runtime, mode, batch, context, cycle_s, tokens_per_cycle, *, grown=0.0, **more) -> dict:
        """``cycle_s``: seconds per cycle of the whole batch; ``tokens_per_cycle``: of one sequence, whose cache was
        ``grown`` tokens longer than ``context`` on average.
        """
        floor = self.floor_ms(mode, batch, context + grown)
        acceptance = {"ar": "none (ar)"}
        if mode != "ar" and self.real:
            acceptance[mode] = "real"
        elif mode == "two_pass":
            acceptance[mode] = f"simulated acceptance a={self.accepted:.3g}"
        timed_only = mode not in acceptance  # what one_pass would accept is not simulated
        plan = cycle_plan(mode, self.draft_len, self.args.fan_out, self.config)
        return {
            "model": self.args.model,
            "runtime": runtime,
            "mode": mode,
            "block_len": plan.block_len,
            "fan_out": plan.fan_out,
            "batch": batch,
            "context": round(context),
            "acceptance": acceptance.get(mode, "not simulated: time alone"),
            "tokens_per_cycle": None if timed_only else tokens_per_cycle,
            "ms_per_cycle": cycle_s * 1e3,
            "floor_ms": floor,
            "of_floor": floor / (cycle_s * 1e3),
            "tok_s": None if timed_only else batch * tokens_per_cycle / cycle_s,
        } | more


def peak_gb(bench: Bench, engine: Engine | None = None) -> dict:
    """Peak device memory since the last call; on the CPU what the engine planned."""
    if bench.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() * 1e-9
        torch.cuda.reset_peak_memory_stats()
        return {"peak_gb": peak}
    return {"peak_gb": engine.memory_report()["total"] * 1e-9} if engine else {}


def place(engine: Engine, batch: int, context: int) -> None:
    """``batch`` sequences in the middle of their decoding, ``context`` tokens of random keys and values each.

    They are requests like any other, resumed behind a prompt that is not pushed through the network.
    """
    engine.kv.pages.normal_()
    params = SamplingParams(max_new_tokens=engine.max_seq_len, ignore_eos=True)
    for _ in range(batch):
        engine.outbox.get(engine.submit([7] * context, params)).tokens.append(1)
    with (
        mock.patch.object(PrefillPass, "run", lambda _: None),
        mock.patch.object(PrefillPass, "record", lambda _: None),
        mock.patch("orthrus_rt.runner.PREFILL_CHUNK", MANY),
    ):
        engine.step()


def simulated_row(bench: Bench, batch: int, context: int, mode: str) -> dict:
    """The engine's steps, scheduler and results included, over cycles that accept by the trace."""
    length = bench.room(context, mode, batch)
    with simulated(bench.trace(mode, batch)), contextlib.closing(bench.engine(mode, batch, length)) as engine:
        place(engine, batch, context)
        for _ in range(WARM_UP):
            engine.step()
        bench.sync()
        start, tokens = time.perf_counter(), 0
        for _ in range(bench.args.cycles):
            tokens += sum(len(out.new_token_ids) for out in engine.step())
        bench.sync()
        seconds = time.perf_counter() - start
        memory = peak_gb(bench, engine)
    per_cycle = tokens / bench.args.cycles / batch
    more = memory | {"grown": per_cycle * (WARM_UP + bench.args.cycles / 2)}
    return bench.row("orthrus_rt", mode, batch, context, seconds / bench.args.cycles, per_cycle, **more)


def real_row(bench: Bench, batch: int, kind: str, mode: str) -> dict:
    """The built-in prompts of one kind through the engine, ``batch`` at a time; time from the first decode cycle on."""
    ids, params = prompts_of(bench, kind), SamplingParams(max_new_tokens=bench.args.tokens, ignore_eos=True)
    ids *= math.lcm(len(ids), batch) // len(ids)  # no slot stays empty
    with contextlib.closing(bench.engine(mode, batch, bench.max_seq_len)) as engine:
        engine.warmup()  # as prompts end, smaller batches run: their cycles are not built by the clock either
        engine.generate(ids[:batch], SamplingParams(max_new_tokens=8))
        before, start = dict(engine.metrics.times), time.perf_counter()
        outs = engine.generate(ids, params)
        bench.sync()
        engine.step()  # takes the times that were still under way
        seconds = time.perf_counter() - start
        after, memory = engine.metrics.times, peak_gb(bench, engine)

    def spent(kind: str) -> tuple[int, float]:
        then, now = (times.get(kind, (0, 0.0)) for times in (before, after))
        return now[0] - then[0], now[1] - then[1]

    cycles, device_seconds = spent(f"{mode}_cycle")
    mixed, mixed_seconds = spent("mixed_cycle")
    alone = device_seconds / cycles if cycles else 0.0  # what a cycle takes without prompts
    seconds -= spent("prefill")[1] + spent("recording")[1] + mixed_seconds - mixed * alone
    cycles += mixed
    tokens = sum(o.stats.tokens - 1 for o in outs)
    mean = sum(map(len, ids)) / len(ids) + bench.args.tokens / 2
    per_sequence = tokens / sum(o.stats.cycles for o in outs)
    more = memory | {"device_ms": 1e3 * alone, "kind": kind}
    row = bench.row("orthrus_rt", mode, batch, mean, seconds / cycles, per_sequence, **more)
    return row | {"tok_s": tokens / seconds}  # towards the end cycles run with slots empty


def prompts_of(bench: Bench, kind: str) -> list[list[int]]:
    tokenizer = bench.checkpoint.load_tokenizer()
    return [p.encode(tokenizer) for p in prompts.load(kind)[: bench.args.num_prompts]]


def device_busy_ms(run) -> float:
    """The time that kernels take in one call of ``run``, however long the host leaves gaps between them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiled.key_averages()) * 1e-3


def baseline_row(bench: Bench, name: str, weights: Weights, batch: int, context: int, mode: str) -> dict:
    """A baseline's cycles under the same trace, read by the host as they come."""
    if name == "eager":
        baseline = GrowingCache(weights, mode, bench.draft_len)
    else:
        baseline = StaticCache(weights, mode, bench.draft_len, batch, bench.room(context, mode, batch))
    baseline.place(context)
    accepted = bench.trace(mode, batch).tolist()
    steps = iter(range(MANY))

    def cycle():
        return baseline.cycle(accepted[next(steps) % len(accepted)])

    for _ in range(WARM_UP):
        cycle()
    bench.sync()
    start, tokens = time.perf_counter(), 0
    for _ in range(bench.args.cycles):
        tokens += sum(map(len, cycle()))
    bench.sync()
    seconds = time.perf_counter() - start
    per_cycle = tokens / bench.args.cycles / batch
    more = peak_gb(bench) | {"grown": per_cycle * (WARM_UP + bench.args.cycles / 2)}
    if bench.device.type == "cuda":
        more["device_ms"] = device_busy_ms(cycle)
    return bench.row(f"baseline {name}", mode, batch, context, seconds / bench.args.cycles, per_cycle, **more)


def real_baseline_row(bench: Bench, name: str, weights: Weights, kind: str, mode: str) -> dict:
    """A baseline over the prompts of one kind, one after another, prefill left out as for the engine."""
    seconds = tokens = cycles = 0
    ids = prompts_of(bench, kind)
    for prompt in ids:
        if name == "eager":
            baseline = GrowingCache(weights, mode, bench.draft_len)
        else:
            length = len(prompt) + bench.args.tokens + 4 * (bench.draft_len + 1)
            baseline = StaticCache(weights, mode, bench.draft_len, 1, length)
        baseline.prefill([prompt])
        baseline.cycle()  # a graph's recording is not part of decoding
        bench.sync()
        start, total = time.perf_counter(), 1
        while total < bench.args.tokens:
            total += len(baseline.cycle()[0])
            cycles += 1
        bench.sync()
        seconds += time.perf_counter() - start
        tokens += min(total, bench.args.tokens) - 1
    more = {"kind": kind} | peak_gb(bench)
    if bench.device.type == "cuda":
        more["device_ms"] = device_busy_ms(baseline.cycle)
    mean = sum(map(len, ids)) / len(ids) + bench.args.tokens / 2
    return bench.row(f"baseline {name}", mode, 1, mean, seconds / cycles, tokens / cycles, **more)


def attempt(measure, *args) -> dict | None:
    """The row, or None where it does not fit into the device's memory."""
    try:
        return measure(*args)
    except torch.OutOfMemoryError as error:
        case = " ".join(str(a) for a in args[1:] if not isinstance(a, Weights))
        print(f"does not fit: {case}: {' '.join(str(error).split())}", flush=True)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def rows_of(bench: Bench) -> list[dict]:
    args, rows = bench.args, []

    def measured(*args):
        if row := attempt(*args):
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        return row

    def add(measure, *rest, modes):
        """A row of each mode, the median by time of ``--rounds`` that took turns."""
        rounds = [[measured(measure, bench, *rest, mode) for mode in modes] for _ in range(args.rounds)]
        for tried in zip(*rounds, strict=True):
            if all(tried):
                rows.append(sorted(tried, key=lambda row: row["ms_per_cycle"])[(len(tried) - 1) // 2])

    cases = args.kinds if bench.real else args.context
    for case in cases:
        for batch in args.batch:
            add(real_row if bench.real else simulated_row, batch, case, modes=args.modes)
    bench.model = None  # the baselines bring weights of their own
    modes = [mode for mode in args.modes if mode != "one_pass"]
    for name in args.baselines:
        gc.collect()
        weights = Weights(bench.checkpoint, bench.device, bench.dtype, bench.positions(), fused=name == "graphed")
        for case in cases:
            for batch in args.batch if name == "graphed" and not bench.real else (1,):
                if bench.real:
                    add(real_baseline_row, name, weights, case, modes=modes)
                else:
                    add(baseline_row, name, weights, batch, case, modes=modes)
        del weights
    return with_speed_up(rows)


def with_speed_up(rows: list[dict]) -> list[dict]:
    """``over_ar``: tokens per second over this engine's own AR decoding of the same case."""

    def case(row):
        return row["batch"], row.get("kind", row["context"])

    own = {case(r): r["tok_s"] for r in rows if r["runtime"] == "orthrus_rt" and r["mode"] == "ar"}
    known = [row["tok_s"] is not None and case(row) in own for row in rows]
    return [r | {"over_ar": r["tok_s"] / own[case(r)] if k else None} for r, k in zip(rows, known, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser_of(__doc__, device="auto")
    parser.add_argument("--model", choices=(*PUBLISHED, EMBEDDED), required=True)
    parser.add_argument("--context", type=int, nargs="+", default=[1024], help="official shapes: committed tokens")
    parser.add_argument("--kinds", nargs="+", choices=prompts.KINDS, default=["code", "chat"], help="embedded model")
    parser.add_argument("--num-prompts", type=int, help="embedded model: only the first prompts of each kind")
    parser.add_argument("--tokens", type=int, default=128, help="embedded model: new tokens of each prompt")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--baselines", nargs="*", choices=("eager", "graphed"), default=["eager", "graphed"])
    parser.add_argument("--block-len", type=int, default=32, help="official shapes: K of the checkpoint")
    parser.add_argument("--draft-len", type=int, help="drafts per cycle; K-1 by default")
    parser.add_argument("--fan-out", type=int, help="blocks that a one_pass cycle drafts; the engine's own by default")
    parser.add_argument("--accepted", type=float, help="official shapes: accepted drafts per cycle to simulate")
    parser.add_argument("--cycles", type=int, default=64, help="measured cycles per row")
    parser.add_argument("--rounds", type=int, default=1, help="of all modes in turn; each row is the median of as many")
    args = parser.parse_args(argv)
    with torch.inference_mode():
        bench = Bench(args)
        rows = rows_of(bench)
    given = [*(sys.argv[1:] if argv is None else argv)]
    if args.out in given:
        given[given.index(args.out)] = "DIR"
    command = " ".join(["python -m bench.bench_decode", *given])
    facts = common.header(bench.device) | {"read_bandwidth_gb_s": bench.bandwidth, "command": command}
    if bench.device.type == "cpu":
        facts["nice"] = os.nice(0)
    common.report(f"decode-{Path(args.model).name}", facts, rows, args.out)


if __name__ == "__main__":
    main()
