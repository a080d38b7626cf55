"""Progress bars of generate and warmup: on request, and nothing at all without one."""

import io
import re
from types import SimpleNamespace

import pytest

from orthrus_rt.sampling import SamplingParams
from tests.engines import make


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of its own for what auto measures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_progress_bar_counts_every_prompt_once(folder, capsys):
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (2, 20)]
    make(folder, mode="ar").generate([[1], [2]], params, progress=True)
    assert " 2/2 " in capsys.readouterr().err.rpartition("\r")[2]


def test_a_progress_bar_of_a_warmup_counts_every_cycle(folder, capsys):
    """Including those of the bucket of 3, which is never full."""
    make(folder, mode="auto", max_batch_size=3, num_pages=2, max_seq_len=128).warmup(progress=True)
    done, total = re.search(r" (\d+)/(\d+) ", capsys.readouterr().err.rpartition("\r")[2]).groups()
    assert done == total


@pytest.mark.parametrize(("mode", "pads_prefill"), [("two_pass", False), ("two_pass", True), ("auto", False)])
def test_a_warmup_with_sampling_leaves_nothing_to_record(folder, capsys, mode, pads_prefill):
    engine = make(folder, pads_prefill, mode=mode, max_batch_size=2, max_seq_len=128, prefix_caching=False)
    engine.warmup()
    before = engine.memory_report()["activations"]
    engine.warmup(progress=True, sampling=True)
    assert "warm-up, sampling: 100%" in capsys.readouterr().err
    logits = engine.memory_report()["activations"] - before
    assert logits >= 4 * 16 * engine.config.vocab_size  # two_pass with 7 drafts: 8 rows for each slot
    params = [SamplingParams(20, ignore_eos=True, temperature=0.8, seed=seed) for seed in (1, 2)]
    outs = engine.generate([[1], [2]], params)
    assert [len(out.token_ids) for out in outs] == [20, 20]
    assert "recording" not in engine.metrics.as_dict()["times"]
    assert engine.memory_report()["activations"] == before + logits


@pytest.mark.parametrize("closed", (False, True))
def test_a_progress_bar_that_nobody_could_see(folder, monkeypatch, closed):
    """As in a daemon, which has no stderr, or has closed it."""
    engine, stderr = make(folder, mode="ar"), io.StringIO()
    stderr.close()
    monkeypatch.setattr("sys.stderr", stderr if closed else None)
    engine.warmup(progress=True)
    assert len(engine.generate([[1], [2]], SamplingParams(2), progress=True)) == 2


def test_a_progress_bar_on_what_can_be_written_to_alone(folder, monkeypatch):
    """Such as a logger in place of stderr."""
    said = []
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=said.append, flush=lambda: None))
    make(folder, mode="ar").generate([[1], [2]], SamplingParams(2), progress=True)
    assert any("2/2" in text for text in said)


def test_what_nobody_asked_to_see_settles_nothing_for_the_program(folder, monkeypatch):
    """Even a disabled bar starts a thread, and determines how the program's multiprocessing starts processes."""
    monkeypatch.setattr("tqdm.tqdm", lambda *_, **__: 1 / 0)
    engine = make(folder, mode="auto")
    engine.warmup()
    assert len(engine.generate([[1], [2]], SamplingParams(2))) == 2
    engine = make(folder, mode="ar")
    engine.warmup()


@pytest.mark.parametrize("how", ({}, {"temperature": 0.8, "seed": 1}), ids=("greedy", "sampled"))
def test_a_warmup_leaves_no_single_prompt_to_record(folder, how):
    engine = make(folder, True, mode="two_pass", max_batch_size=2, max_seq_len=128, prefix_caching=False)
    engine.warmup(sampling=bool(how))
    for _ in range(2):  # a pass with prompts is recorded at its second use
        engine.generate([1], SamplingParams(20, ignore_eos=True, **how))
    assert "recording" not in engine.metrics.as_dict()["times"]
