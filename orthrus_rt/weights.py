"""Linear weights in the layout that their implementation of ``row_linear`` streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orthrus_rt import dispatch

# CPU: 32 outputs x 2 inputs, so that one vdpbf16ps takes 16 outputs' pairs from one cache line.
CPU_TILE_OUT = 32


@dataclass
class PackedWeight:
    """A weight ``[out_features, in_features]`` packed once at load.

    Attributes:
        data: the packed storage; for ``reference`` the plain matrix.
        impl: the implementation of ``row_linear`` that reads it.
        gate_up: rows are gate and up interleaved, for the ``silu_mul`` epilogue alone.
        num_partials: partial maxima per row that the ``argmax`` epilogue writes.
    """

    data: torch.Tensor
    out_features: int
    in_features: int
    impl: str
    gate_up: bool = False
    num_partials: int = 1

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def pack(weight: torch.Tensor, *, gate_up: bool = False, impl: str | None = None) -> PackedWeight:
    """Pack ``weight`` ``[out_features, in_features]`` for the implementation chosen for its device and dtype.

    ``gate_up`` says that the first half of the rows are gates and the second half ups.
    """
    out_features, in_features = weight.shape
    impl = impl or dispatch.select("row_linear", weight.device, weight.dtype)
    if impl == "cpu":
        data, partials = _pack_cpu(weight, gate_up)
    elif impl == "cuda":
        data, partials = _pack_cuda(weight, gate_up)
    else:
        data, partials = weight, 1
    return PackedWeight(data, out_features, in_features, impl, gate_up, partials)


def _pack_cpu(weight, gate_up):
    raise NotImplementedError


def _pack_cuda(weight, gate_up):
    raise NotImplementedError
