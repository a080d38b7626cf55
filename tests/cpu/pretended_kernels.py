"""The simulated GPU of pretended_card.py, whose native ops are the CUDA kernels, compiled for the host, as on a GPU of
132 SMs; the ops that a GPU runs in Triton are the CPU's. So the GPU tests of single kernels run too, slowly:

    python -m pytest -p tests.cpu.pretended_kernels tests/gpu/test_row_linear.py
    python -m tests.cpu.pretended_kernels bench.bench_row_linear --model tiny --rows 4
"""

import os

from orthrus_rt import dispatch, native
from tests.cpu import pretended_card
from tests.cpu.cuda_host import device


class Kernels(device.Device):
    def isa(self) -> str:
        return os.environ.get("ORTHRUS_CUDA_ISA") or "sm90a"


def install() -> None:
    pretended_card.install()
    kernels = Kernels(num_sms=132)
    module = device.Module(kernels)
    dispatch.extension = lambda: module
    dispatch.select = lambda op, *_: "cuda" if op in device.NATIVE else "cpu"
    native._launch = lambda op, params, _: getattr(kernels, op)(params)


def pytest_configure(config) -> None:
    install()


if __name__ == "__main__":
    install()
    pretended_card.run_module()
