"""The sanitizers see what native code and the CUDA kernels on the host do: or else they would be silent in vain."""

import subprocess
import sys

import pytest

from tests.sanitized import ROOT

WRITE_BEHIND_THE_LAST_PAGE = """
import sys, pytest, torch
from tests import sanitized
sanitized.use()
from orthrus_rt import native
from tests.cpu.cuda_host import device
from tests.rows import ar, make_rows
if sys.argv[1] == "cuda_host":
    device.install(pytest.MonkeyPatch(), others="cpu")
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
    if not request.config.getoption("--sanitized"):
        pytest.skip("sanitizers: make test-full")
    command = [sys.executable, "-c", WRITE_BEHIND_THE_LAST_PAGE, where, str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if page == 2:
        assert done.returncode == 0, done.stderr
    else:
        # an overflow; or a use after free, where the allocation behind was given back
        assert "ERROR: AddressSanitizer: heap-" in done.stderr and "WRITE of size" in done.stderr
        assert f"csrc/{'cpu' if where == 'cpu' else 'cuda'}/" in done.stderr  # the line that did it
