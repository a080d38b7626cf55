"""The CUDA kernels' weight layout, packed and read back on the CPU."""

import pytest
import torch

from orthrus_rt.weights import cuda_blocks, swizzled


def unpack(data: torch.Tensor, out_features: int, gate_up: bool) -> torch.Tensor:
    """Element by element as csrc/cuda/row_linear_plan.h describes it, by byte offsets instead of the packer's views."""
    blocks, k_blocks = data.shape[:2]
    flat = data.flatten()
    row = torch.arange(blocks * 64)[:, None]
    column = torch.arange(k_blocks * 64)[None, :]
    unit = row // 64 * k_blocks + column // 64
    chunk = (column % 64 // 8) ^ (row % 8)
    rows = flat[unit * 4096 + row % 64 * 64 + chunk * 8 + column % 8]
    assert not rows[out_features:].any()
    rows = rows[:out_features]
    if gate_up:
        half = torch.arange(out_features) // 8 % 2 == 0
        rows = torch.cat([rows[half], rows[~half]])
    return rows


@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 64), (128, 192), (960, 576), (80, 64), (16, 128)])
def test_round_trip(out_features, in_features, gate_up):
    weight = torch.randn(out_features, in_features).bfloat16()
    data = swizzled(cuda_blocks(weight, gate_up))
    assert data.is_contiguous()
    assert data.shape == (-(-out_features // 64), in_features // 64, 64, 8, 8)
    assert torch.equal(unpack(data, out_features, gate_up), weight)


def test_any_number_of_outputs():
    weight = torch.randn(37, 64).bfloat16()
    assert torch.equal(unpack(swizzled(cuda_blocks(weight, False)), 37, False), weight)


def test_errors():
    with pytest.raises(ValueError, match="row_linear: in_features must be a multiple of 64, got 96"):
        cuda_blocks(torch.zeros(64, 96), False)
    with pytest.raises(ValueError, match="must be a multiple of 16, got 24"):
        cuda_blocks(torch.zeros(24, 64), True)
