"""The CUDA kernels under compute-sanitizer: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
CASES = (
    "test_dual_attn.py::test_against_float64[one_pass-Heads(q=9, kv=3, dim=64)]",
    "test_dual_attn.py::test_against_float64[verify-Heads(q=8, kv=8, dim=128)]",
    "test_qkv_commit.py::test_against_float64[heads2-True-bf16]",
    "test_f32.py::test_row_linear[(130, 70)]",
    "test_f32.py::test_dual_attn[padding-Heads(q=9, kv=3, dim=64)]",
    "test_consensus.py::test_against_oracle[37-16]",
)


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", pytest.param("racecheck", marks=pytest.mark.full)])
def test_no_finding(tool):
    command = [SANITIZER, "--tool", tool, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / "gpu" / case) for case in CASES]
    # Each tensor gets an allocation of its own, so that its end is known to the tool.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert f"{len(CASES)} passed" in done.stdout, done.stdout + done.stderr
    findings = [line for line in done.stdout.splitlines() if line.startswith("=====") and "orthrus" in line]
    assert not findings, done.stdout
