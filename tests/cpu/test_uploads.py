"""Uploads to a device from pageable host memory: nothing waits for the device unnecessarily."""

from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from orthrus_rt import uploads
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints


class Checked(TorchFunctionMode):
    """Refuses calls that wait for the device: ``torch.tensor(..., device=)``; ``.to()`` and ``.copy_()`` from the host
    without non_blocking or with more bytes than CUDA stages; a number written to one element, which is such a copy.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        self.uploads, self.hosts, from_numpy = [], {}, torch.from_numpy
        patch.setattr(torch, "from_numpy", lambda array: self.from_host(from_numpy(array)))

    def from_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.hosts[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that its address stays in use
        return tensor

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor:
            assert isinstance(kwargs.get("device", "cpu"), str), "not on the host, which goes by its name"
            return self.from_host(function(*args, **kwargs))
        if function is torch.Tensor.to and any(isinstance(a, torch.device) for a in args):
            assert kwargs.get("non_blocking"), args
        elif function is torch.Tensor.copy_ and args[1].untyped_storage().data_ptr() in self.hosts:
            assert kwargs.get("non_blocking") and args[1].nbytes <= 64 << 10
            self.uploads.append(args[0].shape)
        elif function is torch.Tensor.__setitem__ and isinstance(args[2], int | float):
            assert args[0][args[1]].dim() > 0, "a number written to one element"
        return function(*args, **kwargs)


def test_admission_does_not_block(tmp_path, monkeypatch):
    folder = checkpoints.make(tmp_path, dtype=torch.bfloat16)
    engine = Engine.from_pretrained(str(folder), device="cpu", mode="two_pass", max_seq_len=256, max_batch_size=2)
    params = SamplingParams(
        max_new_tokens=80, temperature=0.8, seed=1, frequency_penalty=0.5, logit_bias={5: 1.0}, min_tokens=3,
        ignore_eos=True,
    )  # fmt: skip
    prompts = [[1, 2, 3], [4], [5], [6] * 100]
    engine.generate(prompts, params)  # edits allocated, cycles built
    with Checked(monkeypatch) as checked:
        engine.generate(prompts, params)
    assert len(checked.uploads) > 10


def test_uploads_in_parts(monkeypatch):
    """Every value arrives, whatever the number of parts."""
    for count in (0, 1, 16_384, 16_385, 50_000):
        with Checked(monkeypatch) as checked:
            assert uploads.upload(range(count), torch.int32, torch.device("cpu")).tolist() == list(range(count))
        assert len(checked.uploads) == max(1, -(-count // 16_384))


@pytest.mark.parametrize("reads", (False, True))
def test_an_upload_that_is_not_staged_is_waited_for(monkeypatch, reads):
    """If the device reads pageable host memory itself, it might otherwise read what the host writes there next."""
    calls, host = [], torch.arange(4, dtype=torch.int32)

    class Driver:
        def cuDeviceGetAttribute(self, answer, attribute, index):
            answer._obj.value = reads
            calls.append((attribute, index))

    part = SimpleNamespace(copy_=lambda values, non_blocking: calls.append(("copy", values.tolist(), non_blocking)))
    there = SimpleNamespace(device=torch.device("cuda", 1), split=lambda step: [part])
    stream = SimpleNamespace(synchronize=lambda: calls.append("waits"))
    monkeypatch.setattr(uploads.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: stream)
    uploads.reads_pageable_memory.cache_clear()
    uploads.copy_up(there, host)
    uploads.reads_pageable_memory.cache_clear()
    assert calls == [("copy", [0, 1, 2, 3], True), (100, 1), *(["waits"] if reads else [])]
