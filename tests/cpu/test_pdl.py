"""How Triton's kernels share a GPU with their neighbours on the stream, with a stand-in for its driver."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from orthrus_rt.triton_kernels import pdl


def test_triton_kernels_divide_the_shared_memory_as_the_native_ones(monkeypatch):
    """Once per kernel, and never in the interpreter, whose launches return None."""
    set_attributes = []

    class Driver:
        def cuFuncSetAttribute(self, *args):
            set_attributes.append([arg.value for arg in args])

    monkeypatch.setattr(pdl.ctypes, "CDLL", lambda name: Driver())
    pdl._carve_out.cache_clear()
    for kernel in (SimpleNamespace(function=1 << 46), None, SimpleNamespace(function=1 << 46)):
        pdl.share_multiprocessors(kernel)
    pdl._carve_out.cache_clear()
    assert set_attributes == [[1 << 46, pdl.PREFERRED_SHARED_MEMORY_CARVEOUT, 100]]


def test_triton_kernels_start_early_where_the_card_can(monkeypatch):
    """Each GPU is judged by itself. The kernel has to know as well, or it would not wait."""
    capabilities = [(8, 9), (9, 0), (12, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    pdl._capable.cache_clear()
    early, not_early = {"PDL": True, "launch_pdl": True}, {"PDL": False}
    monkeypatch.delenv("ORTHRUS_CUDA_PDL", raising=False)
    devices = [torch.device(name) for name in ("cpu", "cuda:0", "cuda:1", "cuda:2")]
    try:
        assert [pdl.launch_options(device) for device in devices] == [not_early] * 2 + [early] * 2
        monkeypatch.setenv("ORTHRUS_CUDA_PDL", "0")
        assert [pdl.launch_options(device) for device in devices] == [not_early] * 4
    finally:
        pdl._capable.cache_clear()
