"""Make the packaged int8 diffusion view from the trained one: python tools/quantize_view.py SRC DST (safetensors)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from orthrus_rt.storage import SCALE_SUFFIX


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per row: ``(int8 [rows, columns], fp32 scale [rows])``, off by at most half a scale."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def quantize_view(source: Path, target: Path) -> None:
    """Round the matrices of the diffusion view ``source`` to int8 per output row; norms stay."""
    tensors = {}
    for name, weight in load_file(source).items():
        if not weight.is_floating_point() or name.endswith(SCALE_SUFFIX):
            raise ValueError(f"{source} holds {name} ({weight.dtype}): it is quantised already")
        if not weight.isfinite().all():
            raise ValueError(f"{source}: {name} holds NaN or inf")
        if weight.dim() == 2:
            tensors[name], tensors[name + SCALE_SUFFIX] = quantize_rows(weight)
        else:
            tensors[name] = weight
    target.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file makes it private to its owner


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    args = parser.parse_args()
    try:
        quantize_view(args.source, args.target)
    except (OSError, ValueError, SafetensorError) as error:
        parser.error(str(error))
