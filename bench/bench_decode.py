"""Whole decode cycles of the engine and of two baselines: their time, how near it is to the floor, and their speed.

Official shapes have random weights, so acceptance is simulated, and every such row says so. A two-pass cycle accepts
``--accepted`` drafts: by default as many as the published models, or as they would with fewer drafts if every draft
were equally likely to be accepted. A one-pass cycle accepts two thirds of that if a block came true (``--hit-rate`` of
all cycles) and otherwise nothing, by default as measured with the embedded model. The embedded model itself decodes the
built-in prompts with its real acceptance. The floor is the bytes that a cycle must read (each pass's weights as the
engine stores them, in 16 bits or 12, those of a baseline in bf16; committed keys and values) divided by the bandwidth
measured in this call. Baselines: ``eager`` (growing cache; one sequence) and ``graphed`` (static cache, torch.mm,
SDPA), see bench/baselines.py. ``device_ms``: how long the device is busy in a cycle, where that is measured.

    python -m bench.bench_decode --model 8b --context 512 8192 32768 --batch 1 4 16 64 --out DIR
    python -m bench.bench_decode --model smollm2-135m --batch 1 8 --out DIR
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shlex
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from bench import common
from bench.acceptance import simulated
from bench.baselines import Weights
from bench.decode_baselines import baseline_row, device_ms, for_each_baseline, real_baseline_row
from bench.decode_cases import MANY, PUBLISHED, WARM_UP, Bench, case_of, peak_gb, prompts_of
from orthrus_rt import prompts
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.engine import Engine
from orthrus_rt.out_of_memory import lacks_memory
from orthrus_rt.prefill import PrefillPass
from orthrus_rt.sampling import SamplingParams


def place(engine: Engine, batch: int, context: int) -> None:
    """Start ``batch`` sequences in the middle of decoding, each with ``context`` tokens of random keys and values.

    They are ordinary requests, resumed after a prompt that is not run through the network.
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
    """The engine's steps, including scheduler and results, over cycles that accept according to the trace."""
    length = bench.room(context, mode, batch)
    with simulated(bench.trace(mode, batch)), contextlib.closing(bench.engine(mode, batch, length)) as engine:
        place(engine, batch, context)
        for _ in range(WARM_UP):
            engine.step()
        bench.begin()
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
    ids *= math.lcm(len(ids), batch) // len(ids)  # leaves no slot empty
    with contextlib.closing(bench.engine(mode, batch, bench.max_seq_len)) as engine:
        engine.warmup()  # as prompts end, smaller batches run, whose cycles must not be built in the timed part either
        engine.generate(ids[:batch], SamplingParams(max_new_tokens=8))
        before, start = dict(engine.metrics.times), time.perf_counter()
        outs = engine.generate(ids, params)
        bench.sync()
        engine.step()  # collects the times that were outstanding
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
    return row | {"tok_s": tokens / seconds}  # towards the end cycles run with empty slots


def attempt(measure, *args):
    """The result of ``measure``, or None if it does not fit into the device's memory."""
    case = " ".join(str(a) for a in args[1:] if not isinstance(a, Weights))
    try:
        return measure(*args)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        print(f"does not fit: {case}: {' '.join(str(error).split())}", flush=True)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def rows_of(bench: Bench, save) -> list[dict]:
    """``save(rows)`` stores the rows so far."""
    args, rows = bench.args, []

    def measured(*args):
        if row := attempt(*args):
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        return row

    def add(measure, *rest, modes):
        """Add a row for each mode: the median by time over ``--rounds`` interleaved rounds."""
        rounds = [[measured(measure, bench, *rest, mode) for mode in modes] for _ in range(args.rounds)]
        for tried in zip(*rounds, strict=True):
            if all(tried):
                rows.append(sorted(tried, key=lambda row: row["ms_per_cycle"])[(len(tried) - 1) // 2])
        save(with_speed_up(rows))

    for case in bench.cases:
        for batch in args.batch:
            add(real_row if bench.real else simulated_row, batch, case, modes=args.modes)
    bench.model = None  # the baselines have weights of their own
    modes = [mode for mode in args.modes if mode != "one_pass"]
    measure = real_baseline_row if bench.real else baseline_row
    for_each_baseline(bench, lambda *given: add(measure, *given, modes=modes))
    if bench.profiles:  # only now, as every launch may take longer once the profiler has run
        by_case = {(row["runtime"], case_of(row), row["mode"]): row for row in rows}

        def add_device_ms(name, weights, batch, case):
            for mode in modes:
                if row := by_case.get((f"baseline {name}", (batch, case), mode)):
                    row["device_ms"] = attempt(device_ms, bench, name, weights, batch, case, mode)
            save(with_speed_up(rows))

        for_each_baseline(bench, add_device_ms)
    return with_speed_up(rows)


def with_speed_up(rows: list[dict]) -> list[dict]:
    """``over_ar``: tokens per second over this engine's own AR decoding of the same case."""
    own = {case_of(r): r["tok_s"] for r in rows if r["runtime"] == "orthrus_rt" and r["mode"] == "ar"}
    known = [row["tok_s"] is not None and case_of(row) in own for row in rows]
    return [r | {"over_ar": r["tok_s"] / own[case_of(r)] if k else None} for r, k in zip(rows, known, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser_of(__doc__, device="auto")
    parser.add_argument("--model", choices=(*PUBLISHED, common.EMBEDDED_NAME), required=True)
    parser.add_argument("--context", type=int, nargs="+", default=[1024], help="official shapes: committed tokens")
    parser.add_argument("--kinds", nargs="+", choices=prompts.KINDS, default=["code", "chat"], help="embedded model")
    parser.add_argument("--num-prompts", type=int, help="embedded model: only the first prompts of each kind")
    parser.add_argument(
        "--tokens", type=int, least=2, most=common.MOST_TOKENS, default=128, help="embedded model: of each prompt"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--baselines", nargs="*", choices=("eager", "graphed"), default=["eager", "graphed"])
    parser.add_argument("--block-len", type=int, default=32, help="official shapes: K of the checkpoint")
    parser.add_argument("--draft-len", type=int, help="drafts per cycle; K-1 by default")
    parser.add_argument("--fan-out", type=int, help="blocks that a one_pass cycle drafts; the engine's own by default")
    parser.add_argument(
        "--accepted", type=float, least=0, help="official shapes: accepted drafts per cycle to simulate"
    )
    parser.add_argument(
        "--hit-rate",
        type=float,
        least=0,
        most=1,
        help="official shapes: share of one_pass cycles whose block came true",
    )
    parser.add_argument("--cycles", type=int, default=64, help="measured cycles per row")
    parser.add_argument("--rounds", type=int, default=1, help="of all modes in turn; each row is the median of as many")
    args = parser.parse_args(argv)
    given = [*(sys.argv[1:] if argv is None else argv)]
    for i, option in enumerate(given):
        if option == "--out":
            given[i + 1] = "DIR"
        elif option.startswith("--out="):
            given[i] = "--out=DIR"
    command = shlex.join(["python", "-m", "bench.bench_decode", *given])
    name, revision = f"decode-{Path(args.model).name}", common.header(args.device)["revision"]

    def facts() -> dict:
        known = common.header(args.device) | {"revision": revision, "read_bandwidth_gb_s": bench.bandwidth}
        return known | {"command": command} | ({"nice": os.nice(0)} if args.device.type == "cpu" else {})

    with torch.inference_mode():
        bench = Bench(args)
        rows = rows_of(bench, lambda rows: common.save(name, facts(), rows, args.out))
    common.report(name, facts(), rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
