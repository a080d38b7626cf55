"""How torch.cuda is called, with a stand-in for it: devices by index, and how a cycle is recorded."""

import contextlib
import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from bench import common
from orthrus_rt import capture, dispatch, native, ops, weights
from orthrus_rt import device as devices
from orthrus_rt.cycle import Cycle
from orthrus_rt.cycle_plan import AR
from orthrus_rt.device import pick_device, with_index
from orthrus_rt.exclusive import Turn, exclusive


@pytest.fixture
def two_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize(
    ("name", "want"), [("cuda", "cuda:1"), ("auto", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_a_device_has_an_index(two_devices, name, want):
    """Without an index it would be a different device in the threads of an AsyncEngine."""
    assert pick_device(name) == torch.device(want)
    assert name == "auto" or with_index(torch.device(name)) == torch.device(want)


def test_a_device_that_is_not_there(two_devices):
    with pytest.raises(ValueError, match="device must be below cuda:2, got 'cuda:2'"):
        pick_device("cuda:2")


def test_a_packed_weight_is_waited_for(monkeypatch):
    """A kernel launched right after it would read the weight while the packing may still run."""
    done = []
    stream = SimpleNamespace(synchronize=lambda: done.append("waited"))
    monkeypatch.setattr(weights, "stream_of", lambda device: stream)
    monkeypatch.setattr(weights, "_pack_cuda", lambda weight, *_: done.append("packed") or (weight, 1, False))
    weights.pack(torch.zeros(64, 64, dtype=torch.bfloat16), impl="cuda")
    assert done == ["packed", "waited"]


@pytest.fixture
def current_device(two_devices, monkeypatch):
    """The indices of the devices that are current, the innermost last."""
    current = [1]

    @contextlib.contextmanager
    def switched(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return current


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_a_kernel_is_launched_on_its_tensors_device(current_device, monkeypatch, impl):
    """Whatever device is current in the calling thread: on another the kernel would read this device's addresses."""
    current, launched = current_device, []

    def kernel(*args):
        launched.append(current[-1])

    monkeypatch.setattr(dispatch, "extension", lambda: SimpleNamespace(cuda=SimpleNamespace(embed=kernel)))
    monkeypatch.setattr(dispatch, "triton_module", lambda op: SimpleNamespace(embed=kernel))
    monkeypatch.setattr(dispatch, "select", lambda *_: impl)
    if impl == "cuda":
        native._launch("embed", None, torch.device("cuda:0"))
    else:
        ops._choose("embed", torch.device("cuda:0"), torch.bfloat16)(None, None, None)
    assert launched == [0] and current == [1]


def test_workspaces_are_those_of_the_device(current_device, monkeypatch):
    """Each is enough for any weight; float32 needs none."""
    device, asked, launched = torch.device("cuda:0"), [], []
    cuda = SimpleNamespace(
        row_linear_workspace=lambda rows, k, n: asked.append(current_device[-1]) or n,
        dual_attn_workspace=lambda *_: asked.append(current_device[-1]) or 7,
        row_linear=lambda params, _: launched.append(params["workspace_bytes"]),
    )
    module = SimpleNamespace(cuda=cuda, RowLinearParams=dict, RowLinearParamsF32=dict)
    monkeypatch.setattr(dispatch, "extension", lambda: module)
    monkeypatch.setattr(dispatch, "select", lambda *_: "cuda")
    for dtype, linear, attn in ((torch.bfloat16, 3, 7), (torch.float32, 0, 0)):
        assert native.row_linear_workspace_bytes(device, dtype, 4, [(64, 1), (64, 3), (64, 2)]) == linear
        assert native.dual_attn_workspace_bytes(device, dtype, 4, 2, 64, 100) == attn
        x = SimpleNamespace(device=device, dtype=dtype, shape=(4, 64), data_ptr=int)
        facts = dict(impl="cuda", data=x, bits=16, in_features=64, out_features=3, num_partials=1)
        for num_bytes in (3, 2):
            refused = pytest.raises(ValueError, match="workspace must be at least 3 bytes for 4 rows, got 2")
            with refused if num_bytes < linear else contextlib.nullcontext():
                native.row_linear(x, SimpleNamespace(**facts), x, workspace=torch.empty(num_bytes, dtype=torch.uint8))
    assert set(asked) == {0} and launched == [3, 3, 2]


class Recordings:
    """The part of torch.cuda that recordings use. ``seen``: the keyword arguments of every torch.cuda.graph."""

    def __init__(self):
        self.seen, self.current, self.capturing, self.reserved, self.num_pools = [], ["caller's"], False, 900, 0
        self.streams, self.replays, self.eager, self.inference, self.collecting = 0, 0, 0, [], []
        self.fail_at: dict[str, BaseException] = {}  # "refused", "begin", "run", "end", "replay": what each raises
        self.pools_underway, self.pool_users = [], 0  # of torch's allocator
        self.state, self.marked = "the program's", []  # of the default generator; the states that captures marked
        self.streams_of, self.generators_of, self.pools_of = [], [], []  # which devices

    def __getitem__(self, index: int):  # as default_generators
        self.generators_of.append(index)
        return self

    def graphsafe_get_state(self):
        return self.state

    def graphsafe_set_state(self, state) -> None:
        self.state = state

    def reach(self, point: str) -> None:
        if point in self.fail_at:
            raise self.fail_at[point]

    def empty_cache(self) -> None:
        self.collecting.append(gc.isenabled())  # disabled here too: no other thread may record at this time
        self.reserved = 500

    def new_stream(self) -> int:
        self.streams_of.append(self.current[-1])
        self.streams += 1
        return self.streams

    def new_pool(self) -> str:
        self.num_pools += 1
        return f"pool {self.num_pools}"

    @contextlib.contextmanager
    def graph(self, cuda_graph, **kwargs):
        self.seen.append(kwargs)
        self.empty_cache()  # as torch does before it records
        self.inference.append(torch.is_inference_mode_enabled())
        self.current.append(kwargs["stream"])
        cuda_graph.capture_begin(kwargs["pool"], capture_error_mode=kwargs["capture_error_mode"])
        try:
            yield
        finally:
            self.collecting.append(gc.isenabled())
            cuda_graph.capture_end()
            self.current.pop()

    def capture_begin(self, pool, capture_error_mode: str) -> None:
        self.marked.append(self.state)
        self.pools_underway.append(pool)
        self.pool_users += 1
        self.reach("refused")
        self.capturing = True
        self.reach("begin")

    def capture_end(self) -> None:
        self.capturing = False
        self.reach("end")  # torch checks whether the driver's part failed before it notifies its allocator
        self.end_allocate_to_pool(self.seen[-1]["stream"].device.index, self.seen[-1]["pool"])

    def end_allocate_to_pool(self, device: int, pool) -> None:
        self.pools_of.append(device)
        if pool not in self.pools_underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools_underway.remove(pool)

    def release_pool(self, device: int, pool) -> None:
        self.pools_of.append(device)
        self.pool_users -= 1

    def replay(self) -> None:
        self.reach("replay")
        self.replays += 1

    def run_eager(self, *_) -> None:
        self.inference.append(torch.is_inference_mode_enabled())
        self.collecting.append(gc.isenabled())
        self.eager += not self.capturing
        self.reserved += 64 * self.capturing
        if self.capturing:
            self.reach("run")

    @contextlib.contextmanager
    def stream(self, stream):
        before = list(self.current)
        self.current.append(stream)
        try:
            yield
        finally:
            self.current[:] = before


@pytest.fixture
def recordings(monkeypatch):
    fake = Recordings()
    capture._recording_stream.cache_clear()
    monkeypatch.setattr(capture, "_spoilt", [])
    monkeypatch.setattr(capture, "_generator", lambda device: f"ours on {device}")
    monkeypatch.setattr(capture, "MARKS_GENERATORS", True)  # as in torch before 2.13
    monkeypatch.setattr(dispatch, "select", lambda *_: "cuda")
    monkeypatch.setattr(dispatch, "extension", lambda: SimpleNamespace(cuda=fake))
    for name, value in {
        "CUDAGraph": lambda: fake,
        "default_generators": fake,
        "ExternalStream": lambda pointer, device: SimpleNamespace(device=device, pointer=pointer),
        "current_stream": lambda device: fake.current[-1],
        "device": fake.stream,
        "stream": fake.stream,
        "graph": fake.graph,
        "graph_pool_handle": fake.new_pool,
        "is_current_stream_capturing": lambda: fake.capturing and fake.current[-1] is fake.seen[-1]["stream"],
        "empty_cache": fake.empty_cache,
        "memory_reserved": lambda device: fake.reserved,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate_to_pool, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", fake.release_pool, raising=False)
    monkeypatch.setattr(Cycle, "run_eager", fake.run_eager)
    yield fake
    capture._recording_stream.cache_clear()


def unrecorded(device: str) -> Cycle:
    cycle = object.__new__(Cycle)
    cycle.what, cycle.prompt_rows = "ar cycle of 1 slots", None
    cycle.plan = AR
    cycle.sampling, cycle.workspace = None, SimpleNamespace(graph_pool="pool")
    cycle.model = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
    return cycle


@torch.inference_mode()
def recorded(device: str) -> Cycle:
    cycle = unrecorded(device)
    cycle.record()
    return cycle


def test_a_cycle_is_recorded_on_its_own_device(recordings):
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        recorded(device)
    seen = recordings.seen
    assert [r["stream"].device for r in seen] == [torch.device(f"cuda:{i}") for i in (0, 1, 0)]
    assert seen[0]["stream"] is seen[2]["stream"]  # torch shares memory only between graphs of one stream
    assert [r["stream"].pointer for r in seen] == [1, 2, 1]  # used by nothing else
    assert recordings.streams_of == [torch.device(f"cuda:{i}") for i in (0, 1)]
    assert all(r["pool"] == "pool" and r["capture_error_mode"] == "thread_local" for r in seen)
    assert recordings.inference == [False, True] * 3  # for what torch makes for a graph, then for what is recorded
    assert recordings.marked == [f"ours on cuda:{i}" for i in (0, 1, 0)]  # not the program's generator
    assert recordings.generators_of == [0, 1, 0]


def test_a_torch_that_marks_no_generator_is_left_alone(recordings, monkeypatch):
    monkeypatch.setattr(capture, "MARKS_GENERATORS", False)
    recorded("cuda:0")
    assert recordings.marked == ["the program's"]


@pytest.mark.parametrize("where", ("refused", "begin", "run", "end"))
@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
def test_a_recording_that_fails_leaves_nothing_open(recordings, where, error):
    """Neither the capture, which would make every later wait fail, nor its pool, which would make every later recording
    fail. The caller's stream is current again, the pool is a new one, and the program's generator is back in place.
    """
    recordings.fail_at = {where: error("there")}
    with pytest.warns(UserWarning, match="there") if error is RuntimeError else pytest.raises(error, match="there"):
        recorded("cuda:1")
    assert not recordings.capturing and recordings.current == ["caller's"]
    assert recordings.num_pools == 1
    assert recordings.state == "the program's" and recordings.state not in recordings.marked
    # If the capture did end, the graph itself releases the pool when it is freed. Otherwise the graph is kept.
    did_end = where in ("begin", "run")
    assert set(recordings.pools_of) == {1}
    assert not recordings.pools_underway and recordings.pool_users == did_end
    assert capture._spoilt == [recordings] * (not did_end)


@pytest.mark.parametrize("prompt_rows", (None, "rows"))
@pytest.mark.parametrize("failures", (0, 1, 2))
def test_a_warm_up_ends_when_all_further_runs_are_alike(recordings, monkeypatch, prompt_rows, failures):
    """Whether recording works at once, on the second try or not at all; with prompts, the second run records."""
    remaining, reach = iter(range(failures)), recordings.reach

    def fail(point):
        reach(point)
        if point == "run" and next(remaining, None) is not None:
            raise RuntimeError("there")

    cycle = unrecorded("cuda:0")
    cycle.prompt_rows = prompt_rows
    monkeypatch.setattr(recordings, "reach", fail)
    with pytest.warns(UserWarning, match="there") if failures else contextlib.nullcontext():
        cycle.warm_up()
    assert cycle.steady and cycle.op_by_op == (failures == 2)
    assert recordings.replays == (failures < 2)


@pytest.mark.parametrize(("where", "num_new"), (("run", 0), ("end", 1)))
def test_a_lack_of_memory_costs_no_pool_unless_it_kept_the_capture_from_ending(recordings, where, num_new):
    recordings.fail_at = {where: torch.OutOfMemoryError("there")}
    with pytest.warns(UserWarning, match="op by op"):
        recorded("cuda:0")
    assert recordings.num_pools == num_new


@pytest.mark.parametrize("enabled", (True, False))
@pytest.mark.parametrize("error", ({}, {"run": RuntimeError("there")}))
def test_no_garbage_is_collected_in_a_capture(recordings, enabled, error):
    """A finalizer would free device memory in the middle of it. Afterwards collection is as the program had set it."""
    recordings.fail_at = error
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.warns(UserWarning, match="there") if error else contextlib.nullcontext():
            recorded("cuda:0")
        assert recordings.collecting == [False] * 4 and gc.isenabled() == enabled
    finally:
        gc.enable()


def test_threads_record_in_turn():
    entered = threading.Event()

    def record():
        with capture._nothing_collected():
            entered.set()

    with capture._nothing_collected():
        other = threading.Thread(target=record)
        other.start()
        assert not entered.wait(0.1)
    other.join(60)
    assert entered.is_set()


@pytest.mark.parametrize("where", ("run", "end", "replay"))
def test_a_driver_without_memory_for_a_graph(recordings, where):
    """It reports that by an error of its own, when the graph is made or when it first runs."""
    recordings.fail_at = {where: RuntimeError("CUDA error: out of memory\nFor debugging ...")}
    said = (
        r"out of memory while .* the ar cycle of 1 slots: lower .*\(CUDA error: out of memory\); .* op by op, slower$"
    )
    with pytest.warns(UserWarning, match=said):
        cycle = recorded("cuda:0")
        cycle.run()
    cycle.run()
    assert recordings.eager == 2 and recordings.replays == 0 and cycle.settled
    assert cycle._replay is None and cycle.graph_bytes == 0  # of the graph nothing is left


def test_a_recording_goes_with_its_last_user(recordings):
    """It holds weights and cache. The garbage collector may run only after the next engine has needed the room."""
    gc.disable()
    try:
        cycle = recorded("cuda:0")
        gone = weakref.ref(cycle)
        del cycle
        assert gone() is None
    finally:
        gc.enable()


def test_a_graph_is_replayed(recordings):
    """The first time also loads it, so that only later ones are alike."""
    cycle = recorded("cuda:0")
    for steady in (False, True, True):
        assert cycle.steady == steady
        cycle.run()
    assert recordings.replays == 3 and recordings.eager == 0


def test_an_engine_keeps_its_stream_and_dtypes(two_devices, monkeypatch):
    """Whatever stream is current where its methods are called, for example in an AsyncEngine's thread, and whatever the
    program casts.
    """
    current, inside = ["later"], []

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    @exclusive
    def method(engine):
        inside.append((current[-1], torch.is_autocast_enabled("cuda")))

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(devices, "exchange_capture_mode", lambda mode: mode)
    where = dict(device=torch.device("cuda:0"), cuda_stream="own")
    with torch.autocast("cuda", torch.float16):
        method(SimpleNamespace(turn=Turn(), closed=False, torn=False, dropped=(), **where))
        assert inside == [("own", False)] and current == ["later"] and torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize("error", (None, KeyboardInterrupt()), ids=type)
def test_what_an_engine_asks_does_not_spoil_what_others_capture(two_devices, monkeypatch, error):
    """Torch's default capture mode forbids it to all threads that have not opted out. A thread's mode is restored."""
    mode, inside = [2], []

    class Driver:
        def cuThreadExchangeStreamCaptureMode(self, wanted):
            mode[0], wanted._obj.value = wanted._obj.value, mode[0]
            return 0

    @exclusive
    def method(engine):
        inside.append(mode[0])
        if error:
            raise error

    monkeypatch.setattr(devices, "_driver", Driver)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    where = dict(device=torch.device("cuda:0"), cuda_stream="own")
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        method(SimpleNamespace(turn=Turn(), closed=False, torn=False, dropped=(), **where))
    assert inside == [1] and mode == [2]


def test_what_a_graph_holds(recordings):
    """What torch gives back before it records is not subtracted."""
    assert recorded("cuda:0").graph_bytes == 64


@pytest.mark.parametrize(
    ("script", "want"), [("exit 9", "the card"), ("echo 'H100, 580.1, 1 MHz, 2 MHz, 3 MHz, 700 W'", "H100")]
)
def test_a_benchmark_survives_without_git_and_nvidia_smi(two_devices, monkeypatch, tmp_path, script, want):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the card")
    facts = common.header(torch.device("cuda:1"))
    assert facts["revision"] == "unknown" and facts["name"] == want
