"""For the first run on a GPU: steps that have never run on one, each with its own time limit, since it may hang.

Every call first builds the module, or uses the one that an earlier call left in DIR if that was copied to build/card.
Steps that passed then, or in a call with the same DIR, are not repeated if their steps.json is there, unless the
machine, ORTHRUS_* variables, the module or a Python file have changed since. DIR (default: build/first_on_a_card) gets
six files, as few can be brought back from some machines: steps.log, steps.json, native.log, the module with its key and
reports.tar.gz, with the reports of all benchmarks that have been run on this machine (in build/reports).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROUGHT = ROOT / "build" / "card"
REPORTS = ROOT / "build" / "reports"
PASSED = "ok", "ok before"
KEY = "native-key"  # build/.native, which tells tools/with-env whether the module is current
MACHINE = """
nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader
PATH=$PATH:/usr/local/cuda/bin
nvcc --version | tail -2
command -v compute-sanitizer
command -v gcc clang  # Triton compiles its launchers with one of them, and with Python's headers
ls $(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
nproc
python3 - <<'PY'
import sys
from importlib import metadata

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"

print("python3", sys.executable, *sys.version_info[:3])
for name in "setuptools torch triton transformers pybind11 cmake ninja pytest pytest-timeout numpy gguf".split():
    print(name, version(name))
import torch
print("torch's CUDA", torch.version.cuda)
print("capability", ".".join(map(str, torch.cuda.get_device_capability())))
PY
"""
BUILT = """
import sys, orthrus_rt._native as native
print("python:", sys.executable)
print(native.build_info(), native.cuda.isa())
"""


@dataclass(frozen=True)
class Step:
    """In ``command``, python3 is the one that the module was built for."""

    name: str
    limit_s: float
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)


def tests(file: str, limit_s: int, only: str = "", *, each_s: int = 50, **env: str) -> Step:
    """Run one file of tests/gpu in one process. If a test hangs, the log gets the stacks of all threads, and the test
    is ended if pytest-timeout is installed.
    """
    name = " ".join([f"{k}={v}" for k, v in env.items()] + [file] + ([f"-k '{only}'"] if only else []))
    limits = f"-o faulthandler_timeout={each_s - 5}"
    if importlib.util.find_spec("pytest_timeout"):
        limits += f" --timeout={each_s} --timeout-method=thread"
    command = f"python3 -m pytest -v -r fE {limits} tests/gpu/test_{file}.py".split()
    return Step(name, limit_s, command + (["-k", only] if only else []), env)


def measured(script: str, arguments: str, limit_s: int, folder: str = "speed") -> Step:
    """Run one benchmark; its report lies in ``folder`` of the reports."""
    run = f'python3 -m bench.bench_{script} {arguments} --out "$REPORTS/{folder}"'
    return Step(f"bench_{script} {arguments}", limit_s, ["bash", "-c", run])


def varied(script: str, arguments: str, *variants: str) -> list[Step]:
    """Run one benchmark with each of these variants of the kernels, which are built first."""
    steps = []
    for name in variants:
        step = measured(script, arguments, 120, f"variants-{name}")
        run = f"python3 tools/variant.py {name} {step.command[-1]}"
        steps.append(Step(f"{name}: {step.name}", step.limit_s, ["bash", "-c", run]))
    return steps


PREPARATION = [
    Step("machine", 180, ["bash", "-c", MACHINE]),
    Step("build", 400, ["bash", "tools/with-env", "--here", "python3", "-c", BUILT]),
]
REST = "not one_hot and not rewrite and not reuse and not (invariance and not sm80)"
# Tests that depend on the GPU's instructions alone come first: mma.sync and wgmma separately, without and with
# dependent launches, and that wgmma's widths agree to the bit, which PTX does not promise. Then come those that do not
# need row_linear, of which dual_attn multiplies in both ways too.
GROUPS = {
    "ops": [
        tests("row_linear", 90, "one_hot and sm80", ORTHRUS_CUDA_PDL="0"),
        tests("row_linear", 90, "one_hot and not sm80", ORTHRUS_CUDA_PDL="0"),
        tests("row_linear", 90, "one_hot and sm80"),
        tests("row_linear", 90, "one_hot and not sm80"),
        tests("row_linear", 90, "both_views and (250-130 or 300-7)", ORTHRUS_CUDA_PDL="0"),  # copies beyond the rows
        tests("row_linear", 120, "invariance and not sm80"),
        tests("qkv_commit", 90),
        tests("dual_attn", 90, "sm80 and against_float64", ORTHRUS_CUDA_PDL="0"),
        tests("dual_attn", 90, "not sm80 and against_float64", ORTHRUS_CUDA_PDL="0"),
        tests("dual_attn", 120, "sm80"),
        tests("dual_attn", 120, "not sm80"),
        tests("consensus", 90),
        tests("triton", 300, each_s=100),  # it compiles
        tests("row_linear", 120, "rewrite or reuse"),
        tests("f32", 90),
        tests("row_linear", 180, REST),
        tests("coded_weights", 90, "same_bits or as_on_a_cpu", ORTHRUS_CUDA_PDL="0"),
        tests("coded_weights", 180),
    ],
    "engine": [
        tests("engine", 180),
        tests("failures", 240, each_s=220),  # one test waits for a process that it starts
        tests("lossless", 300, each_s=150),
        tests("auto", 120, each_s=100),
        tests("profile", 120, each_s=100),
    ],
    "speed": [  # a figure for each target, and what each op costs within a cycle, in a few minutes
        measured("row_linear", "--model 8b --rows 1 32 112 --no-baseline", 90),
        measured("dual_attn", "--no-flex --context 1024 40000 --prefill 2048", 90),
        measured("decode", "--model 8b --modes ar two_pass --baselines", 120),
        measured(
            "decode", "--model 8b --modes ar one_pass --draft-len 15 --fan-out 6 --baselines", 120, "speed-one_pass"
        ),
        measured("profile", "--model 8b --modes ar two_pass", 120),
        measured("row_linear", "--model 1.7b --rows 1 32 112 --no-baseline", 60),
        measured("decode", "--model 1.7b --modes ar two_pass --baselines", 60),
        measured("profile", "--model 1.7b --modes two_pass", 60),
        measured("row_linear", "--model 4b --rows 1 32 112 --no-baseline", 60),
        measured("decode", "--model 4b --modes ar two_pass --baselines", 90),
        measured("consensus", "--slots 256", 60),
    ],
    "variants": [
        *varied("row_linear", "--model 1.7b --rows 1 32 --no-baseline", "none", "prefetch-160", "prefetch-0"),
        *varied("row_linear", "--model 8b --rows 1 32 112 --no-baseline", "none", "prefetch-160", "one-cta-from-97"),
        *varied("dual_attn", "--no-baseline --context 1024 40000 --prefill 4096", "none", "mma-attention"),
        *varied(
            "dual_attn", "--no-baseline --context 40000 --prefill 4096", "no-proxy-fence", "keep-in-l2", "merge-36"
        ),
    ],
    "embedded": [tests("lossless_embedded", 150)],
    "sanitizer": [tests("sanitizer", 300, each_s=280)],
}


class Calls:
    """Runs steps until the time is up, and keeps their results in ``out``."""

    def __init__(self, out: Path, within_s: float):
        self.out, self.ends, self.env = out, time.monotonic() + within_s, {}
        self.env["REPORTS"] = str(REPORTS)
        self.env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.results: list[dict] = []
        # Results of earlier calls; those that passed are not repeated, once it is known that they still count.
        self.earlier = [*results_in(BROUGHT), *results_in(out)]
        self.tested = ""  # what the next results are of: see fingerprint
        out.mkdir(parents=True, exist_ok=True)

    def run(self, step: Step) -> dict:
        left = self.ends - time.monotonic()
        result = {"step": step.name, "state": "not reached", "rc": None, "seconds": 0.0, "said": "", "printed": ""}
        result["tested"] = self.tested
        before = {result["step"]: result for result in self.earlier}.get(step.name)
        if before and self.tested and before["state"] in PASSED:
            result = before | {"state": "ok before"}
        elif left > 0:
            result |= self._run(step, min(step.limit_s, left))
        self.results.append(result)
        known = {r["step"]: r for r in self.earlier}
        for r in self.results:
            if r["step"] not in known or r["state"] != "not reached":
                known[r["step"]] = r
        part = self.out / "steps.part"
        part.write_text(json.dumps([*known.values()], indent=1))
        part.replace(self.out / "steps.json")
        with contextlib.suppress(OSError):  # a step that was killed may still write
            self._pack_reports()
        return result

    def forget_others(self, tested: str) -> None:
        """What is tested from here on; only earlier results of the same still count."""
        self.tested = tested
        self.earlier = [result for result in self.earlier if result["tested"] == tested]

    def _pack_reports(self) -> None:
        if REPORTS.exists():
            part = self.out / "reports.part"
            with tarfile.open(part, "w:gz") as archive:
                archive.add(REPORTS, "reports")
            part.replace(self.out / "reports.tar.gz")

    def _run(self, step: Step, limit_s: float) -> dict:
        print(f"== {step.name}", flush=True)
        start, code = time.monotonic(), None
        env = {**os.environ, **self.env, **step.env, "PYTHONUNBUFFERED": "1"}
        with open(self.out / "steps.log", "a+", errors="replace") as log:
            log.write(f"\n== {step.name}\n")
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)  # the driver may keep it
            log.seek(begin)
            printed = log.read()
        late = "timed out" if limit_s == step.limit_s else "cut short"
        state = "ok" if code == 0 else late if code is None else "FAILED"
        lines = [line for line in printed.splitlines() if line.strip()]
        if code == 0 and "pytest" in step.command and not any(" passed" in line for line in lines[-5:]):
            state = "SKIPPED"  # no test ran: requirements are missing, or the GPU has stopped answering
        return {"state": state, "rc": code, "seconds": round(time.monotonic() - start, 1), "limit_s": limit_s,
                "said": lines[-1].strip("= ")[:120] if lines else "", "printed": "\n".join(lines[-25:])}  # fmt: skip

    def summary(self) -> str:
        lines = [f"{r['state']:11} {r['seconds']:6.1f} s  {r['step']}: {r['said']}" for r in self.results]
        return "\n".join(["== summary", *lines])


def take_module(folder: Path) -> None:
    """Take the module of an earlier call on such a machine; tools/with-env decides whether it is current."""
    if not (folder / KEY).exists():
        return
    (ROOT / "build").mkdir(exist_ok=True)
    shutil.copyfile(folder / KEY, ROOT / "build" / ".native")
    for module in folder.glob("_native*.so"):
        shutil.copyfile(module, ROOT / "orthrus_rt" / module.name)
    link = ROOT / "orthrus_rt" / "triton_kernels"  # without pip's installation Python would not find it
    if not link.is_symlink():
        link.symlink_to("../triton_kernels")


def leave_module(folder: Path) -> None:
    """Leave the module for later calls: see take_module."""
    shutil.copyfile(ROOT / "build" / ".native", folder / KEY)
    for module in (ROOT / "orthrus_rt").glob("_native*.so"):
        shutil.copyfile(module, folder / module.name)


def fingerprint(machine: str) -> str:
    """Tells apart what steps test: the machine, the environment, the module and all Python files."""
    archs = "ORTHRUS_CUDA_ARCHS"  # is in the module's key, and may be set here
    settings = sorted(item for item in os.environ.items() if item[0].startswith("ORTHRUS_") and item[0] != archs)
    digest = hashlib.sha256(f"{machine} {settings}".encode() + (ROOT / "build" / ".native").read_bytes())
    folders = "orthrus_rt", "triton_kernels", "tests", "bench"
    files = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    for path in sorted([*files, *(ROOT / "tools").glob("variant.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def results_in(folder: Path) -> list[dict]:
    """Results of earlier calls."""
    try:
        return json.loads((folder / "steps.json").read_text())
    except (OSError, ValueError):  # no earlier call, or not what it wrote
        return []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "first_on_a_card", metavar="DIR")
    parser.add_argument(
        "--within", type=float, default=570, metavar="SECONDS", help="then whatever runs is ended (%(default)s)"
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    args = parser.parse_args(arguments)
    if unknown := set(args.groups) - set(GROUPS):
        parser.error(f"unknown group {', '.join(sorted(unknown))}: expected {', '.join(GROUPS)}")

    calls = Calls(args.out, args.within)
    machine, build = PREPARATION
    found = calls.run(machine)["printed"]
    print(found, flush=True)
    if "capability 9.0" in found:
        calls.env["ORTHRUS_CUDA_ARCHS"] = os.environ.get("ORTHRUS_CUDA_ARCHS", "90a-real")
    take_module(BROUGHT)
    built = calls.run(build)
    print(built["printed"], flush=True)
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(ROOT / "build" / "native.log", args.out / "native.log")
    if built["state"] == "ok":
        leave_module(args.out)
        calls.forget_others(fingerprint(found))
        python = Path(re.search(r"^python: (.+)$", built["printed"], re.MULTILINE)[1])
        calls.env["PATH"] = f"{python.parent}:{os.environ['PATH']}"
        for step in [step for name in GROUPS if name in args.groups for step in GROUPS[name]]:
            done = calls.run(step)
            if done["state"] not in (*PASSED, "not reached"):
                print(done["printed"][-1500:], flush=True)
            elif done["state"] == "ok" and "$REPORTS" in step.command[-1]:
                print(done["printed"][-800:], flush=True)  # of the table
    print(calls.summary())
    return 0 if all(result["state"] in PASSED for result in calls.results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
