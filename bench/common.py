"""What every benchmark shares: timing, measured read bandwidth, the header and the report."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def percentiles(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)
    pick = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return {"p50": statistics.median(ordered), "p20": pick(0.2), "p80": pick(0.8)}


def measure(run: Callable[[], object], device: torch.device, *, repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """Microseconds of ``run()``: p50, p20, p80. On a GPU with events, else with the host's clock."""
    for _ in range(warmup):
        run()
    if device.type != "cuda":
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            samples.append((time.perf_counter() - start) * 1e6)
        return percentiles(samples)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return percentiles([start.elapsed_time(end) * 1e3 for start, end in events])


def graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``run`` as one CUDA graph, so that launches cost the host nothing; unchanged on the CPU."""
    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def read_bandwidth(device: torch.device) -> float:
    """GB/s of reading memory far larger than any cache and writing next to nothing."""
    if device.type != "cuda":
        data = torch.ones(64 << 20, dtype=torch.float32)
        return data.numel() * 4e-3 / measure(data.sum, device)["p20"]
    import triton
    import triton.language as tl

    @triton.jit
    def total(x_ptr, out_ptr, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
        start = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
        acc = tl.zeros([BLOCK], dtype=tl.int32)
        for step in range(STEPS):
            offset = start + step * BLOCK + tl.arange(0, BLOCK)
            acc += tl.load(x_ptr + offset, mask=offset < n, other=0)
        tl.store(out_ptr + tl.program_id(0), tl.sum(acc))

    block, steps = 4096, 16
    data = torch.ones(1 << 30, dtype=torch.int32, device=device)
    out = torch.empty(data.numel() // (block * steps), dtype=torch.int32, device=device)
    run = lambda: total[(out.numel(),)](data, out, data.numel(), BLOCK=block, STEPS=steps, num_warps=8)  # noqa: E731
    return data.numel() * 4e-3 / measure(run, device)["p20"]


def header(device: torch.device) -> dict[str, str]:
    """The machine, its clocks, versions and the revision measured."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    facts = {
        "revision": git.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    if device.type == "cuda":
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        smi = subprocess.run(command, capture_output=True, text=True)
        values = [v.strip() for v in smi.stdout.strip().split("\n")[torch.cuda.current_device()].split(",")]
        facts |= dict(zip(query.split(","), values, strict=True), cuda=torch.version.cuda)
    return facts


def report(name: str, facts: dict, rows: list[dict], out: str | None) -> None:
    """Print the rows as a markdown table; with ``out``, also write ``<out>/<name>.json`` and ``.md``."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = lambda v: f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v)  # noqa: E731
    lines = [f"# {name}", "", *(f"- {key}: {text(value)}" for key, value in facts.items()), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(text(row.get(c)) for c in columns) + " |" for row in rows]
    print("\n".join(lines))
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps({"header": facts, "rows": rows}, indent=1) + "\n")
        (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
