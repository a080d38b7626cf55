"""Whether an engine fits into memory: its weights, before they are loaded, and its cache, before it is used.

If the weights alone are too large, no argument of an engine helps. And Linux grants more memory than it has, and kills
without a message a process that then uses it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from dataclasses import replace
from pathlib import Path

import torch

from orthrus_rt import dispatch
from orthrus_rt.checkpoint import expected_tensors
from orthrus_rt.coded_blocks import CODED_BITS, DRAFT_BITS
from orthrus_rt.config import ModelConfig
from orthrus_rt.device import dtype_name
from orthrus_rt.out_of_memory import KNOBS, OutOfMemoryError
from orthrus_rt.sizes import Sizes
from orthrus_rt.storage import is_diffusion
from orthrus_rt.weights import codes_for_cuda

log = logging.getLogger("orthrus_rt")


def check_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Check, before they are loaded, that a model's weights fit.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """
    check_left(f"the weights of {config.name}", least_weight_bytes(config, device, dtype), device, dtype)


def check_left(what: str, need: int, device: torch.device, dtype: torch.dtype) -> None:
    """Check that ``device`` has ``need`` bytes left for ``what``.

    Raises:
        torch.OutOfMemoryError: it has not.
    """
    free = free_bytes(device)
    if free is not None and need > free:
        what += f" in {dtype_name(dtype)}"
        raise OutOfMemoryError(f"out of memory: {what} take at least {_gb(need)}, and {device} has {_gb(free)} left")


def check_cache(sizes: Sizes, nbytes: int, device: torch.device) -> None:
    """Log a warning if a cache on the CPU, which takes its memory as sequences fill it, may outgrow what is left."""
    if device.type == "cpu" and (free := free_bytes(device)) is not None and nbytes > free:
        log.warning(
            "the cache of %s may grow to %s, and %s has %s left: lower %s",
            sizes, _gb(nbytes), device, _gb(free), KNOBS,
        )  # fmt: skip


def check_threads(device: torch.device, root: Path = Path("/")) -> None:
    """Log a warning if torch, and so CPU ops, use more threads than this process may use CPUs, or than a container
    (cgroup v2) gives CPU time for: while one thread is held up, the others wait for it.
    """
    cpus, threads = float(len(os.sched_getaffinity(0))), torch.get_num_threads()
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such group, or "max"
        quota, period = map(int, (root / "sys/fs/cgroup/cpu.max").read_text().split())
        cpus = min(cpus, quota / period)
    if device.type == "cpu" and threads > math.ceil(cpus):
        log.warning(
            "CPU ops use as many threads as torch, %d, but this process has the time of %.3g CPUs: call "
            "torch.set_num_threads(%d)", threads, cpus, max(1, int(cpus)),
        )  # fmt: skip


def least_weight_bytes(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Least bytes of the matrices that passes multiply by, in both views; the embedding table may stay in its file."""
    if device.type == "cpu" and dispatch.select("row_linear", device, dtype) == "reference":
        return 0  # it may multiply by the weights in their file
    bits = (CODED_BITS, DRAFT_BITS) if are_coded(device, dtype) else (8 * dtype.itemsize,) * 2
    one, two = (_matrix_elements(replace(config, num_layers=n)) for n in (1, 2))  # a config may state any num_layers
    counts = (a + (config.num_layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    return sum(each * count // 8 for each, count in zip(bits, counts, strict=True))


def _matrix_elements(config: ModelConfig) -> tuple[int, int]:
    """Of the matrices that AR decoding needs, and of those that the diffusion view adds."""
    shapes = expected_tensors(config)
    if not config.tie_word_embeddings:
        del shapes["model.embed_tokens.weight"]
    counts = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    diffusion = sum(count for name, count in counts.items() if is_diffusion(name))
    return sum(counts.values()) - diffusion, diffusion


def are_coded(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights that are packed now will be coded, if that makes them shorter."""
    impl = dispatch.select("row_linear", device, dtype)
    if dtype is not torch.bfloat16 or impl == "reference":
        return False
    return codes_for_cuda() if impl == "cuda" else dispatch.extension().cpu.takes_coded_weights()


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that ``device`` can still give; None if unknown. For a host that is what Linux reports, swap included,
    within the limit of a container (cgroup v2).
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        told = _numbers((root / "proc/meminfo").read_text())
        swap = 1024 * told["SwapFree:"]
        free = 1024 * told["MemAvailable:"] + swap
    except (OSError, KeyError):
        return None

    group = root / "sys/fs/cgroup"

    def left(kind: str) -> float:
        limit = (group / f"{kind}.max").read_text().strip()
        return math.inf if limit == "max" else int(limit) - int((group / f"{kind}.current").read_text())

    try:
        memory, used = left("memory"), _numbers((group / "memory.stat").read_text())
        files = used["file"] - used["shmem"]  # kept in memory as long as there is room
    except (OSError, KeyError, ValueError):  # no such group, or the root group, which has no limit
        return free
    with contextlib.suppress(OSError, ValueError):  # the group does not account for swap
        swap = min(swap, left("memory.swap"))
    return int(min(free, memory + files + swap))


def _numbers(text: str) -> dict[str, int]:
    """The number after each name.

    >>> _numbers("MemTotal:       24576 kB" + chr(10) + "file 4096")
    {'MemTotal:': 24576, 'file': 4096}
    """
    lines = (line.split() for line in text.splitlines())
    return {name: int(value) for name, value, *_ in lines if value.isdigit()}


def _gb(nbytes: int) -> str:
    return f"{nbytes * 1e-9:.1f} GB"
