"""Tensors larger than memory, which either take memory only for what is written or keep only the end, and ops on
elements beyond 2^31.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
import os

import pytest
import torch

from tests.rows import ar, make_rows

MAP_FIXED = 0x10
NORESERVE = 0x4000  # MAP_NORESERVE, which not every Python's mmap names: no memory is reserved for it


def empty(shape, dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU. Skips the test if this process may not have so much address space."""
    nbytes = math.prod(shape) * dtype.itemsize
    try:
        space = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        pytest.skip(f"{nbytes >> 20} MB of addresses: {error.strerror}")
    return torch.frombuffer(space, dtype=dtype).view(shape)


def drained(shape, dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose last 32 MB or more keep what is written, while all earlier parts map to the same 32 MB."""
    tensor, part = empty(shape, dtype), 32 << 20
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, size = ctypes.c_void_p, ctypes.c_size_t
    with os.fdopen(os.memfd_create("drain"), "wb") as drain:
        drain.truncate(part)
        for begin in range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 2 * part, part):
            access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED
            where = libc.mmap(ctypes.c_void_p(begin), size(part), access, flags, drain.fileno(), ctypes.c_long(0))
            assert where == begin, os.strerror(ctypes.get_errno())
    return tensor


def check_embed(embed, dtype: torch.dtype) -> None:
    table, out = empty(((1 << 31) // 64 + 2, 64), dtype), torch.zeros(1, 64, dtype=dtype)
    table[-1] = 3
    embed(torch.tensor([len(table) - 1], dtype=torch.int32), table, out)
    assert (out == 3).all()


def check_row_linear(row_linear, pack, rows: int, epilogue: str, dtype=torch.bfloat16, **kwargs) -> None:
    """A weight beyond 2^31 elements: the last row's last outputs are those of its last blocks alone. The CTA that
    computes them suffices.
    """
    k, part = 1024, 256
    parts = (1 << 31) // (k * part) + 1
    x, weight = (torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (rows, part))
    last = pack(weight, gate_up=epilogue == "silu_mul")
    data = empty((parts, last.data.numel()), last.data.dtype)
    data[-1] = last.data.flatten()
    whole = dataclasses.replace(last, data=data, out_features=parts * part)
    written = []
    for weight in (last, whole):
        n, residual = weight.out_features, None
        out = empty((rows, n // 2 if epilogue == "silu_mul" else n), dtype)
        if epilogue == "residual":
            residual = empty((rows, n), dtype)
            residual[-1, -32:] = torch.arange(32)
        row_linear(x, weight, out, epilogue=epilogue, residual=residual, **kwargs)
        written.append(out[-1, -32:])
    assert torch.equal(*written)
    assert written[0].any()


def check_qkv_commit(qkv_commit) -> None:
    rows, qkv, cos_sin = make_rows([ar(0, 70, 2)]), torch.randn(2, 5 * 64).bfloat16(), torch.rand(80, 64)
    written = []
    for page in (1, (1 << 31) // (64 * 64) + 1):
        pages = [empty((page + 1, 1, 64, 64), torch.bfloat16) for _ in range(2)]
        q_out, table = torch.empty(2, 3, 64, dtype=torch.bfloat16), torch.tensor([[-9, page]], dtype=torch.int32)
        qkv_commit(qkv, rows, cos_sin, None, 1e-6, *pages, table, None, None, q_out)
        written.append(torch.stack([part[page, 0, 6:8] for part in pages]))
    assert torch.equal(*written)
    assert torch.equal(written[0][1], qkv[:, -64:])
