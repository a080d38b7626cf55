"""Decoding and prefill compared with llama.cpp on the same cores, by its ``llama-bench``, which you build.

The embedded model, batch 1. Theirs: ``llama-bench -p 1000 -n 64`` over each file of ``--gguf``, whose weights may have
fewer bits: the model's own base, or the output of ``llama-quantize --allow-requantize BASE OUT BF16``, which has the
values that this engine computes with. Ours: 12 prompts of each kind, 64 tokens each, greedy. ``tok_s`` is for decoding
alone, ``prefill_s`` for 1,000 tokens; medians over rounds in which all runs are interleaved. Both use as many threads
as torch has.

    python -m bench.bench_llama_cpp --llama-bench build/bin/llama-bench --gguf bf16.gguf q4.gguf --out DIR
"""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path
from statistics import median

import torch

from bench import common
from bench.bench_generate import long_prompt
from orthrus_rt import prompts
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams

PROMPT, NEW = 1000, 64


def theirs(program: str, file: str) -> dict:
    """One round of llama-bench over ``file``.

    Raises:
        ValueError: it cannot be run, or fails.
    """
    threads = str(torch.get_num_threads())
    command = [program, "-m", file, "-p", str(PROMPT), "-n", str(NEW), "-t", threads, "-r", "1", "-o", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--llama-bench: {program}: {error.strerror}") from None
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip().rpartition(chr(10))[2]}")
    prefill, decode = json.loads(done.stdout)
    about = {"runtime": f"llama.cpp {decode['build_commit']}", "weights": decode["model_type"].rpartition(" ")[2]}
    return about | {"tok_s": decode["avg_ts"], "prefill_s": prefill["avg_ns"] * 1e-9}


def ours(engine: Engine, ids: list[list[int]], long: list[int], mode: str, draft_len: int | None) -> dict:
    stats = [engine.generate(one, SamplingParams(NEW), mode=mode, draft_len=draft_len).stats for one in ids]
    prefill = engine.generate(long, SamplingParams(1), mode=mode, draft_len=draft_len).stats.prefill_seconds
    about = {"runtime": "orthrus_rt", "weights": "BF16", "mode": mode, "draft_len": draft_len}
    seconds = sum(s.seconds for s in stats)
    return about | {"tok_s": sum(s.tokens - 1 for s in stats) / seconds, "prefill_s": prefill}


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--llama-bench", required=True, metavar="PROGRAM")
    parser.add_argument("--gguf", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--draft-len", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    with common.embedded_engine(mode="two_pass") as engine:
        long = long_prompt(engine.tokenizer)
        runs = {Path(file).name: partial(theirs, args.llama_bench, file) for file in args.gguf}
        for kind in ("code", "chat"):
            ids = [p.encode(engine.tokenizer) for p in prompts.load(kind)[:12]]
            for mode, draft_len in (("ar", None), ("two_pass", args.draft_len)):
                runs[kind, mode] = partial(ours, engine, ids, long, mode, draft_len)
        found: dict = {name: [] for name in runs}
        for turn in range(-1, args.rounds):  # the first warms up
            for name, run in runs.items():
                row = run()
                found[name] += [row] if turn >= 0 else []
    rows = []
    for name, rounds in found.items():
        kind = name[0] if isinstance(name, tuple) else None
        middle = {key: median(row[key] for row in rounds) for key in ("tok_s", "prefill_s")}
        rows.append({"kind": kind} | rounds[0] | middle)
    facts = common.header(torch.device("cpu")) | {"rounds": args.rounds}
    common.report("llama_cpp", facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
