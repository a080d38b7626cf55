"""Programmatic dependent launch (sm_90+): a kernel may start while its predecessor on the stream still ends."""

import functools
import os

import torch


@functools.cache
def _capable(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


def launch_options(device: torch.device) -> dict:
    """Keyword arguments of a launch whose kernel calls gdc_wait before it reads or writes, where the card can.

    ``ORTHRUS_CUDA_PDL=0`` turns it off, here and in the native module.
    """
    if device.type != "cuda" or not _capable(device.index or 0) or os.environ.get("ORTHRUS_CUDA_PDL") == "0":
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
