"""Whole generations of the embedded model, side by side with transformers' greedy ``generate`` in one run.

Every row decodes the same prompts, prefill included. ``two_pass`` runs with the acceptance of the real model. A peak of
resident memory and a prefill time are measured in a process of their own.

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
from orthrus_rt import prompts
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams

MODEL = "smollm2-135m"


def ours(kind: str, mode: str, draft_len: int | None, tokens: int, engine: Engine) -> dict:
    """Tokens per second over all prompts of ``kind``, and what came out."""
    params = SamplingParams(max_new_tokens=tokens)
    ids = [p.encode(engine.tokenizer) for p in prompts.load(kind)]
    engine.generate(ids[0], params, mode=mode, draft_len=draft_len)
    start = time.perf_counter()
    outs = [engine.generate(i, params, mode=mode, draft_len=draft_len) for i in ids]
    seconds = time.perf_counter() - start
    cycles = sum(o.stats.cycles for o in outs)
    return {
        "kind": kind,
        "prompts": len(ids),
        "runtime": "orthrus_rt",
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "mode": mode,
        "draft_len": draft_len,
        "tok_s": sum(len(o.token_ids) for o in outs) / seconds,
        "tokens_per_cycle": sum(o.stats.tokens - 1 for o in outs) / cycles,
    } | {"tokens": [o.token_ids for o in outs]}


def theirs(kind: str, dtype: torch.dtype, tokens: int, tokenizer, model) -> dict:
    ids = [torch.tensor([p.encode(tokenizer)]) for p in prompts.load(kind)]

    def run(prompt):
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=tokens)
        return out[0, prompt.shape[1] :].tolist()

    run(ids[0])
    start = time.perf_counter()
    outs = [run(i) for i in ids]
    seconds = time.perf_counter() - start
    return {
        "kind": kind,
        "prompts": len(ids),
        "runtime": "transformers",
        "dtype": str(dtype).removeprefix("torch."),
        "mode": "generate",
        "tok_s": sum(map(len, outs)) / seconds,
    }


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

    from orthrus_rt import checkpoint

    return LlamaForCausalLM.from_pretrained(checkpoint.load(MODEL).tokenizer_dir, dtype=dtype).eval()


def own_process() -> None:
    """Print, as JSON, the peak resident memory of decoding and the time of a 1,000-token prefill."""
    engine = Engine.from_pretrained(MODEL, max_seq_len=2048, max_batch_size=1, prefix_caching=False)
    text = " ".join(p.text for p in prompts.load("long"))
    ids = engine.tokenizer(text).input_ids[:1000]
    engine.generate(ids[:100], SamplingParams(max_new_tokens=32))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = prefill_seconds(lambda: engine.generate(ids, SamplingParams(max_new_tokens=1)))
    print(json.dumps({"peak_bytes": peak, "prefill_tokens": len(ids), "prefill_seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", choices=prompts.KINDS, default=["code", "chat"])
    parser.add_argument("--draft-len", type=int, nargs="+", default=[3, 5, 7, 15])
    parser.add_argument("--out", type=common.out_folder, help="folder for the JSON and the table")
    parser.add_argument("--own-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.own_process:
        return own_process()
    device = torch.device("cpu")
    command = [sys.executable, "-m", "bench.bench_generate", "--own-process"]
    alone = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    facts = json.loads(alone.stdout)
    engine = Engine.from_pretrained(
        MODEL, device="cpu", mode="two_pass", max_seq_len=2048, max_batch_size=1, prefix_caching=False
    )
    rows = []
    for kind in args.kinds:
        rows.append(ours(kind, "ar", None, args.tokens, engine))
        rows += [ours(kind, "two_pass", d, args.tokens, engine) for d in args.draft_len]
    same = all(r["tokens"] == next(x for x in rows if x["kind"] == r["kind"])["tokens"] for r in rows)
    for row in rows:
        del row["tokens"]
    text = " ".join(p.text for p in prompts.load("long"))
    long = torch.tensor([engine.tokenizer(text).input_ids[:1000]])
    for dtype in (torch.float32, torch.bfloat16):
        model = load_transformers(dtype)
        rows += [theirs(kind, dtype, args.tokens, engine.tokenizer, model) for kind in args.kinds]
        with torch.inference_mode():
            name = str(dtype).removeprefix("torch.")
            facts[f"transformers_prefill_seconds_{name}"] = prefill_seconds(lambda m=model: m(long, logits_to_keep=1))
    for row in rows:
        best = max(r["tok_s"] for r in rows if r["kind"] == row["kind"] and r["runtime"] == "transformers")
        row["over_transformers"] = row["tok_s"] / best
    rows.sort(key=lambda r: args.kinds.index(r["kind"]))
    header = common.header(device) | {"model": MODEL, "identical_tokens_in_all_own_modes": same} | facts
    common.report("generate-cpu", header, rows, args.out)


if __name__ == "__main__":
    main()
