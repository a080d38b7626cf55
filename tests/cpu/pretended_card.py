"""A simulated GPU: runs the host code for GPUs, in tests/gpu and bench, on a machine without one.

Its tensors lie in host memory, with a mark that results inherit and that makes ``device`` report the GPU. Ops are the
CPU's, and graphs are tapes. It refuses what a GPU refuses: tensors of two devices in one operation, NumPy's view of a
tensor, a value read during capture or under sync-debug mode. It shows nothing about kernels, time or overlap. Once
installed, it stays for the life of the process:

    python -m pytest -p tests.cpu.pretended_card tests/gpu/test_auto.py
    python -m tests.cpu.pretended_card bench.bench_host --device cuda --cycles 10
"""

from __future__ import annotations

import contextlib
import functools
import runpy
import sys
import time
from collections import defaultdict
from types import SimpleNamespace

import torch
import torch.profiler
from torch.overrides import TorchFunctionMode

from tests.cpu.cuda_host.device import Tape, launch

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")
READS = {"item", "tolist", "cpu", "nonzero", "equal", "__bool__", "__int__", "__float__", "__index__"}
COPIES = {"to", "cpu", "cuda"}
CROSSES = COPIES | {"copy_", "__getitem__", "__setitem__"}  # may take tensors of both devices


def on_card(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "on_card", False)


ANSWERS = {
    torch.Tensor.device.__get__: lambda t: CARD if on_card(t) else HOST,
    torch.Tensor.is_cuda.__get__: on_card,
    torch.Tensor.is_cpu.__get__: lambda t: not on_card(t),
}
# The most frequent queries, each about a single tensor: a GPU never refuses them, and the result is not a tensor.
PLAIN = {torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.data_ptr, torch.Tensor.is_contiguous}


def names(device_type: str, value) -> bool:
    if isinstance(value, str):
        return value.split(":")[0] == device_type
    return isinstance(value, torch.device) and value.type == device_type


def on_host(value):
    return HOST if names("cuda", value) else value


def tensors_in(value) -> list[torch.Tensor]:
    """The tensors in any of Python's own containers."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for part in value for tensor in tensors_in(part)]


def shares(tensor: torch.Tensor, others) -> bool:
    return tensor.untyped_storage().data_ptr() in {other.untyped_storage().data_ptr() for other in others}


class Graph(Tape):
    """Stands in for torch.cuda.CUDAGraph."""

    def capture_begin(self, *_, **__) -> None:
        Tape.recording = self

    def capture_end(self) -> None:
        Tape.recording = None

    def replay(self) -> None:
        with torch._C.DisableTorchFunction(), torch.inference_mode():
            super().replay()


class Card(TorchFunctionMode):
    """Intercepts every operation of torch. ``allocations`` counts tensors made on the GPU."""

    def __init__(self):
        super().__init__()
        self.allocations, self.sync_debug = 0, "default"

    def refuse(self, name: str, tensors: list, named: bool, kwargs: dict) -> None:
        marked = [t for t in tensors if on_card(t)]
        if name == "numpy" and marked:
            raise TypeError("pretended card: numpy() of its tensor")
        if name not in CROSSES and marked and any(t.dim() and not on_card(t) for t in tensors):
            raise RuntimeError(f"pretended card: {name} of tensors on two devices")
        uploads = named and name in ("tensor", "to") and not kwargs.get("non_blocking")
        if self.sync_debug == "error" and (uploads or (marked and name in READS)):
            raise RuntimeError(f"pretended card: {name} waits for it")
        if Tape.recording and marked and name in READS:
            raise RuntimeError(f"pretended card: {name} while capturing")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in ANSWERS:
            return ANSWERS[function](args[0])
        if function in PLAIN or function is torch.device:
            return function(*args, **(kwargs or {}))
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        tensors = tensors_in((args, kwargs))
        marked = any(map(on_card, tensors))
        said = [*args, kwargs.get("device")]
        named = name == "cuda" or any(names("cuda", value) for value in said)
        leaves = name == "cpu" or any(names("cpu", value) for value in said)
        self.refuse(name, tensors, named, kwargs)
        pinned = kwargs.pop("pin_memory", False) and named
        assert not pinned, "memory of a card cannot be pinned"
        if name == "cuda":
            function, args = torch.Tensor.clone, args[:1]
        args, kwargs = [on_host(value) for value in args], {key: on_host(value) for key, value in kwargs.items()}
        if not (named or (marked and not leaves)):
            result = function(*args, **kwargs)
            return result.clone() if marked and name in COPIES else result  # a copy, not the GPU's own memory
        result = self.run(name, function, args, kwargs, tensors)
        for made in tensors_in(result):
            if name in COPIES and not marked and shares(made, tensors):
                result = made = made.clone()
            self.allocations += not on_card(made) and not shares(made, tensors)
            made.on_card = True
        return result

    def run(self, name: str, function, args, kwargs, tensors):
        """Run what goes to the GPU: at once, or as a step of the graph that is being captured."""
        run, out = functools.partial(function, *args, **kwargs), kwargs.get("out")
        if Tape.recording is None:
            return run()
        if out is not None or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            launch(run)  # nothing is changed during capture
            return args[0] if out is None else out
        result = run()
        made = [tensor for tensor in tensors_in(result) if not shares(tensor, tensors)]

        def again():
            for old, new in zip(made, [t for t in tensors_in(run()) if not shares(t, tensors)], strict=True):
                old.copy_(new)

        if made:
            launch(again)
        return result


class Event:
    def __init__(self, enable_timing: bool = False):
        self.at = None

    def record(self, stream=None) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Stream:
    cuda_stream = 0

    def __init__(self, device=None):
        pass

    def synchronize(self) -> None:
        assert Tape.recording is None, "synchronize() while capturing"


class Generator:
    graphsafe_get_state = graphsafe_set_state = staticmethod(lambda *_: None)

    def __new__(cls, device="cpu", make=torch.Generator):
        return make(on_host(device))


def torch_cuda(card: Card) -> dict:
    """The replacements for the members of torch.cuda."""
    streams = [Stream()]
    properties = SimpleNamespace(name="pretended", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)

    @contextlib.contextmanager
    def stream(new):
        streams.append(new)
        try:
            yield
        finally:
            streams.pop()

    @contextlib.contextmanager
    def graph(new, **_):
        new.capture_begin()
        try:
            yield
        finally:
            new.capture_end()

    def synchronize(*_):
        assert Tape.recording is None, "synchronize() while capturing"

    def returning(value, *names: str) -> dict:  # a function for each, as torch.compile wants no two names for one
        return {name: lambda *_: value for name in names}

    no_bytes = returning(0, "memory_allocated", "memory_reserved", "max_memory_allocated")
    nothing = returning(None, "set_device", "graph_pool_handle", "empty_cache", "reset_peak_memory_stats", "_sleep")
    return no_bytes | nothing | dict(
        Event=Event, Stream=Stream, CUDAGraph=Graph, is_available=lambda: True, device_count=lambda: 1,
        current_device=lambda: 0, get_device_name=lambda *_: "pretended", get_device_capability=lambda *_: (9, 0),
        get_device_properties=lambda *_: properties, stream=stream, graph=graph, default_generators=[Generator],
        is_current_stream_capturing=lambda: Tape.recording is not None,
        memory_stats=lambda *_: defaultdict(int, {"allocation.all.allocated": card.allocations}),
        mem_get_info=lambda *_: (80 << 30, 80 << 30),
        current_stream=lambda *_: streams[-1], device=lambda _: contextlib.nullcontext(), synchronize=synchronize,
        set_sync_debug_mode=functools.partial(setattr, card, "sync_debug"),
    )  # fmt: skip


def install() -> None:
    """Give this process the simulated GPU for good."""
    from orthrus_rt import capture, device, dispatch, native, timing

    card, ops, profile = Card(), dispatch.extension().cpu, torch.profiler.profile
    for name, value in torch_cuda(card).items():
        setattr(torch.cuda, name, value)
    torch.Generator, torch.Tensor.record_stream = Generator, lambda *_: None
    torch.profiler.profile = lambda activities: profile(activities=[torch.profiler.ProfilerActivity.CPU])
    timing.read_bandwidth = lambda device: 3000.0  # GB/s
    dispatch.select = lambda op, device, dtype: "cpu"
    ops.takes_coded_weights = lambda: False  # coding makes a tensor without a mark
    capture._recording_stream = Stream
    device.exchange_capture_mode = lambda mode: mode
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):  # in a CUDA build, they reject the simulated pool
        if hasattr(torch._C, name):
            delattr(torch._C, name)
    native._launch = lambda op, params, device: launch(getattr(ops, op), params)
    card.__enter__()


def run_module() -> None:
    """Run the module that the command line names, with the arguments behind its name."""
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def pytest_configure(config) -> None:
    install()


if __name__ == "__main__":
    install()
    run_module()
