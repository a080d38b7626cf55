"""Ctrl-C at any instruction of an engine's call: nothing is lost, no thread is locked out, the next call goes on."""

import dis
import functools
import itertools
import random
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orthrus_rt.engine import Engine
from orthrus_rt.exclusive import in_turn
from orthrus_rt.outbox import Outbox
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints, engines, failing, poison
from tests.engines import all_pages_back, drain, take

pytestmark = pytest.mark.native
PACED = pytest.mark.usefixtures("paced")  # not where records of cycles are interrupted: pace_of checks it afterwards

PARAMS, SHORT = (SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (9, 5))
PROMPTS = [[1, 2, 3], [7], [5, 6]]


@pytest.fixture(scope="module")
def engine(folder):
    return engines.make(folder, max_seq_len=64, max_batch_size=2, num_pages=2)


@pytest.fixture(scope="module")
def want(engine):
    return [engine.generate(p, PARAMS, mode="ar").token_ids for p in PROMPTS]


@pytest.fixture(scope="module")
def pace(cycles_alone):
    """Cycles that each prompt takes in an engine that is not interrupted."""
    return [cycles_alone("two_pass", tuple(p), PARAMS) for p in PROMPTS]


def pace_of(engine, prompts=PROMPTS):
    return [out.stats.cycles for out in engine.generate(prompts, PARAMS)]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """``(engine, want, pace)`` of one layer and SHORT, for interrupts of calls that run no model: there are many."""
    kwargs = dict(dtype=torch.bfloat16, diff_noise=0.05, num_hidden_layers=1)
    folder = str(checkpoints.make(tmp_path_factory.mktemp("shallow"), **kwargs))
    engine = engines.make(folder, max_seq_len=64, max_batch_size=2, num_pages=2)
    return engine, [engine.generate(p, SHORT, mode="ar").token_ids for p in PROMPTS], pace_of(engine)


@functools.cache
def _looks(code) -> frozenset[int]:
    """The instructions just before which the interpreter checks for signals: those that start a function, jump back in
    a loop, or follow a call.
    """
    found, earlier = set(), ""
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("RESUME", "JUMP_BACKWARD")) or earlier.startswith("CALL"):
            found.add(instruction.offset)
        if instruction.opname not in ("CACHE", "PRECALL"):
            earlier = instruction.opname
    return frozenset(found)


def interrupted(function, after: int, everywhere: bool = False):
    """Call, with KeyboardInterrupt raised instead of the ``after``-th instruction of this package and of contextlib
    before which the interpreter checks for signals, or of any instruction if ``everywhere``.

    Returns:
        Whether that instruction was reached.
    """
    left = after

    def trace(frame, *_):
        code = frame.f_code
        if not ("orthrus_rt" in code.co_filename or code.co_filename.endswith("contextlib.py")):
            return None
        looks = _looks(code)

        def trace_inside(frame, kind, _):
            nonlocal left
            if kind == "opcode" and (everywhere or frame.f_lasti in looks):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace_inside

        frame.f_trace = trace_inside  # ahead of the next line, which Python 3.13 forgets otherwise
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return trace_inside

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # on any frame: Python 3.12 checks for it when tracing begins
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def start(engine, got):
    ids = [engine.submit(p, SHORT) for p in PROMPTS]
    for _ in range(2):
        take(engine.step(), got)
    return ids


@pytest.mark.parametrize("victim", (0, 2))  # a decoding request, a waiting one
def test_abort_at_every_instruction(shallow, victim):
    engine, want, pace = shallow
    after, reached = 0, True
    while reached:
        after += 1
        got = {}
        ids = start(engine, got)
        reached = interrupted(lambda i=ids[victim]: engine.abort(i), after, everywhere=True)
        if engine.is_unfinished(ids[victim]):  # interrupted before it began, or later: aborting again does no harm
            engine.abort(ids[victim])
        drain(engine, got)
        for i, request_id in enumerate(ids):
            tokens, reason = got[request_id]
            assert (tokens, reason) == (want[i][: len(tokens)], "abort") if i == victim else (want[i], "length")
        all_pages_back(engine)
    assert after > 100 and pace_of(engine) == pace


def test_submit_at_every_instruction(shallow):
    engine, want, pace = shallow
    (alone,) = engine.generate([[9]], SHORT)
    after, reached = 0, True
    while reached:
        after += 1
        got, cycles = {}, []
        ids = start(engine, got)
        reached = interrupted(lambda: engine.submit([9], SHORT, "new"), after, everywhere=True)
        if not engine.is_unfinished("new"):
            engine.submit([9], SHORT, "new")
        while engine.has_unfinished():
            outputs = engine.step()
            take(outputs, got)
            cycles += [out.stats.cycles for out in outputs if out.request_id == "new" and out.finished]
        assert [got[i] for i in ids] == [(tokens, "length") for tokens in want]
        assert got["new"] == (alone.token_ids, "length") and cycles == [alone.stats.cycles]
        all_pages_back(engine)
    assert after > 100 and pace_of(engine) == pace


@PACED
def test_an_id_is_in_use_until_its_last_output_is_returned(engine):
    engine.submit([9], PARAMS, "mine")
    while not (engine.outbox.outputs and engine.outbox.outputs[-1].finished):
        in_turn(engine, Engine._advance_and_collect)  # all of a step except its last instruction
    assert engine.has_unfinished()
    with pytest.raises(ValueError, match="must be unused, got 'mine' twice"):
        engine.submit([9], PARAMS, "mine")
    assert engine.is_unfinished("mine") and engine.step()[-1].finished
    engine.submit([9], PARAMS, "mine")
    assert drain(engine)["mine"][1] == "length"


def test_steps_at_random_instructions(engine, want, pace, request):
    """Outputs too: the next step returns what an interrupted one did not. Later drafts are as good as ever."""
    rng, strikes, got, rounds = random.Random(0), 0, {}, 60 if request.config.getoption("--full") else 30
    for _ in range(rounds):
        got.clear()
        ids = [engine.submit(p, PARAMS) for p in PROMPTS]
        while engine.has_unfinished():
            after = rng.randrange(1, rng.choice((300, 300, 10000)))  # a cycle has some 200 of them, a prefill thousands
            strikes += interrupted(lambda: take(engine.step(), got), after)
            take(engine.step(), got)
        assert [got[i] for i in ids] == [(tokens, "length") for tokens in want]
        all_pages_back(engine)
    assert strikes > rounds * 5 / 3
    assert pace_of(engine) == pace


def test_steps_that_share_pages_at_random_instructions(folder, cycles_alone):
    """No page that was not written has a name, and in the end no page is held."""
    shared = engines.make(folder, max_seq_len=256, max_batch_size=2, num_pages=9)
    rng, strikes = random.Random(2), 0
    beginning = [rng.randrange(90) for _ in range(130)]
    prompts = [[*beginning, i] for i in range(3)]
    want = [shared.generate(p, PARAMS, mode="ar").token_ids for p in prompts]
    got = {}
    for _ in range(40):
        shared.kv.reset()
        shared.kv.pages.fill_(torch.nan)
        got.clear()
        ids = [shared.submit(p, PARAMS) for p in prompts]
        while shared.has_unfinished():
            strikes += interrupted(lambda: take(shared.step(), got), rng.randrange(1, rng.choice((300, 10000))))
            take(shared.step(), got)
            named = list(shared.kv.pool._page_of.values())
            assert not bool(shared.kv.pages[:, :, named].isnan().any())
        assert [got[i] for i in ids] == [(tokens, "length") for tokens in want]
        all_pages_back(shared)
        assert not any(shared.kv.pool._holders.values())
    assert strikes > 40 and shared.metrics.cached_tokens > 0
    assert pace_of(shared, prompts) == [cycles_alone("two_pass", tuple(p), PARAMS) for p in prompts]


def test_generate_at_random_instructions(engine, want, pace, request):
    rng = random.Random(1)
    other = {}
    for _ in range(60 if request.config.getoption("--full") else 30):
        request_id = engine.submit(PROMPTS[0], PARAMS)
        interrupted(lambda: engine.generate(PROMPTS[1], PARAMS), rng.randrange(1, 10000))
        other[request_id] = drain(engine)[request_id]
        all_pages_back(engine)
    assert set(map(str, other.values())) == {str((want[0], "length"))}
    assert pace_of(engine) == pace


def test_closing_a_stream_at_every_instruction(engine, want, pace):
    """Its request is aborted by this call or by the next one, whatever that is."""
    after, reached, aborted = 0, True, engine.metrics.finished["abort"]
    while reached:
        after += 1
        name = engine.submit(PROMPTS[0], PARAMS)
        stream = engine.stream([9], SamplingParams(max_new_tokens=50, ignore_eos=True))
        next(stream)
        reached = interrupted(stream.close, after)
        assert drain(engine)[name] == (want[0], "length")
        assert engine.metrics.finished["abort"] == aborted + after
        all_pages_back(engine)
    assert after > 20 and pace_of(engine) == pace


def test_no_thread_is_locked_out_wherever_another_was_interrupted(engine):
    for after in itertools.count(1):
        reached = interrupted(engine.memory_report, after)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(engine.memory_report).result(20)["total"] > 0
        if not reached:
            break
    assert after > 20


def test_no_other_thread_steps_before_a_step_has_handed_its_outputs_over(engine, want):
    """It would return them too, or lose its own."""
    tried, ids = [], [engine.submit(p, PARAMS) for p in PROMPTS]

    class Watched(Outbox):
        @property
        def outputs(self):
            with pytest.raises(RuntimeError, match="in use by another thread"):
                pool.submit(engine.step).result(20)
            tried.append(True)
            return self.held

        @outputs.setter
        def outputs(self, outputs):
            self.held = outputs

    engine.outbox.held, got = engine.outbox.__dict__.pop("outputs"), {}
    engine.outbox.__class__ = Watched
    with ThreadPoolExecutor(1) as pool:
        while any(engine.scheduler.unfinished):
            take(engine.step(), got)
    engine.outbox.__class__ = Outbox
    engine.outbox.outputs = engine.outbox.__dict__.pop("held")
    assert [got[i][0] for i in ids] == want and len(tried) > 2


def test_a_signal_handler_cannot_reenter(engine):
    refused = []

    def handler(*_):
        try:
            engine.submit([1])
        except RuntimeError as error:
            refused.append(str(error))

    before = signal.signal(signal.SIGUSR1, handler)
    real = engine.runner.prefill
    engine.runner.prefill = lambda *args: (signal.raise_signal(signal.SIGUSR1), real(*args))[1]
    try:
        engine.generate([1, 2], PARAMS)
    finally:
        engine.runner.prefill = real
        signal.signal(signal.SIGUSR1, before)
    assert refused == ["this engine is in the middle of a call; a signal handler cannot make another one"]


@PACED
class TestAStreamThatIsCollected:
    """Wherever the garbage collector strikes, the stream's request ends and the call under way is not disturbed."""

    LONG = SamplingParams(max_new_tokens=50, ignore_eos=True)

    def hold(self, engine):
        held = [engine.stream([9], self.LONG)]
        next(held[0])
        self.aborted = engine.metrics.finished["abort"]
        return held

    def check(self, engine, tokens):
        got = {}
        name = engine.submit(PROMPTS[0], PARAMS)
        drain(engine, got)
        assert got[name] == (tokens, "length")
        assert engine.metrics.finished["abort"] == self.aborted + 1
        all_pages_back(engine)

    def test_inside_a_step(self, engine, want, monkeypatch):
        real, held = engine.runner.decode, self.hold(engine)
        monkeypatch.setattr(engine.runner, "decode", lambda *args: (held.clear(), real(*args))[1])
        self.check(engine, want[0])

    def test_in_another_thread_than_the_one_that_steps(self, engine, want, monkeypatch):
        real, held = engine.runner.decode, self.hold(engine)

        def decode(*args):
            if held:
                thread = threading.Thread(target=held.clear)
                thread.start()
                thread.join()
            return real(*args)

        monkeypatch.setattr(engine.runner, "decode", decode)
        self.check(engine, want[0])

    def test_in_another_thread_while_nothing_runs(self, engine, want):
        """A call that begins meanwhile must not be refused: the next call ends the request."""
        held = self.hold(engine)
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert engine.metrics.finished["abort"] == self.aborted and engine.has_unfinished()
        self.check(engine, want[0])

    def test_the_next_call_finds_the_engine_idle(self, engine, want, monkeypatch):
        """Whatever call it is: here it is one that needs an idle engine."""
        real, held = engine.runner.decode, self.hold(engine)
        monkeypatch.setattr(engine.runner, "decode", lambda *args: (real(*args), held.clear())[0])
        engine.step()
        assert engine.generate(PROMPTS[0], PARAMS, mode="one_pass").token_ids == want[0]


@PACED
def test_in_the_middle_of_a_recording(folder):
    engine = engines.make(folder, max_seq_len=128, max_batch_size=4)
    failing.check_a_spoilt_recording(engine, poison.jobs_of([poison.GREEDY, poison.SAMPLED], count=4), "interrupt")


@PACED
def test_an_interrupt_as_the_last_output_is_made_does_not_lose_it(folder, alone):
    engine, told = engines.make(folder, max_seq_len=64, max_batch_size=2), {}
    engine.submit([1, 2, 3], PARAMS, "mine")

    class Struck(dict):
        def pop(self, *args):
            super().pop(*args)
            raise KeyboardInterrupt

    engine.outbox._requests = Struck(engine.outbox._requests)
    with pytest.raises(KeyboardInterrupt):
        drain(engine, told)
    engine.outbox._requests = {}  # its present contents, without the interrupt
    assert engine.has_unfinished() and engine.is_unfinished("mine")
    with pytest.raises(ValueError, match="must be unused"):
        engine.submit([1], SHORT, "mine")
    assert drain(engine, told)["mine"] == (alone([1, 2, 3], PARAMS), "length")


def test_next_logits_at_every_instruction(shallow):
    engine, _, pace = shallow
    for after in itertools.count(1):
        reached = interrupted(lambda: engine.next_logits([1, 2, 3]), after)
        engine.memory_report()  # any call recovers first
        all_pages_back(engine)
        if not reached:
            break
    assert after > 50 and pace_of(engine) == pace


def test_an_abort_cut_short_is_counted_once_by_a_close(folder, monkeypatch):
    engine = engines.make(folder, max_seq_len=64)
    name = engine.submit([1], PARAMS)
    monkeypatch.setattr(engine.scheduler, "forget", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.abort(name)
    engine.close()
    assert engine.metrics.finished["abort"] == 1


def test_a_stream_closed_inside_a_call_is_refused_silently(engine, monkeypatch):
    stream, real = engine.stream([9], PARAMS), engine.runner.decode
    next(stream)
    monkeypatch.setattr(engine.runner, "decode", lambda *args: (stream.close(), real(*args))[1])
    engine.submit([1], PARAMS)
    drain(engine)
    all_pages_back(engine)
