"""Shared by all benchmarks: options, timing (see orthrus_rt/timing.py), graphs, the header, the report."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from orthrus_rt.checkpoint import EMBEDDED_NAME
from orthrus_rt.device import pick_device
from orthrus_rt.engine import Engine
from orthrus_rt.info import device_facts
from orthrus_rt.terminal import figures
from orthrus_rt.timing import measure, percentiles, time_each
from orthrus_rt.timing import read_bandwidth as read_bandwidth
from orthrus_rt.versions import installed
from orthrus_rt.weights import codes_for_cuda

MOST_TOKENS = 1500  # of a request, which leaves room for the longest built-in prompt in an engine of 2,048


class Parser(argparse.ArgumentParser):
    """A parser whose numbers are finite and above 0, or within ``least`` and ``most`` if an option has these."""

    def add_argument(self, *names, least: float | None = None, most: float = math.inf, **how):
        if (kind := how.get("type")) in (int, float):
            how["type"] = functools.partial(_number, kind, least, most)
        return super().add_argument(*names, **how)


def _number(kind: type, least: float | None, most: float, text: str):
    try:
        value = kind(text)
        fits = math.isfinite(value) and value <= most and (value > 0 if least is None else value >= least)
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        what = "a whole number" if kind is int else "a number"
        low = "> 0" if least is None else f">= {least}"
        high = "" if most == math.inf else f" and <= {most}"
        raise argparse.ArgumentTypeError(f"must be {what} {low}{high}, got {text!r}")
    return value


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script, which ends with a message if its options do not fit together, or do not fit into a GPU's memory."""
    try:
        sys.exit(main())
    except (ValueError, torch.OutOfMemoryError) as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {' '.join(str(error).split())}")


def parser_of(doc: str, device: str | None = None) -> Parser:
    """The parser of a script whose docstring is ``doc``, with ``--out``; and ``--device``, if its default is given."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=out_folder, help="folder for the JSON and the table")
    if device is not None:
        parser.add_argument("--device", type=_device, default=device, help="auto, cpu, cuda or cuda:N (%(default)s)")
    return parser


def _device(text: str) -> torch.device:
    try:
        device = pick_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and synchronisation use the current device
    return device


def embedded_engine(device: torch.device | str = "cpu", mode: str = "auto", **options) -> Engine:
    """An engine for the embedded model, by default for one request at a time of up to 2,048 tokens, without prefix
    caching.
    """
    defaults = dict(max_seq_len=2048, max_batch_size=1, prefix_caching=False)
    return Engine.from_pretrained(EMBEDDED_NAME, device=device, mode=mode, **defaults | options)


def graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``run`` as one CUDA graph, so that launches cost the host nothing; unchanged on the CPU."""
    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize()
    graph, inference = torch.cuda.CUDAGraph(), torch.is_inference_mode_enabled()
    # What torch creates once for all graphs of the process must be usable outside inference mode too.
    with torch.inference_mode(False), torch.cuda.graph(graph), torch.inference_mode(inference):
        run()
    return graph.replay


SPINNING_S = 0.03  # longer than torch's threads keep spinning after an op (some 10 ms) and occupy cores


def measure_in_turns(
    runs: dict[str, Callable[[], object]], device: torch.device, *, repeats: int
) -> dict[str, dict[str, float]]:
    """The results of :func:`measure` for each run, on a GPU as one graph. On a CPU the runs are interleaved, so that a
    time in which the machine is busy affects all of them alike."""
    if device.type == "cuda":
        return {name: measure(graphed(run, device), device, repeats=repeats) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-3, repeats):  # three to warm up
        for name, run in runs.items():
            time.sleep(SPINNING_S)
            us = time_each([run], device, repeats=1)[0]
            samples[name] += us if turn >= 0 else []
    return {name: percentiles(of) for name, of in samples.items()}


def loop(name: str, run: Callable[[], object], count: int) -> None:
    """``run`` over and over under the NVTX range ``name``, for a profiler."""
    if not torch.cuda.is_available():
        raise SystemExit("--loop is for a GPU's profiler, and there is no GPU")
    with torch.cuda.nvtx.range(name):
        for _ in range(count):
            run()
    torch.cuda.synchronize()


def _said(*command: str) -> str:
    """A command's output; empty if it is missing or fails, which must not cost a measurement."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _revision() -> str:
    """The revision, with ``-dirty`` if tracked files other than results have changed since."""
    git = "git", "-C", str(Path(__file__).parent)
    head = _said(*git, "rev-parse", "--short", "HEAD")
    changed = _said(*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results")
    return (f"{head}-dirty" if changed else head) or "unknown"


def header(device: torch.device) -> dict:
    """The machine, its clocks or load, versions, the measured revision, and the variant of the CPU kernels (``isa``).

    If the load average is above the number of threads used, p20 says more than p50.
    """
    cpu = device_facts(torch.device("cpu"))
    facts = {
        "revision": _revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "transformers": installed("transformers"),
        "cpu": f"{cpu['name']}, {cpu['threads']} threads",
        "isa": cpu["isa"],
    }
    if device.type == "cuda":
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        cards = _said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").split("\n")
        values = [v.strip() for v in cards[min(torch.cuda.current_device(), len(cards) - 1)].split(",")]
        facts |= {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        facts["ORTHRUS_CUDA_CODED"] = codes_for_cuda()
        facts |= dict(zip(query.split(","), values, strict=True)) if any(values) else {}
    else:
        facts["load average"] = os.getloadavg()[0]
    for name in ("ORTHRUS_CUDA_ISA", "ORTHRUS_VARIANT"):  # the latter of tools/variant.py
        if value := os.environ.get(name):
            facts[name] = value
    return facts


def drafts(engine: Engine) -> Counter:
    """Drafts verified so far, ``drafted``, and those of them ``accepted``."""
    facts = engine.metrics.as_dict()
    return Counter(drafted=facts["drafted"], accepted=sum(n * times for n, times in facts["accepted"].items()))


def accepted_share(counted: Counter) -> float | None:
    """Accepted share of :func:`drafts`; None if there were none."""
    return counted["accepted"] / counted["drafted"] if counted["drafted"] else None


def out_folder(text: str) -> str:
    """The type of ``--out``: a folder, created if necessary, that can be written to; checked before anything is
    measured.
    """
    try:
        if not text:
            raise argparse.ArgumentTypeError("must be a folder, got nothing")
        Path(text).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=text):
            return text
    except OSError as error:
        reason = f"must be a folder that can be written to, got {text!r} ({error.strerror})"
        raise argparse.ArgumentTypeError(reason) from None


def report(name: str, facts: dict, rows: list[dict], out: str | None) -> None:
    """Print the rows as a markdown table; with ``out``, also write ``<out>/<name>.json`` and ``.md``."""
    print(save(name, facts, rows, out))


def save(name: str, facts: dict, rows: list[dict], out: str | None) -> str:
    """Write the files of :func:`report` and return what it prints."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"# {name}", "", *(f"- {key}: {figures(value)}" for key, value in facts.items()), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(figures(row.get(c)) for c in columns) + " |" for row in rows]
    if out:
        folder = Path(out)
        (folder / f"{name}.json").write_text(json.dumps({"header": facts, "rows": rows}, indent=1) + "\n")
        (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)
