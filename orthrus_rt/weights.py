"""Linear weights in the layout that their implementation of ``row_linear`` streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orthrus_rt import dispatch

# CPU: strips of 32 outputs (16 gates and their 16 ups for silu_mul) x 2 inputs, so that one vdpbf16ps takes
# 16 outputs' pairs from one cache line; one partial maximum per 512 ids. See csrc/cpu/row_linear.h.
CPU_STRIP = 32
CPU_ARGMAX_TILE = 512


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
    in_features = weight.shape[1]

    def strips(rows, height):
        out = rows.new_zeros(-(-rows.shape[0] // height) * height, in_features + in_features % 2)
        out[: rows.shape[0], :in_features] = rows
        return out.view(-1, height, out.shape[1] // 2, 2)

    if gate_up:
        gate, up = weight.chunk(2)
        data = torch.cat([strips(gate, CPU_STRIP // 2), strips(up, CPU_STRIP // 2)], dim=1)
    else:
        data = strips(weight, CPU_STRIP)
    return data.transpose(1, 2).contiguous(), -(-weight.shape[0] // CPU_ARGMAX_TILE)


def _pack_cuda(weight, gate_up):
    raise NotImplementedError
