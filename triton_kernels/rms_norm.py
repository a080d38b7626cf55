"""RMS normalisation of selected rows."""

import triton
import triton.language as tl

from .pdl import launch, take_turn


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, row_index_ptr, out_ptr, hidden, eps,
    HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < hidden
    # The weight is a constant of the model, so it may be read before the predecessor has finished.
    weight = tl.load(weight_ptr + lane, mask=inside, other=0.0)
    take_turn(PDL)
    source = row
    if HAS_INDEX:
        source = tl.load(row_index_ptr + row).to(tl.int64)
    x = tl.load(x_ptr + source * hidden + lane, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    out = x * scale * weight
    tl.store(out_ptr + row * hidden + lane, out.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x, weight, eps, out, row_index=None):
    """``out[r] = round(x[i] * rsqrt(mean(x[i]^2) + eps) * weight)``, ``i = row_index[r]`` or ``r``.

    Contract: x: ``[num_rows_in, hidden]`` bf16 or fp32, contiguous. Not mutated. weight: fp32 ``[hidden]``, contiguous;
        constant while the preceding kernels run. row_index: int32 ``[num_rows]`` within x's rows, or None. out:
        ``[num_rows, hidden]`` of x's dtype, contiguous, MUTATED whole; may be x itself where row_index is None. No
        rows: no launch. fp32 inside, one rounding at the store. One program reduces one row in an order that depends on
        ``hidden`` alone, provided x and out are aligned to 16 bytes (otherwise Triton assigns other elements to
        threads): deterministic, row-invariant, graph-safe. Moves ``num_rows * hidden * 2`` elements and ``4 * hidden``
        bytes of weight; 4 FLOPs an element.
    """
    num_rows, hidden = out.shape
    if not num_rows:
        return
    block = triton.next_power_of_2(hidden)
    warps = min(max(block // 512, 1), 16)
    launch(
        rms_norm_kernel, (num_rows,), x.device,
        x, weight, row_index, out, hidden, eps, HAS_INDEX=row_index is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
