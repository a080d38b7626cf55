"""Run every benchmark that this machine can run: python tools/bench.py [--out DIR]."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

SERVING = "--device", "cuda", "--rate", "10", "40", "160"
SMALL_OPS = ("qkv_commit", "rms_norm", "embed")
# device, script, arguments
RUNS = [
    ("cpu", "bench_host", ["--device", "cpu"]),
    ("cpu", "bench_cpu_pass", []),
    ("cpu", "bench_row_linear", ["--device", "cpu", "--model", "1.7b", "--layers", "2", "--rows", "1", "8", "32"]),
    ("cpu", "bench_consensus", ["--device", "cpu"]),
    ("cpu", "bench_process_logits", ["--device", "cpu"]),
    *(
        ("cpu", f"bench_{op}", ["--device", "cpu", "--model", "135m", "8b", "--rows", "1", "8", "32", "512"])
        for op in SMALL_OPS
    ),
    ("cpu", "bench_generate", []),
    ("cpu", "bench_sampling", []),
    ("cpu", "bench_prefix", ["--device", "cpu"]),
    ("cpu", "bench_arrivals", ["--device", "cpu"]),
    ("cpu", "bench_long_prompt", ["--device", "cpu"]),
    ("cpu", "bench_serving", ["--device", "cpu"]),
    ("cpu", "bench_invariance", []),
    ("cpu", "bench_dual_attn", ["--device", "cpu", "--heads", "9,3,64", "--context", "4000", "--prefill", "1024"]),
    ("cpu", "bench_decode", ["--model", "smollm2-135m", "--device", "cpu", "--draft-len", "7", "--batch", "1", "8"]),
    ("cpu", "bench_one_pass", ["--device", "cpu"]),
    ("cpu", "bench_hypotheses", []),
    ("cpu", "bench_auto", ["--tokens", "96", "--device", "cpu"]),
    *(("cuda", "bench_row_linear", ["--model", model]) for model in ("1.7b", "4b", "8b")),
    ("cuda", "bench_dual_attn", []),
    ("cuda", "bench_consensus", []),
    ("cuda", "bench_host", ["--device", "cuda"]),
    ("cuda", "bench_process_logits", []),
    *(("cuda", f"bench_{op}", []) for op in SMALL_OPS),
    ("cuda", "bench_invariance", ["--device", "cuda", "--model", "8b"]),
    *(("cuda", "bench_decode", ["--model", model]) for model in ("1.7b", "4b", "8b", "smollm2-135m")),
    ("cuda", "bench_prefix", ["--device", "cuda"]),
    ("cuda", "bench_arrivals", ["--device", "cuda", "--batch", "1", "16", "64"]),
    ("cuda", "bench_long_prompt", ["--device", "cuda", "--prompt", "4000"]),
    ("cuda", "bench_serving", [*SERVING, "--requests", "200", "--batch", "64", "--rounds", "1"]),
    ("cuda", "bench_one_pass", ["--device", "cuda", "--draft-len", "7", "15"]),
    ("cuda", "bench_auto", ["--device", "cuda", "--batch", "1", "4", "16", "64", "--most-rows", "1024"]),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", default=ROOT / "build" / "bench", help="JSON and tables go to its cpu and gpu (%(default)s)"
    )
    args = parser.parse_args()
    failed = 0
    for device, script, options in RUNS:
        name = " ".join([script, *options])
        if device == "cuda" and not torch.cuda.is_available():
            print(f"== {name}: skipped, no CUDA device", flush=True)
            continue
        print(f"== {name}", flush=True)
        out = Path(args.out) / ("gpu" if device == "cuda" else "cpu")
        command = [sys.executable, "-m", f"bench.{script}", *options, "--out", str(out.resolve())]
        failed += subprocess.run(command, cwd=ROOT).returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
