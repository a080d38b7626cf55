"""Experiments of bench/GPU_EXPERIMENTS.md: runs a command on a copy of the project with one change of its kernels.

    python3 tools/variant.py                                          lists the changes
    python3 tools/variant.py prefetch-160 python3 -m bench.bench_row_linear --model 8b --rows 1 32 --out $PWD/DIR

The copy is build/variant. It is built with this Python; only what a change affects is built again. The command runs in
it, as Python imports from there first, so paths have to be absolute. Reports name the variant, ``none`` for the project
as it is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "variant"
FILES = "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"
FOLDERS = "csrc", "orthrus_rt", "triton_kernels", "bench", "tools"
ROW_LINEAR, PLAN = "csrc/cuda/row_linear_sm90_kernel.cuh", "csrc/cuda/row_linear_plan.h"
ATTENTION, LAUNCH = "csrc/cuda/dual_attn_attention.cuh", "csrc/cuda/dual_attn_launch.cuh"
PREFETCH = "kPrefetchBytes = 96 * 1024"
ONE_CTA = "tile_rows > (coded ? 64 : 112) ? 1 : 2"
SCHEDULE, VARIANT = "csrc/cuda/dual_attn_schedule.cuh", "csrc/cuda/dual_attn_variant.cuh"
FOLDS = "      if constexpr (V::kFold) {\n        copy16("
# Of each: the file, a text that occurs in it once, and what replaces it.
VARIANTS = {
    "none": (),
    # row_linear
    "prefetch-0": (PLAN, PREFETCH, "kPrefetchBytes = 0"),
    "prefetch-160": (PLAN, PREFETCH, "kPrefetchBytes = 160 * 1024"),
    "no-next-weight": ("csrc/cuda/row_linear.cu", "if (params.num_rows > tiles.widest) args.p.next", "args.p.next"),
    "one-cta-from-65": (ROW_LINEAR, ONE_CTA, "tile_rows > 64 ? 1 : 2"),
    "one-cta-from-97": (ROW_LINEAR, ONE_CTA, "tile_rows > (coded ? 64 : 96) ? 1 : 2"),
    "no-112": ("csrc/cuda/row_linear.cu", "{16, 32, 64, 96, 112, 128}", "{16, 32, 64, 96, 128}"),
    # dual_attn
    "mma-attention": ("csrc/cuda/dual_attn.cu", "runs_wgmma(device) ? launch_dual_attn_sm90 : launch", "launch"),
    "no-proxy-fence": (ATTENTION, "if constexpr (V::kWgmma) sm90::fence_proxy_async_shared();", ""),
    "keep-in-l2": (ATTENTION, FOLDS, FOLDS.replace("V::kFold", "true")),
    "always-tall": (
        LAUNCH,
        "split_tile > 64 && most_items(a) <= device.num_sms && 2 * a.num_units <= kMaxUnits",
        "false",
    ),
    "blocks-apart": (LAUNCH, "rows.num_groups_ar ? a.p.rows.blocks_per_seq : 1", "rows.num_groups_ar ? 1 : 1"),
    "one-per-sm": (LAUNCH, "if (two_per_sm) return", "if (false) return"),
    "two-stages": (VARIANT, "kWarps == 8 ? 3 : 2", "kWarps == 8 ? 2 : 2"),
    "rounds-forth": (SCHEDULE, "return 2 * (i / ctas + 1) * ctas.d - 1 - i", "return i + ctas.d"),
    "merge-36": ("csrc/cuda/dual_attn_merge.cuh", "kAtOnce = 24", "kAtOnce = 36"),
}


def content(path: Path, name: str) -> bytes:
    """That of a file of the project, by its path in it, in variant ``name``."""
    data = (ROOT / path).read_bytes()
    if not VARIANTS[name] or VARIANTS[name][0] != path.as_posix():
        return data
    old, new = (text.encode() for text in VARIANTS[name][1:])
    if data.count(old) != 1:
        raise SystemExit(f"variant {name}: {path} must have once, but has {data.count(old)} times:\n{old.decode()}")
    return data.replace(old, new)


def copy(name: str) -> None:
    """Bring the copy up to date; files that do not change keep their times, so that they are not built again."""
    files = [ROOT / file for file in FILES]
    for folder in FOLDERS:
        files += [file for file in (ROOT / folder).rglob("*") if file.is_file() and file.suffix not in (".so", ".pyc")]
    for file in files:
        path = file.relative_to(ROOT)
        target, data = COPY / path, content(path, name)
        if not target.exists() or target.read_bytes() != data:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    link = COPY / "orthrus_rt" / "triton_kernels"  # without pip's installation Python would not find it
    if not link.is_symlink():
        link.symlink_to("../triton_kernels")


def build(env: dict[str, str]) -> None:
    log = COPY / "build.log"
    with open(log, "w") as file:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=COPY, env=env | {"ORTHRUS_CUDA": "ON"}, stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"{log.read_text()[-3000:]}\nthe variant does not build; the whole log is {log}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=VARIANTS, metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    args = parser.parse_args(arguments)
    if not args.name:
        for name, change in VARIANTS.items():
            print(f"{name:16} {change[0] if change else 'no change'}")
        return 0
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    copy(args.name)
    build(env)
    env |= {"ORTHRUS_VARIANT": args.name}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(COPY), os.environ.get("PYTHONPATH")]))
    return subprocess.run(args.command, cwd=COPY, env=env).returncode if args.command else 0


if __name__ == "__main__":
    raise SystemExit(main())
