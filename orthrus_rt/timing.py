"""Time and bandwidth as benchmarks and the profile measure them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from orthrus_rt.weights import huge_pages


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


def read_bandwidth(device: torch.device) -> float:
    """GB/s of reading memory far larger than any cache, in huge pages as weights are, and writing next to nothing."""
    if device.type != "cuda":
        data = huge_pages.empty(torch.Size([64 << 20]), torch.float32).fill_(1.0)
        return data.numel() * 4e-3 / measure(lambda: torch.dot(data, data), device)["p20"]
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
