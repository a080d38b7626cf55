"""Programmatic dependent launch (sm_90+): a kernel may start while its predecessor on the stream is still finishing."""

import ctypes
import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def take_turn(PDL: tl.constexpr):
    """Let the successor start and wait for the predecessor. Before this call a kernel may read constants only."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@functools.cache
def _capable(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


def launch_options(device: torch.device) -> dict:
    """Launch options of a kernel that calls :func:`take_turn`: PDL if the GPU supports it.

    ``ORTHRUS_CUDA_PDL=0`` turns it off, here and in the native module.
    """
    if device.type != "cuda" or not _capable(device.index or 0) or os.environ.get("ORTHRUS_CUDA_PDL") == "0":
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def launch(kernel, grid, device: torch.device, *args, **options) -> None:
    """Launch a kernel that calls :func:`take_turn`; products and sums are rounded separately, as in all kernels."""
    share_multiprocessors(kernel[grid](*args, enable_fp_fusion=False, **options, **launch_options(device)))


PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_...


def share_multiprocessors(kernel) -> None:
    """Give ``kernel`` (which a launch returned) the largest shared-memory carve-out, that of the native kernels: with
    another one it could not begin on a multiprocessor until they have left.
    """
    if kernel is not None and getattr(kernel, "function", None):  # None in the interpreter
        _carve_out(kernel.function)


@functools.cache
def _carve_out(function: int) -> None:
    ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(
        ctypes.c_void_p(function), ctypes.c_int(PREFERRED_SHARED_MEMORY_CARVEOUT), ctypes.c_int(100)
    )
