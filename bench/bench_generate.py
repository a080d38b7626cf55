"""Whole generations of the embedded model, compared with transformers' greedy ``generate`` in one run.

Every row decodes the same prompts, prefill included. Each prompt runs through all rows before the next one, so that a
temporary slowdown of the machine affects all rows. ``two_pass`` runs with the acceptance of the real model. Peak
resident memory and prefill time are measured in a process of their own.

    python -m bench.bench_generate --out DIR
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from bench import common
from orthrus_rt import checkpoint, prompts, transformers_model
from orthrus_rt.device import dtype_name
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams


class Side:
    """One row: a way of decoding, and its totals over the prompts so far."""

    def __init__(self, row: dict, run):
        self.row, self.run = row, run  # run(ids): new token ids, cycles (0 if not counted)
        self.tokens, self.cycles, self.seconds = [], 0, 0.0

    def decode(self, ids: list[int]) -> None:
        start = time.perf_counter()
        tokens, cycles = self.run(ids)
        self.seconds += time.perf_counter() - start
        self.tokens.append(tokens)
        self.cycles += cycles

    def rates(self) -> dict:
        new = sum(map(len, self.tokens))
        per_cycle = {"tokens_per_cycle": (new - len(self.tokens)) / self.cycles} if self.cycles else {}
        return self.row | {"tok_s": new / self.seconds} | per_cycle


def ours(engine: Engine, params: SamplingParams, mode: str, draft_len: int | None) -> Side:
    def run(ids):
        out = engine.generate(ids, params, mode=mode, draft_len=draft_len)
        return out.token_ids, out.stats.cycles

    dtype = dtype_name(engine.model.dtype)
    return Side({"runtime": "orthrus_rt", "dtype": dtype, "mode": mode, "draft_len": draft_len}, run)


def theirs(model, max_new_tokens: int) -> Side:
    def run(ids):
        return transformers_model.greedy(model, ids, max_new_tokens), 0

    dtype = dtype_name(model.dtype)
    return Side({"runtime": "transformers", "dtype": dtype, "mode": "generate", "draft_len": None}, run)


def decode_all(sides: list[Side], ids: list[list[int]]) -> None:
    """Run every side once over the first prompt, untimed, then prompt by prompt with all sides interleaved."""
    for side in sides:
        side.run(ids[0])
    for prompt in ids:
        for side in sides:
            side.decode(prompt)


def prefill_seconds(run) -> float:
    run()
    samples = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return min(samples)


def load_transformers(dtype: torch.dtype):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(checkpoint.load(common.EMBEDDED_NAME).tokenizer_dir, dtype=dtype).eval()


def long_prompt(tokenizer) -> list[int]:
    """1,000 tokens of text."""
    return tokenizer(" ".join(p.text for p in prompts.load("long"))).input_ids[:1000]


def own_process() -> None:
    """Print, as JSON, the peak resident memory of decoding and the time of a 1,000-token prefill."""
    engine = common.embedded_engine()
    ids = long_prompt(engine.tokenizer)
    engine.generate(ids[:100], SamplingParams(max_new_tokens=32))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = prefill_seconds(lambda: engine.generate(ids, SamplingParams(max_new_tokens=1)))
    print(json.dumps({"peak_bytes": peak, "prefill_tokens": len(ids), "prefill_seconds": seconds}))


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--tokens", type=int, least=2, most=common.MOST_TOKENS, default=64)
    parser.add_argument("--kinds", nargs="+", choices=prompts.KINDS, default=["code", "chat"])
    parser.add_argument("--draft-len", type=int, nargs="+", default=[3, 5, 7, 15])
    parser.add_argument("--own-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.own_process:
        return own_process()
    device = torch.device("cpu")
    checkpoint.load(common.EMBEDDED_NAME)  # on first use it is assembled, which takes memory that decoding does not
    command = [sys.executable, "-m", "bench.bench_generate", "--own-process"]
    alone = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    facts = json.loads(alone.stdout)
    engine = common.embedded_engine(mode="two_pass")
    models = [load_transformers(dtype) for dtype in (torch.float32, torch.bfloat16)]
    params = SamplingParams(max_new_tokens=args.tokens)
    rows, same = [], True
    for kind in args.kinds:
        own = [ours(engine, params, "ar", None), *(ours(engine, params, "two_pass", d) for d in args.draft_len)]
        sides = own + [theirs(model, args.tokens) for model in models]
        ids = [p.encode(engine.tokenizer) for p in prompts.load(kind)]
        decode_all(sides, ids)
        same &= all(side.tokens == own[0].tokens for side in own)
        rows += [{"kind": kind, "prompts": len(ids)} | side.rates() for side in sides]
    long = torch.tensor([long_prompt(engine.tokenizer)])
    with torch.inference_mode():
        for model in models:
            name = dtype_name(model.dtype)
            facts[f"transformers_prefill_seconds_{name}"] = prefill_seconds(lambda m=model: m(long, logits_to_keep=1))
    for row in rows:
        best = max(r["tok_s"] for r in rows if r["kind"] == row["kind"] and r["runtime"] == "transformers")
        row["over_transformers"] = row["tok_s"] / best
    header = common.header(device) | {"model": common.EMBEDDED_NAME, "identical_tokens_in_all_own_modes": same} | facts
    common.report("generate-cpu", header, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
