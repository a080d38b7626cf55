"""Uploads to a device: nothing waits for it unnecessarily, and every value arrives."""

import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from orthrus_rt import prefill, uploads
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints


class Checked(TorchFunctionMode):
    """Refuses calls that wait for the device: ``torch.tensor(..., device=)``; ``.to()`` without non_blocking;
    ``.copy_()`` from the host, unless in ``copy_up``; a number written to one element, which is such a copy.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        self.uploads, self.hosts, self.allowed, from_numpy = [], {}, False, torch.from_numpy
        for module in (uploads, prefill):
            patch.setattr(module, "copy_up", self.copy_up)
        patch.setattr(torch, "from_numpy", lambda array: self.from_host(from_numpy(array)))

    def from_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.hosts[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that its address stays in use
        return tensor

    def copy_up(self, there: torch.Tensor, host: torch.Tensor, real=uploads.copy_up) -> None:
        self.uploads.append(there.shape)
        self.allowed = True
        real(there, host)
        self.allowed = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor:
            assert isinstance(kwargs.get("device", "cpu"), str), "not on the host, which goes by its name"
            return self.from_host(function(*args, **kwargs))
        if function is torch.Tensor.to and any(isinstance(a, torch.device) for a in args):
            assert kwargs.get("non_blocking"), args
        elif function is torch.Tensor.copy_ and args[1].untyped_storage().data_ptr() in self.hosts:
            assert self.allowed, args
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


class Late:
    """A CUDA device that fetches a copy only when its arrival is waited for."""

    device = torch.device("cuda", 0)

    def __init__(self, monkeypatch):
        self.values, self.launched, self.arrived, self.events, empty = [], [], 0, 0, torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **how: empty(*size, **how))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda of: of)

    def event(self):
        self.events += 1
        return SimpleNamespace(record=self.record, synchronize=self.fetch_one)

    def record(self, stream):
        assert stream == self.device

    def copy_(self, staged, non_blocking):
        assert non_blocking
        self.launched.append(staged)

    def fetch_one(self):
        self.values += self.launched[self.arrived].tolist()
        self.arrived += 1


def test_nothing_is_staged_over_what_the_device_has_not_fetched(monkeypatch):
    late, sent, rng = Late(monkeypatch), [], random.Random(4)
    staging = uploads.Staging()
    for size in [1, 65_536, 3, *(rng.choice((1, 7, 100, 3_000, 60_000)) for _ in range(400))]:
        host = torch.tensor([rng.randrange(1 << 31) for _ in range(size)], dtype=torch.int32)
        sent += host.tolist()
        staging.copy(late, host)
        host.zero_()
    assert 0 < late.arrived < len(late.launched)  # waits, but only for what is in the way
    in_flight = sum(staged.nbytes for staged in late.launched[late.arrived :])
    assert in_flight > uploads.STAGED_BYTES - 2 * uploads.PART_BYTES
    while late.arrived < len(late.launched):
        late.fetch_one()
    assert late.values == sent and late.events < 100


def test_the_staging_memory_is_never_freed(monkeypatch):
    """After the device has failed, torch could not."""
    Late(monkeypatch)
    memory = weakref.ref(uploads.Staging()._memory)
    assert memory() is not None


def test_an_interrupted_copy_counts_as_under_way(monkeypatch):
    """The interrupt may come after its launch."""
    Late(monkeypatch)
    staging, recorded = uploads.Staging(), []

    def interrupted(staged, non_blocking):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=recorded.append))
    with pytest.raises(KeyboardInterrupt):
        staging.copy(SimpleNamespace(device=Late.device, copy_=interrupted), torch.arange(4))
    assert len(staging._parts) == 1 and recorded == [Late.device]


def test_long_copies_go_in_parts(monkeypatch):
    late, words = Late(monkeypatch), uploads.PART_BYTES // 4
    staging = uploads.Staging()
    monkeypatch.setattr(uploads, "staging", lambda device: staging)
    for count in (0, 1, words, words + 1, 6 * words):
        num_parts, before = max(1, -(-count // words)), len(late.launched)
        there = SimpleNamespace(device=late.device, split=lambda step, n=num_parts: [late] * n * (step == words))
        uploads.copy_up(there, torch.arange(count, dtype=torch.int32))
        assert len(late.launched) - before == num_parts
    while late.arrived < len(late.launched):
        late.fetch_one()
    assert late.values == [value for count in (1, words, words + 1, 6 * words) for value in range(count)]


def test_parts_of_any_dtype_follow_each_other(monkeypatch):
    late, staging = Late(monkeypatch), uploads.Staging()
    for host in (torch.tensor([True]), torch.tensor([1 << 40])):
        staging.copy(late, host)
    assert [staged.tolist() for staged in late.launched] == [[True], [1 << 40]]
