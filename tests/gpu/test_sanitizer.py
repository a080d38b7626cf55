"""The CUDA kernels under compute-sanitizer: no access out of bounds, no race in shared memory."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
LIMIT_S = 240  # below the tier's own limit, which would leave the process running
# The tool gives up on a process whose first CUDA call comes more than 10 seconds after the start, imports included, and
# lets it run unchecked.
ATTACHED = {"memcheck": "ERROR SUMMARY", "racecheck": "RACECHECK SUMMARY"}
# Only kernels with this in their mangled names are checked: csrc's, which are in namespace orthrus::cuda. Torch's and
# cuBLAS's take most of the time; Triton's are named after their Python functions, and none is in CASES. CUDA 12.3 or
# later: before that the option was --kernel-regex.
OURS = ("--kernel-name", "kns=orthrus")
CASES = (
    "test_dual_attn.py::test_against_float64[-one_pass-Heads(q=9, kv=3, dim=64)]",
    "test_dual_attn.py::test_against_float64[-verify-Heads(q=8, kv=8, dim=128)]",
    "test_dual_attn.py::test_against_float64[sm80-verify-Heads(q=9, kv=3, dim=64)]",
    "test_qkv_commit.py::test_against_float64[heads2-True-bf16]",
    # Decode: tiles cut along k, with 1 row and with 31. Prefill: the last tiles of rows and of features are partial.
    "test_row_linear.py::test_both_views[-32-1-shape1]",
    "test_row_linear.py::test_both_views[sm80-32-1-shape1]",
    "test_coded_weights.py::test_both_views[-32-1-shape1]",
    "test_row_linear.py::test_one_hot_rows_pick_columns_of_the_weight[-161]",
    "test_row_linear.py::test_one_hot_rows_pick_columns_of_the_weight[sm80-161]",
    "test_coded_weights.py::test_both_views[sm80-32-1-shape1]",
    "test_coded_weights.py::test_coded_weights_give_the_same_bits[-shape1-normal]",
    "test_coded_weights.py::test_one_hot_rows_pick_columns_of_the_weight[-161]",
    "test_f32.py::test_row_linear[(130, 70)]",
    "test_f32.py::test_dual_attn[padding-Heads(q=9, kv=3, dim=64)]",
    "test_consensus.py::test_against_oracle[37-16]",
)
WILD_WRITE = """
from tests.gpu.test_qkv_commit import HEADS, Case
from tests.rows import ar
case = Case(HEADS[2], [ar(0, 0, 1)])
case.page_table.fill_(case.num_pages)
case.run()[-1].cpu()
"""

needs_sanitizer = pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")


def sanitized(tool: str, *arguments: str) -> tuple[str, list[str]]:
    """What Python prints with these arguments under the tool, and the lines that are findings."""
    # Each tensor gets its own allocation, so that the tool knows where it ends.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(
        [SANITIZER, "--tool", tool, "--launch-timeout", str(LIMIT_S), *OURS, sys.executable, *arguments],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # Python would outlive the tool
            printed, _ = process.communicate()
            pytest.fail(f"{tool}: not finished in {LIMIT_S} s; until then:\n{printed}", pytrace=False)
    assert ATTACHED[tool] in printed, printed
    return printed, re.findall(r"^=====.*\borthrus::cuda\b.*", printed, re.MULTILINE)


@needs_sanitizer
@pytest.mark.parametrize("tool", ["memcheck", pytest.param("racecheck", marks=pytest.mark.full)])
def test_no_finding(tool):
    cases = [str(ROOT / "tests" / "gpu" / case) for case in CASES]
    printed, findings = sanitized(tool, "-m", "pytest", "-v", "-p", "no:cacheprovider", *cases)
    assert f"{len(CASES)} passed" in printed, printed
    assert not findings, printed


@needs_sanitizer
@pytest.mark.full
def test_a_write_behind_the_last_page_is_found():
    """Otherwise the filter would match no kernel, and the tests above could find nothing."""
    printed, findings = sanitized("memcheck", "-c", WILD_WRITE)
    assert findings, printed
