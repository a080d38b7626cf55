"""pytest plugin: CUDA kernels that tests/cpu would compile for the host run as PTX in the emulator instead.

Its process needs the environment that build.pytest_process sets up; test_kernels.py starts such processes.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct

from tests.cpu import cuda_host
from tests.ptx import build

ARCH = os.environ["PTX_ARCH"]
SEED = os.environ.get("PTX_SEED")
AT_ONCE = 3  # CTAs that are interleaved in a random order
FOLDER = build.kernels(ARCH)


class Library(ctypes.CDLL):
    """The launchers and the emulator that they call."""

    def __init__(self):
        super().__init__(str(FOLDER / "kernels.so"))
        self.ptx_instructions.restype = ctypes.c_uint64
        self.ptx_limit.argtypes = [ctypes.c_uint64]
        self.ptx_launched.restype = self.ptx_traffic_json.restype = ctypes.c_char_p
        self.ptx_architecture(int(ARCH.rstrip("a")))
        self.ptx_mapped(int(os.environ["PTX_MAPPED"]))
        for path in sorted(FOLDER.glob("*.ptx")):
            assert self.ptx_load(str(path).encode()) == 0
        if SEED is not None:
            self.ptx_random(AT_ONCE, int(SEED))

    def configure(self, descending: int, num_sms: int) -> None:
        self["configure"](descending, num_sms)
        self.read_before_wait([])

    def row_linear(self, params, descending: int, num_sms: int) -> int:
        self.ptx_before_row_linear(params)
        return self["row_linear"](params, descending, num_sms)

    def qkv_commit(self, params) -> int:
        self.ptx_before_qkv_commit(params)
        return self["qkv_commit"](params)

    def qkv_commit_f32(self, params) -> int:
        self.ptx_before_qkv_commit(params)
        return self["qkv_commit_f32"](params)

    def read_before_wait(self, tensors: list) -> None:
        """Let kernels read these ahead of griddepcontrol.wait."""
        self.ptx_before_wait((ctypes.c_uint64 * len(tensors))(*[t.data_ptr() for t in tensors]), len(tensors))

    def traffic(self) -> dict[str, dict]:
        """Each kernel's memory traffic since ptx_traffic(1), which resets the counters."""
        return json.loads(self.ptx_traffic_json())

    def launch(
        self, path, name: str, grid: tuple[int, ...], threads: int, dynamic_shared: int, values: list, pdl=False
    ) -> None:
        """Run a kernel of a PTX file. ``values``: tensors, ints and floats. ``pdl``: it may begin before the
        preceding grid has ended.
        """
        words = [_word(value) for value in values]
        error = self.ptx_launch(
            str(path).encode(), name.encode(), (ctypes.c_uint32 * 3)(*(*grid, 1, 1)[:3]), threads, dynamic_shared,
            (ctypes.c_uint64 * len(words))(*words), len(words), pdl,
        )  # fmt: skip
        assert error == 0, f"{name} returned {error}"


def _word(value) -> int:
    if isinstance(value, float):
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return (value if isinstance(value, int) else value.data_ptr()) & (1 << 64) - 1


LIBRARY = Library()
cuda_host.build = lambda interface, kernels: LIBRARY
PRINTS_TRAFFIC = "PTX_TRAFFIC" in os.environ
if PRINTS_TRAFFIC:
    LIBRARY.ptx_traffic(1)


def pytest_terminal_summary(terminalreporter):
    names = LIBRARY.ptx_launched().decode().split()
    millions = LIBRARY.ptx_instructions() / 1e6
    terminalreporter.write_line(f"ptx {ARCH}: {millions:.1f} M instructions of warps, {LIBRARY.ptx_reports()} reports")
    for name in names:
        terminalreporter.write_line(f"ran {name}")
    if PRINTS_TRAFFIC:
        from tests.ptx import traffic

        terminalreporter.write_line(traffic.table(LIBRARY.traffic()))
