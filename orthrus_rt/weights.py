"""Linear weights, in the layout that their implementation of ``row_linear`` streams."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from orthrus_rt import coded_blocks, dispatch, huge_pages
from orthrus_rt.coded_blocks import CODED_BITS, DRAFT_BITS
from orthrus_rt.device import device_scope, stream_of

# CPU: strips of 32 outputs (16 gates and their 16 ups for silu_mul) x one word of inputs (two bfloat16, one float32),
# so that one vector instruction takes the words of 16 outputs from one cache line; one partial maximum per 512 ids. See
# csrc/cpu/row_linear.h.
CPU_STRIP = 32
CPU_ARGMAX_TILE = 512
CPU_MOST_EXTRA = 0.05  # share of a plain weight's bytes: more exceptions (and strips' heads) would dominate the time
REFERENCE_ARGMAX_TILE = 128  # at most; a runner-up is seen only if it is the best of another tile
# CUDA: blocks of 64 outputs x 64 inputs, inputs fastest; see csrc/cuda/row_linear_plan.h. In float32 the plain matrix,
# and one partial maximum per 128 ids; see csrc/cuda/row_linear_f32.cu.
CUDA_BLOCK = 64
CUDA_F32_ARGMAX_TILE = 128


@dataclass
class PackedWeight:
    """A weight ``[out_features, in_features]`` packed once at load.

    Attributes:
        data: the packed storage; for ``reference``, and on CUDA in float32, the plain matrix.
        impl: the implementation of ``row_linear`` that reads it.
        gate_up: rows are gates and ups, for the ``silu_mul`` epilogue alone.
        num_partials: partial maxima per row that the ``argmax`` epilogue writes.
        bits: per element. 12: coded, without loss. 8: of such a coded weight what drafts need. ``data`` then holds raw
            bytes; see csrc/cpu/coded_weight.h and csrc/cuda/coded_block.cuh.
    """

    data: torch.Tensor
    out_features: int
    in_features: int
    impl: str
    gate_up: bool = False
    num_partials: int = 1
    bits: int = 16

    @property
    def coded(self) -> bool:
        return self.bits < 16

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def read_bytes(self, exact: bool = True) -> int:
        """Bytes that ``row_linear`` reads of it: unless ``exact``, 8 of the 12 bits of each coded element."""
        if exact or self.bits != CODED_BITS:
            return self.nbytes
        height = CPU_STRIP if self.impl == "cpu" else CUDA_BLOCK
        return self.nbytes - -(-self.out_features // height) * height * self.in_features // 2


def pack_views(weight: torch.Tensor, weight_diff: torch.Tensor) -> tuple[PackedWeight, PackedWeight]:
    """Pack both views' weights ``[out_features, in_features]`` of the same calls, as :func:`pack` does (it raises the
    same), the diffusion view's for drafts. The CUDA kernels need both of them coded, or neither.
    """
    views = pack(weight), pack(weight_diff, bits=DRAFT_BITS)
    if views[0].impl == "cuda" and views[0].coded != views[1].coded:
        return pack(weight, bits=16), pack(weight_diff, bits=16)
    return views


def pack(
    weight: torch.Tensor, *, gate_up: bool = False, impl: str | None = None, bits: int = CODED_BITS
) -> PackedWeight:
    """Pack ``weight`` ``[out_features, in_features]`` for the implementation chosen for its device and dtype.

    On CUDA this waits for a bfloat16 weight to be complete, as kernels prefetch it ahead of stream order.

    Args:
        gate_up: the first half of the rows are gates and the second half ups.
        impl: another implementation than the one chosen.
        bits: of a bfloat16 element, where coding is chosen and pays: 12; 8 if only drafts depend on the products, which
            are then inexact; 16 to do without coding.

    Raises:
        ValueError: ``impl`` does not take the weight's dtype, gates and ups differ in number, or ``bits`` is none of
            these.
    """
    out_features, in_features = weight.shape
    impl = impl or dispatch.select("row_linear", weight.device, weight.dtype)
    if impl != "reference" and weight.dtype not in dispatch.ELEMENTS:
        raise ValueError(f"row_linear: weight.dtype must be one of {dispatch.ELEMENTS} for {impl}, got {weight.dtype}")
    if bits not in (CODED_BITS, DRAFT_BITS, 16):
        raise ValueError(f"row_linear: bits must be {CODED_BITS}, {DRAFT_BITS} or 16, got {bits}")
    if gate_up and out_features % 2:
        raise ValueError(f"row_linear: out_features of gate and up must be even, got {out_features}")
    coded = False
    if impl == "cpu":
        data, coded = _pack_cpu(weight, gate_up, bits)
        partials = -(-out_features // CPU_ARGMAX_TILE)
    elif impl == "cuda" and weight.dtype is torch.float32:
        data, partials = weight.contiguous(), -(-out_features // CUDA_F32_ARGMAX_TILE)
    elif impl == "cuda":
        data, partials, coded = _pack_cuda(weight, gate_up, bits)
        if (stream := stream_of(weight.device)) is not None:
            stream.synchronize()
    else:
        data, partials = weight, -(-out_features // max(1, min(REFERENCE_ARGMAX_TILE, out_features // 32)))
    bits = bits if coded else 8 * weight.element_size()
    return PackedWeight(data, out_features, in_features, impl, gate_up, partials, bits)


def _pack_cpu(weight, gate_up, bits) -> tuple[torch.Tensor, bool]:
    """The packed weight, and whether it is coded."""
    in_features, per_word = weight.shape[1], 4 // weight.element_size()
    rows = weight.reshape(2 if gate_up else 1, -1, in_features)
    height = CPU_STRIP // len(rows)
    missing = -rows.shape[1] % height, -in_features % per_word
    if any(missing) or rows.storage_offset() % per_word:
        rows = F.pad(rows, (0, missing[1], 0, missing[0]))
    words = rows.contiguous().view(torch.int32).unflatten(1, (-1, height))
    strips = words.permute(1, 3, 0, 2)
    # Steps, each over two inputs, are coded in pairs.
    if (
        bits < 16
        and weight.dtype is torch.bfloat16
        and in_features % 4 == 0
        and (cpu := dispatch.extension().cpu).takes_coded_weights()
    ):
        plain = torch.empty_like(strips, memory_format=torch.contiguous_format)
        cpu.advise_huge_pages(plain.data_ptr(), plain.nbytes)
        strips = plain.copy_(strips)
        cpu.set_num_threads(torch.get_num_threads())
        encoder = cpu.WeightEncoder(strips.data_ptr(), *strips.shape[:2], bits)
        if encoder.nbytes <= (bits / 16 + CPU_MOST_EXTRA) * strips.nbytes:
            coded = huge_pages.empty([encoder.nbytes // 2], weight.dtype)
            encoder.write(coded.data_ptr())
            return coded, True
    data = huge_pages.empty(strips.shape, strips.dtype).copy_(strips)
    return data.view(weight.dtype).view(*strips.shape[:2], CPU_STRIP, per_word), False


def codes_for_cuda() -> bool:
    """Whether bfloat16 weights are coded for GPUs, as ``ORTHRUS_CUDA_CODED=1`` requests."""
    return os.environ.get("ORTHRUS_CUDA_CODED", "0") not in ("", "0")


def _pack_cuda(weight, gate_up, bits) -> tuple[torch.Tensor, int, bool]:
    """The packed weight, its number of partial maxima, and whether it is coded."""
    out_features, in_features = weight.shape
    with device_scope(weight.device):
        partials = dispatch.extension().cuda.row_linear_num_partials(in_features, out_features)
    blocks = cuda_blocks(weight, gate_up)
    if bits < 16 and codes_for_cuda() and (coded := coded_blocks.encode(blocks, bits)) is not None:
        return coded.view(weight.dtype), partials, True
    return swizzled(blocks), partials, False


def cuda_blocks(weight: torch.Tensor, gate_up: bool) -> torch.Tensor:
    """``weight`` in blocks, ``[blocks, in_features / 64, 64 rows, 64]``. Rows are padded with zeros to whole blocks;
    gates and ups alternate every 8 rows.

    Raises:
        ValueError: ``in_features`` is not a multiple of 64, or the number of gates and of ups not a multiple of 8.
    """
    out_features, in_features = weight.shape
    if in_features % CUDA_BLOCK:
        raise ValueError(f"row_linear: in_features must be a multiple of {CUDA_BLOCK}, got {in_features}")
    if gate_up:
        if out_features % 16:
            raise ValueError(f"row_linear: out_features of gate and up must be a multiple of 16, got {out_features}")
        weight = weight.view(2, -1, 8, in_features).transpose(0, 1)
    blocks = -(-out_features // CUDA_BLOCK)
    rows = weight.new_zeros(blocks * CUDA_BLOCK, in_features)
    rows[:out_features] = weight.reshape(out_features, in_features)
    return rows.view(blocks, CUDA_BLOCK, in_features // CUDA_BLOCK, CUDA_BLOCK).transpose(1, 2)


def swizzled(blocks: torch.Tensor) -> torch.Tensor:
    """Plain blocks as the CUDA kernels stream them, ``[blocks, in_features / 64, 64 rows, 8 chunks, 8]``: the 16-byte
    chunks of row ``r`` lie in the order ``chunk ^ (r % 8)``.
    """
    rows = blocks.unflatten(3, (8, 8))
    chunk = torch.arange(8, device=blocks.device)
    order = chunk[None, :] ^ (torch.arange(CUDA_BLOCK, device=blocks.device) % 8)[:, None]
    return rows.gather(3, order[:, :, None].expand(rows.shape)).contiguous()
