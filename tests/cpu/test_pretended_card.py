"""The host code of the GPU tests and of the benchmarks, on a simulated GPU: see pretended_card.py."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orthrus_rt import embedded

ROOT = Path(__file__).parents[2]
PRETENDED = "tests.cpu.pretended_card"
OTHER_MODES = "((common or arrive) and not one_pass)"

pytestmark = pytest.mark.native


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def passed(plugin: str, *arguments: str) -> int:
    """How many GPU tests pass in a process with this simulated GPU, in which none may fail."""
    how = f"-p {plugin} -p no:hypothesispytest -p no:cacheprovider -q".split()
    return int(re.search(r"(\d+) passed", run("pytest", *how, *arguments))[1])


def test_gpu_tests():
    """Except those that need Triton, CUDA's profiler, a second thread, a device's memory or a quiet machine."""
    files = [f"tests/gpu/test_{name}.py" for name in ("auto", "engine", "profile", "failures")]
    but = "costs_and_acceptance or costs_are_kept or times_every_call or triton or launches_one_graph or uploads"
    but += " or keeps_to_its_stream or decode_benchmark or device_that_fails or other_threads or program_captures"
    but += " or gives_the_memory"
    assert passed(PRETENDED, *files, "-k", f"not ({but} or {OTHER_MODES})") == 34


@pytest.mark.parametrize(
    "what",
    [
        "bench.bench_host --device cuda --batch 1 4 --cycles 10",
        "bench.bench_consensus --slots 4",
        "bench.bench_qkv_commit --model tiny --rows 4",
        "bench.bench_profile --device cuda --model tiny --context 100 --repeats 2",
        pytest.param(
            "bench.bench_decode --model tiny --context 100 --batch 4 --cycles 8 --block-len 4", marks=pytest.mark.full
        ),
    ],
)
def test_benchmarks(what):
    assert "| 4 |" in run(PRETENDED, *what.split())


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec(embedded.GGUF_PACKAGE) is None, reason=f"needs {embedded.WHEEL}")
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("bench --profile --modes one_pass --context 100", "row_linear"),
        ("generate --mode one_pass --max-new-tokens 30 --stats --raw 1,2,3,", "one_pass"),
    ],
)
def test_commands(what, says):
    assert re.search(says, run(PRETENDED, "orthrus_rt", *what.split(), "--device", "cuda"))
