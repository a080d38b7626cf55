"""Run the tests of Triton kernels that need no GPU under several versions of Triton: the interpreter, ahead-of-time
compilation, and the PTX in the emulator.

    python tools/triton_versions.py 3.6.0 3.7.1 3.8.0 3.9.0 --out DIR

Each version is fetched into a folder of its own, which comes before the installed version in the path of the tests
alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = "-m", "pytest", "-q", "-p", "no:cacheprovider"
TESTS = {  # column -> arguments of Python
    "interpreter": (*PYTEST, "tests/interpret"),
    "compiled": (*PYTEST, "tests/compile/test_triton.py"),
    "PTX emulated, sm_90a": ("-m", "tests.ptx", "90a", "--triton", "tests/ptx/test_triton.py"),
    "PTX emulated, sm_80": ("-m", "tests.ptx", "80", "--triton", "tests/ptx/test_triton.py"),
    "PTX of process_logits": ("-m", "tests.ptx", "90a", "--triton", "tests/interpret/test_process_logits.py"),
}


def outcome(arguments: tuple[str, ...], env: dict[str, str]) -> str:
    """The outcome according to pytest's last line, without its time."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    said = re.findall(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", done.stdout, re.M)
    return said[-1] if said and done.returncode in (0, 5) else f"failed: {(said or [done.stderr[-300:]])[-1]}"


def row(version: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"triton=={version}"]
        subprocess.run(command, check=True)
        env = os.environ | {"PYTHONPATH": folder, "TRITON_CACHE_DIR": f"{folder}/cache"}
        found = {"triton": version}
        for column, arguments in TESTS.items():
            found[column] = outcome(arguments, env | ({"TRITON_INTERPRET": "1"} if column == "interpreter" else {}))
            print(f"{version}, {column}: {found[column]}", flush=True)
    return found


def main() -> int:
    sys.path[0] = str(ROOT)  # instead of this folder, which has a bench.py
    import torch

    from bench import common

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--out", type=common.out_folder, help="folder for the JSON and the table")
    args = parser.parse_args()
    rows = [row(version) for version in args.versions]
    facts = common.header(torch.device("cpu"))
    common.report("triton-versions", {k: facts[k] for k in ("revision", "python", "torch", "cpu")}, rows, args.out)
    return 1 if any("failed" in cell for row in rows for cell in row.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
