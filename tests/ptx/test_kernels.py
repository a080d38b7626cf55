"""Tests of tests/cpu, tests/interpret and this folder on compiled kernels, each part in a process of its own."""

import importlib.util
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.ptx import build

AT_ONCE = 2
SEED = 1
TIMEOUT_S = 1500


@dataclass(frozen=True)
class Part:
    """Test files for an architecture, in random order if ``seed`` is given; ``kernels`` must be among those run."""

    arch: str
    files: str
    kernels: str
    only: str = ""
    seed: int | None = None
    triton: bool = False
    mapped: bool = False

    def __str__(self) -> str:
        names = re.sub(r"tests/|test_|\.py|cpu/|interpret/|ptx/|_on_host|_host", "", self.files).replace(" ", "-")
        return f"sm_{self.arch}-{names}" + ("" if self.seed is None else "-random")

    def run(self):
        args = [*self.files.split(), *(["-k", self.only] if self.only else [])]
        how = dict(triton=self.triton, seed=self.seed, mapped=self.mapped)
        return build.pytest_process(self.arch, *args, **how, capture_output=True, text=True, timeout=TIMEOUT_S)


pytestmark = pytest.mark.full
ROW_LINEAR = " ".join(
    f"tests/cpu/test_{name}.py" for name in ("row_linear_on_host", "row_linear_prefetches", "coded_blocks")
)
DUAL_ATTN = "tests/cpu/test_dual_attn_on_host.py"
OTHERS = "tests/cpu/test_cuda_on_host.py tests/cpu/test_consensus.py"
WIDTHS, FAULTS = "tests/ptx/test_widths.py", "tests/ptx/test_faults.py"
PARTS = [
    Part("90a", "tests/cpu/test_f32_on_host.py", "row_linear_f32 dual_attn"),
    Part("80", ROW_LINEAR, "row_linear_mma", "sm80"),
    Part("80", ROW_LINEAR, "row_linear_mma", "sm80 and not oracle", seed=SEED),
    Part("90a", ROW_LINEAR, "row_linear_sm90", "sm90"),
    Part("90a", ROW_LINEAR, "row_linear_sm90", "sm90 and not oracle", seed=SEED),
    Part("80", WIDTHS, "row_linear_mma dual_attn", "sm80"),
    Part("90a", WIDTHS, "row_linear_sm90 dual_attn", "sm90"),
    Part("90a", "tests/interpret/test_process_logits.py", "_draw_kernel _count_kernel", triton=True),
    Part("90a", "tests/interpret/test_engine.py", "row_linear_sm90 rms_norm consensus", triton=True, mapped=True),
    Part("90a", "tests/ptx/test_triton.py", "rms_norm embed dual_attn_kernel sum_words", triton=True),
    Part("80", "tests/ptx/test_triton.py", "rms_norm embed dual_attn_kernel sum_words", triton=True),
    Part("80", DUAL_ATTN, "dual_attn", "sm80"),
    Part("90a", DUAL_ATTN, "dual_attn"),
    Part("90a", f"{OTHERS} {DUAL_ATTN}", "qkv_commit consensus dual_attn", "not sm80", seed=SEED),
    Part("90a", OTHERS, "qkv_commit consensus"),
    Part("90a", "tests/ptx/test_traffic.py tests/ptx/test_shapes.py", "row_linear_sm90 _draw_kernel", triton=True),
    Part("80", "tests/ptx/test_shapes.py", "row_linear_mma", "row_linear_draft", triton=True),
    Part("80", FAULTS, "row_linear_mma dual_attn", "sm80"),
    Part("90a", FAULTS, "row_linear_sm90 dual_attn", "sm90"),
]


@pytest.fixture(scope="module")
def begun(request):
    """The processes of all selected parts, a few at a time. At the end, parts that have not begun are cancelled."""
    if why := build.why_not():
        pytest.skip(why)
    has_triton = importlib.util.find_spec("triton") is not None
    chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    parts = [params["part"] for params in chosen if "part" in params]  # other files may run in the same session
    pool = ThreadPoolExecutor(AT_ONCE)
    yield {part: pool.submit(part.run) for part in parts if isinstance(part, Part) and (has_triton or not part.triton)}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_part(part, begun):
    if part not in begun:
        pytest.skip("triton is not installed")
    done = begun[part].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 0
    ran = "".join(re.findall(r"^ran .*\n", done.stdout, re.M))
    assert all(kernel in ran for kernel in part.kernels.split()), ran
