"""The sanitizers find faults in native code and in CUDA kernels on the host: otherwise their silence means nothing."""

import re
import subprocess
import sys

import pytest

from tests.cpu import cuda_host
from tests.sanitized import ROOT

WRITE_BEHIND_THE_LAST_PAGE = """
import sys, torch
from tests import sanitized
sanitized.ADDRESS.use()
from orthrus_rt import native
from tests.cpu.cuda_host import device
from tests.rows import ar, make_rows
on_the_host = device.installed(others="cpu")
if sys.argv[1] == "cuda_host":
    on_the_host.__enter__()
pages = [torch.zeros(3, 2, 64, 64).bfloat16() for _ in range(2)]
scratch = [torch.zeros(0, 2, 64).bfloat16() for _ in range(2)]
table = torch.tensor([[int(sys.argv[2])]], dtype=torch.int32)
q = torch.zeros(1, 4, 64).bfloat16()
qkv = torch.zeros(1, 8 * 64).bfloat16()
native.qkv_commit(qkv, make_rows([ar(0, 0, 1)]), torch.zeros(1, 64), None, 1e-6, *pages, table, *scratch, q)
"""


@pytest.mark.parametrize("where", ["cpu", "cuda_host"])
@pytest.mark.parametrize("page", [2, 3])
def test_a_write_behind_the_last_page_is_found(request, where, page):
    if request.config.getoption("--sanitized") != "address":
        pytest.skip("AddressSanitizer: make test-full")
    command = [sys.executable, "-c", WRITE_BEHIND_THE_LAST_PAGE, where, str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if page == 2:
        assert done.returncode == 0, done.stderr
    else:
        # an overflow, or a use after free if the allocation behind it was freed
        assert "ERROR: AddressSanitizer: heap-" in done.stderr and "WRITE of size" in done.stderr
        assert f"csrc/{'cpu' if where == 'cpu' else 'cuda'}/" in done.stderr  # the line at fault


# Each kernel is named after the ordering without which a device would race.
RACY = re.findall(r"^RACY\((\w+)", (cuda_host.HERE / "racy.cpp").read_text(), re.M)
RUN = """
import ctypes, sys
from tests.cpu import cuda_host
from tests.sanitized import THREAD
cuda_host.FLAGS += THREAD.flags
cuda_host.LIBRARIES.append(ctypes.CDLL(sys.argv[1]))
with cuda_host.host_unseen():
    getattr(cuda_host.LIBRARIES[0], sys.argv[2])(sys.argv[3] == "True")
"""


@pytest.fixture(scope="module")
def racy(request):
    if request.config.getoption("--sanitized") != "thread":
        pytest.skip("ThreadSanitizer: make test-full")
    return cuda_host.build("racy.cpp", ())._name


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kernel", RACY)
def test_a_race_is_found(racy, kernel, ordered):
    command = [sys.executable, "-c", RUN, racy, kernel, str(ordered)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if ordered:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode != 0 and "WARNING: ThreadSanitizer: data race" in done.stderr, done.stderr
        assert kernel in done.stderr
