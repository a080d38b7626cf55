"""The GPU tests of single kernels, and their benchmarks, on a simulated GPU that runs the CUDA kernels: see
pretended_kernels.py. Their own code runs here, so that it does not fail where they are meant to check kernels.
"""

import pytest

from orthrus_rt import dispatch
from tests.cpu import cuda_host
from tests.cpu.test_pretended_card import passed, run

PRETENDED = "tests.cpu.pretended_kernels"

pytestmark = pytest.mark.skipif(
    dispatch.extension() is None or cuda_host.compiler() is None, reason="needs the native module and a C++ compiler"
)


@pytest.mark.parametrize(
    ("name", "only", "count"),
    [
        ("consensus", "1-2 or graph or no_slots", 4),
        ("qkv_commit", "heads2", 7),
        ("dual_attn", "9 and (padding or infinity) or head_dim_error or nothing", 8),
        ("f32", "130 or agrees or (padding and 9)", 4),
        ("row_linear", "(17 and one_hot) or (argmax and shape0) or in_place or first_call or no_rows or errors", 12),
        ("coded_weights", "coded_as_on or (17 and one_hot)", 4),
        pytest.param("qkv_commit", "not 64_bit", 22, marks=pytest.mark.full),
        pytest.param("dual_attn", "9 and nan or maxima or rounded or (graph and False)", 20, marks=pytest.mark.full),
        pytest.param("row_linear", "silu_mul and 64-8 or both_views and shape0", 24, marks=pytest.mark.full),
        pytest.param("coded_weights", "(drafts or 8_bits or same_bits) and shape0", 8, marks=pytest.mark.full),
    ],
)
def test_gpu_tests(name, only, count):
    assert passed(PRETENDED, f"tests/gpu/test_{name}.py", "-k", only) == count


@pytest.mark.full
def test_row_linear_benchmark(monkeypatch):
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
    what = "bench.bench_row_linear --model tiny --rows 2 --diff"
    assert "| chain | cuda | 2 |" in run(PRETENDED, *what.split())
