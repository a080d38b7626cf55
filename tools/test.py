"""Run every test tier that this machine can run, cheap ones first, and list what was skipped and why, one line each.

Usage: python tools/test.py [--full] [TIER ...]

A tier named on the command line must run; if it cannot, that is an error.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST_TIMEOUT_S = 300  # a test that hangs must not keep CI from reporting it in time
APART_AT_ONCE = 2
MOST_PROCESSES = 8  # of a spread tier; each holds a model or two


def cpu_tests(names: str) -> list[str]:
    return [f"tests/cpu/test_{name}.py" for name in names.split()]


AMX_TESTS = cpu_tests(
    "coded_weight cpu_ops_linear cpu_ops_attn cpu_ops_attn_splits cpu_ops_tape cpu_ops_pool cpu_ops_runtime "
    "lossless_tiny one_pass"
)
RACY_TESTS = cpu_tests(
    "sanitized cuda_on_host dual_attn_on_host f32_on_host row_linear_on_host coded_blocks consensus coded_weight "
    "cpu_ops_linear cpu_ops_attn cpu_ops_attn_splits cpu_ops_logits cpu_ops_rows cpu_ops_tape cpu_ops_pool "
    "cpu_ops_runtime"
)
# And whole engines, which would take minutes each among the racy ones.
SANITIZED_TESTS = RACY_TESTS + cpu_tests("lossless_tiny one_pass batching streams prefix_caching memory nan")
# Where memory is short on purpose, a sanitizer has none either. Its locks may stay taken in a child that is forked
# while a thread starts. A process that a test starts has the plain module, whose atomics the sanitizer does not see.
# And weights and caches do not share blocks of huge pages. After a crash the sanitizer's report is better, so Python's
# own is turned off.
NOT_SANITIZED = "not without_memory and not forked_child and not subnormal_numbers and not huge_pages"
TIMED = ("test_auto.py", "test_profile.py")  # of tests/gpu: they measure, so nothing else may run meanwhile
LONGEST = ("test_sanitizer.py", "test_lossless.py", "test_lossless_embedded.py")  # of tests/gpu: started first
FULL_TAKES = 4  # times the limits of a test and of a process
LEAKS = re.compile(r"nanobind: | - leaked | - \.\.\. skipped remainder|See https://nanobind\.")


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def why_no_lint() -> str | None:
    return None if has_module("ruff") else "ruff is not installed"


def why_no_triton() -> str | None:
    return None if has_module("triton") else "triton is not installed"


def why_no_compiler() -> str | None:
    return None if has_module("triton") or of_tests("compile.cubins").nvcc() else "neither nvcc nor triton is installed"


def of_tests(name: str):
    """Import a module of the folder ``tests``."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"tests.{name}")


def why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def always() -> None:
    return None


@dataclass
class Tier:
    """``args`` are pytest's, or a whole command if ``command`` is set.

    ``spread``: files are spread over processes of one thread each, one per processor, as most tests have no work for a
    second thread. ``apart``: the folder whose files run in processes of their own. A kernel that faults destroys the
    CUDA context of its whole process, and one that hangs can only be ended together with the process. ``in_full``: the
    tier runs only with ``--full`` or by its name, on the grids that ``args`` say. ``timeout_s``: of a test.
    ``process_timeout_s``: of a process, which may hang after its last test.
    """

    name: str
    args: list[str]
    why_not: Callable[[], str | None] = always
    env: Callable[[], dict[str, str]] = dict
    command: bool = False
    spread: bool = False
    apart: str | None = None
    in_full: bool = False
    timeout_s: int = TEST_TIMEOUT_S
    process_timeout_s: int | None = None


TIERS = [
    Tier("lint", ["-m", "ruff", "check", "--quiet", "."], why_no_lint, command=True),
    Tier("doctest", ["--doctest-modules", "--doctest-glob=*.md", "orthrus_rt", "README.md"], spread=True),
    Tier("cpu", ["tests/cpu"], spread=True),
    Tier(
        "amx",
        # per_pass: the embedded model takes longer there, and other tests of the same file decode with it.
        ["--software-tiles", "-k", "not portable and not avx and not per_pass", *AMX_TESTS],
        lambda: of_tests("amx_software").why_not(),
        spread=True,
    ),
    Tier("interpret", ["tests/interpret"], why_no_triton, lambda: {"TRITON_INTERPRET": "1"}, spread=True),
    Tier("compile", ["tests/compile"], why_no_compiler, spread=True),
    Tier(
        "sanitize",
        ["--sanitized", "address", "-k", NOT_SANITIZED, "-p", "no:faulthandler", *SANITIZED_TESTS],
        lambda: of_tests("sanitized").ADDRESS.why_not(),
        lambda: of_tests("sanitized").ADDRESS.environment(),
        spread=True,
        in_full=True,
        timeout_s=1200,
    ),
    Tier(
        "races",
        ["--sanitized", "thread", "-k", NOT_SANITIZED, "-p", "no:faulthandler", *RACY_TESTS],
        lambda: of_tests("sanitized").THREAD.why_not(),
        lambda: of_tests("sanitized").THREAD.environment(),
        spread=True,
        in_full=True,
        timeout_s=1200,
    ),
    Tier(
        "ptx",
        ["--full", "tests/ptx/test_kernels.py"],
        lambda: of_tests("ptx.build").why_not(),
        in_full=True,
        timeout_s=1800,
    ),
    Tier("gpu", ["-m", "gpu"], why_no_gpu, apart="tests/gpu", timeout_s=270, process_timeout_s=330),
]


@dataclass
class Result:
    passed: int = 0
    failed: int = 0
    skipped: collections.Counter = field(default_factory=collections.Counter)
    files: dict[str, list[float]] = field(default_factory=dict)  # file -> [passed, failed, skipped, seconds]
    seconds: float = 0.0

    def line(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped.total()} skipped in {self.seconds:.0f} s"


def read_junit(path: str, result: Result) -> None:
    for case in ET.parse(path).iter("testcase"):
        name = case.get("classname", "").split(".")
        row = result.files.setdefault(next((p for p in name if p.startswith("test_")), name[0]), [0, 0, 0, 0.0])
        row[3] += float(case.get("time", 0))
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed += 1
            row[1] += 1
        elif skip is not None:
            result.skipped[(skip.get("message") or "no reason given").splitlines()[0]] += 1
            row[2] += 1
        else:
            result.passed += 1
            row[0] += 1


def without_leaks(errors: str) -> str:
    """Drop Triton's binding's report of leaks as Python ends, some 20 lines per process, which no test causes."""
    return "".join(line for line in errors.splitlines(keepends=True) if not LEAKS.match(line))


def run_pytest(tier: Tier, full: bool, *more: str, **how) -> tuple[Result, str | None]:
    """Run one process of the tier: its results, which include a failure if there is no report, and what it printed."""
    result, takes = Result(), FULL_TAKES if full else 1
    with tempfile.TemporaryDirectory() as folder:
        report, errors = os.path.join(folder, "report.xml"), os.path.join(folder, "errors.txt")
        command = [sys.executable, "-m", "pytest", "-q", "-r", "fE", f"--junitxml={report}", *tier.args, *more]
        if full and not tier.in_full:
            command.append("--full")
        if has_module("pytest_timeout"):
            command.append(f"--timeout={tier.timeout_s * takes}")
            if tier.apart:
                command.append("--timeout-method=thread")  # a signal would wait for the device to answer
        env = {**os.environ, **tier.env()}
        if tier.spread and has_module("xdist"):
            command += ["-n", str(min(os.cpu_count(), MOST_PROCESSES)), "--dist", "loadfile"]
            env["OMP_NUM_THREADS"] = "1"
        limit = tier.process_timeout_s and tier.process_timeout_s * takes
        with open(errors, "w") as file:
            try:
                done = subprocess.run(command, cwd=ROOT, env=env, timeout=limit, **{"stderr": file} | how)
                code, printed = done.returncode, done.stdout
            except subprocess.TimeoutExpired as error:
                code, printed = 1, (error.stdout or b"").decode(errors="replace")
                printed += f"\nnot finished in {limit} s: ended"
            finally:
                print(without_leaks(Path(errors).read_text(errors="replace")), end="", file=sys.stderr, flush=True)
        reported = os.path.exists(report)
        if reported:
            read_junit(report, result)
    if not result.failed and (code or not reported):
        result.failed = 1  # a crash, a hang, collection errors, or no test at all
        for path in more:
            result.files.setdefault(Path(path).stem, [0, 0, 0, 0.0])[1] += 1
    return result, printed


def run_apart(tier: Tier, full: bool) -> list[Result]:
    def run_file(path: Path) -> Result:
        result, printed = run_pytest(tier, full, str(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"-- {path.name}\n{without_leaks(printed)}", flush=True)
        return result

    files = sorted((ROOT / tier.apart).glob("test_*.py"), key=lambda f: (f.name not in LONGEST, f.name))
    with ThreadPoolExecutor(APART_AT_ONCE) as pool:
        results = list(pool.map(run_file, [f for f in files if f.name not in TIMED]))
    return results + [run_file(f) for f in files if f.name in TIMED]


def run(tier: Tier, full: bool) -> Result:
    result = Result()
    start = time.monotonic()
    print(f"== {tier.name}", flush=True)
    if tier.command:
        code = subprocess.run([sys.executable, *tier.args], cwd=ROOT, env={**os.environ, **tier.env()}).returncode
        result.passed, result.failed = int(code == 0), int(code != 0)
    else:
        for part in run_apart(tier, full) if tier.apart else [run_pytest(tier, full)[0]]:
            result.passed += part.passed
            result.failed += part.failed
            result.skipped += part.skipped
            result.files |= part.files
    result.seconds = time.monotonic() - start
    return result


def print_per_file(result: Result) -> None:
    for name, (passed, failed, skipped, seconds) in sorted(result.files.items()):
        state = "FAILED" if failed else "ok" if passed else "skipped"
        op = name.removeprefix("test_")
        print(f"{op:24} {state:8} {passed:5} passed {failed:3} failed {skipped:3} skipped {seconds:7.1f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the whole grids, tests marked 'full' included")
    parser.add_argument("tiers", nargs="*", metavar="TIER", help=", ".join(t.name for t in TIERS))
    args = parser.parse_args()
    unknown = set(args.tiers) - {t.name for t in TIERS}
    if unknown:
        parser.error(f"unknown tier {', '.join(sorted(unknown))}: expected {', '.join(t.name for t in TIERS)}")

    done: dict[str, Result | str] = {}
    for tier in TIERS:
        if args.tiers and tier.name not in args.tiers:
            continue
        why = "not asked for: make test-full, or by name" if tier.in_full and not (args.full or args.tiers) else None
        why = why or tier.why_not()
        done[tier.name] = why if why else run(tier, args.full)

    print("\n== summary")
    total = Result()
    for name, result in done.items():
        if isinstance(result, str):
            total.failed += bool(args.tiers)
            print(f"{name:10} {'failed: requested, but' if args.tiers else 'skipped:'} {result}")
            continue
        print(f"{name:10} {result.line()}")
        if args.tiers and not (result.passed or result.failed):
            result.failed = 1
            print(f"{'':10} failed: it was asked for, and nothing ran")
        for reason, count in result.skipped.items():
            print(f"{'':10} {count} skipped: {reason}")
        if name == "gpu":
            print_per_file(result)
        total.passed += result.passed
        total.failed += result.failed
        total.skipped += result.skipped
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped.total()} skipped")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
