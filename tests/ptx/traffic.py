"""Memory traffic and issue slots of kernels, as counted by the emulator: figures per kernel, and a report of all
kernels at the shapes of Qwen3-8B (test_shapes.py).

    python -m tests.ptx.traffic --out DIR

These are counts of PTX in an emulator, not times. A sector has 32 bytes, and a wavefront is a cycle of shared memory.
Shapes are scaled: each CTA has as many units of work, on fewer CTAs.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.common import header, parser_of, report
from orthrus_rt import terminal
from tests.ptx import build

SECTOR = 32
ARCHITECTURES = ("90a", "80")
UNITS = {
    "global": ("global_load", "global_store", "copy"),
    "shared": ("shared_load", "shared_store", "matrix"),
    "product": ("product",),
    "float": ("float",),
    "special": ("special",),
    "integer": ("integer",),
    "shuffle": ("shuffle",),
    "wait, branch": ("barrier", "branch"),
}
REQUESTS = ("loads", "stores", "copies", "bulk")
WAVEFRONTS = {"load": "shared_loads", "store": "shared_stores", "matrix": "matrices", "copy": "shared_copies"}


def name_of(mangled: str) -> str:
    """The demangled name without namespaces and parameters; template arguments stay."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip() or mangled
    name = re.sub(r"\(anonymous namespace\)::|orthrus::cuda::|orthrus::|^void |\((int|bool)\)", "", name)
    return re.sub(r"\(.*\)$", "", name).replace("__nv_bfloat16", "bf16")


def _percent(more: int, least: int) -> float:
    return 100 * more / least if least else 0.0


def figures_of(counts: dict) -> dict:
    """Figures of one kernel over all its launches; sizes are per launch. Moves and parameters are not counted."""
    launches = counts["launches"]
    issued = {name: sum(counts[unit] for unit in units) for name, units in UNITS.items()}
    total, asked = sum(issued.values()), sum(counts[kind]["sectors"] for kind in ("loads", "copies", "bulk"))
    least = sum(counts[kind]["least"] for kind in REQUESTS)
    touched = SECTOR * (counts["distinct_read"] + counts["distinct_written"])
    conflicts = {
        name: f"{name} +{_percent(shared['wavefronts'] - shared['least'], shared['least']):.0f}%"
        for name, shared in ((name, counts[kind]) for name, kind in WAVEFRONTS.items())
        if shared["wavefronts"] > shared["least"]
    }
    return {
        "CTAs": counts["ctas"] / launches,
        "threads": counts["threads"],
        "KB read": counts["distinct_read"] * SECTOR / launches / 1024,
        "KB written": counts["distinct_written"] * SECTOR / launches / 1024,
        "read so often": asked / counts["distinct_read"] if counts["distinct_read"] else 0.0,
        "excess sectors %": _percent(sum(counts[kind]["sectors"] for kind in REQUESTS) - least, least),
        "bank conflicts": ", ".join(conflicts.values()) or "none",
        "instructions": total / launches,
        "per byte": total / touched if touched else 0.0,
        **{f"{name} %": _percent(count, total) for name, count in issued.items()},
    }


def table(kernels: dict[str, dict]) -> str:
    """The figures of all kernels that have run, one per line, for a terminal."""
    rows = [{"kernel": name_of(name), **figures_of(counts)} for name, counts in kernels.items()]
    if not rows:
        return "no kernel has run"
    return terminal.table([tuple(rows[0]), *(tuple(map(terminal.figures, row.values())) for row in rows)])


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="%(default)s")
    parser.add_argument("-k", default="", help="of test_shapes.py")
    args = parser.parse_args()
    if why := build.why_not():
        raise SystemExit(why)
    rows = []
    for arch in args.arch:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "counts.jsonl"
            more = ["-k", args.k] if args.k else []
            done = build.pytest_process(arch, "tests/ptx/test_shapes.py", *more, triton=True, counts=path)
            if done.returncode:
                return done.returncode
            for line in path.read_text().splitlines():
                case, kernels = json.loads(line)
                for name, counts in kernels.items():
                    rows.append({"kernel": name_of(name), "sm": arch, "case": case, **figures_of(counts)})
    rows.sort(key=lambda row: (row["sm"], row["kernel"]))
    facts = {"what": "counts of PTX in an emulator, not times; sizes and instructions of one launch"}
    facts |= {name: fact for name, fact in header(torch.device("cpu")).items() if name in ("revision", "torch")}
    facts |= {"triton": importlib.metadata.version("triton"), "nvcc": build.nvcc_version()}
    report("traffic", facts, rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
