"""Penalties, logit bias and min_tokens through the engine: exactly as defined, in every mode and any batch."""

import functools
import itertools
import math

import pytest
import torch

from orthrus_rt import native, reference
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints, engines, lossless
from tests.logits_cases import check_count_tokens
from tests.pins import of_this_isa
from tests.traces import few_pages

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

VOCAB = 96
EDITS = {
    "repetition": dict(repetition_penalty=1.3),
    "presence": dict(presence_penalty=0.8),
    "frequency": dict(frequency_penalty=0.35),
    "rewards": dict(repetition_penalty=0.8, presence_penalty=-0.5, frequency_penalty=-0.2),
    "bias": dict(logit_bias={5: 3.0, 17: -2.0, 40: 1.5}),
    "all": dict(
        repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, logit_bias={5: 2.0}, min_tokens=20
    ),
}
SAMPLED = dict(temperature=0.9, top_p=0.95, seed=11)
# Tokens per cycle of 4 prompts x 40 tokens with 7 drafts, greedy and sampled. Without edits: 1.592 and 1.660
# (two_pass), 1.114 and 1.083 (one_pass). Drafts know only what is committed, so penalties cost acceptance.
PINNED = {
    "neon": {
        ("repetition", "two_pass"): (1.289, 1.268),
        ("repetition", "one_pass"): (1.04, 1.04),
        ("presence", "two_pass"): (1.529, 1.5),
        ("presence", "one_pass"): (1.114, 1.033),
        ("frequency", "two_pass"): (1.5, 1.592),
        ("frequency", "one_pass"): (1.047, 1.02),
        ("rewards", "two_pass"): (1.88, 1.835),
        ("rewards", "one_pass"): (1.238, 1.182),
        ("bias", "two_pass"): (1.592, 1.66),
        ("bias", "one_pass"): (1.114, 1.083),
        ("all", "two_pass"): (1.458, 1.405),
        ("all", "one_pass"): (1.006, 1.013),
    },
}
PINNED["amx_bf16"] = PINNED["neon"]
# These draft with coded weights. Without edits: 1.608 and 1.642 (two_pass), 1.114 and 1.091 (one_pass).
PINNED["avx512_bf16"] = PINNED["avx512"] = PINNED["neon"] | {
    ("repetition", "one_pass"): (1.04, 1.026),
    ("presence", "two_pass"): (1.5, 1.529),
    ("presence", "one_pass"): (1.114, 1.04),
    ("frequency", "two_pass"): (1.486, 1.529),
    ("frequency", "one_pass"): (1.047, 1.013),
    ("rewards", "two_pass"): (1.95, 1.88),
    ("rewards", "one_pass"): (1.219, 1.209),
    ("bias", "two_pass"): (1.608, 1.642),
    ("bias", "one_pass"): (1.114, 1.091),
    ("all", "two_pass"): (1.472, 1.357),
}


@pytest.fixture(scope="module")
def engine(folder):
    return engines.make(folder, max_seq_len=256, prefix_caching=False)


@pytest.fixture(scope="module")
def prompts():
    return lossless.random_prompts(VOCAB, 4, 30, seed=3)


def params_of(name, kind, **kwargs):
    sampled = SAMPLED if kind == "sampled" else {}
    return SamplingParams(**({"max_new_tokens": 40, "ignore_eos": True} | EDITS[name] | sampled | kwargs))


def edited(logits, prompt, tokens, params, stop_ids):
    """A row of logits, edited as ``params`` say after ``prompt`` and ``tokens``, by a plain loop over a list."""
    row = logits.tolist()
    for t in range(VOCAB):
        if t in prompt or t in tokens:
            row[t] = row[t] / params.repetition_penalty if row[t] > 0 else row[t] * params.repetition_penalty
        if t in tokens:
            row[t] -= params.presence_penalty + params.frequency_penalty * tokens.count(t)
    for t, value in params.logit_bias:
        row[t] += value
    if len(tokens) < params.min_tokens:
        for t in stop_ids:
            row[t] = -math.inf
    return row


@pytest.fixture(scope="module")
def logits(engine):
    """The logits after a text, from one forward of the whole text; cached."""
    return functools.cache(lambda text: engine.next_logits(list(text)))


def by_hand(logits, prompt, params, stop_ids):
    """Greedy decoding, with one forward of the whole text per token."""
    tokens = []
    while len(tokens) < params.max_new_tokens and not set(tokens) & stop_ids:
        row = edited(logits((*prompt, *tokens)), prompt, tokens, params, stop_ids)
        tokens.append(row.index(max(row)))
    return tokens


@pytest.mark.parametrize("name", EDITS)
def test_greedy_is_the_definition(engine, logits, prompts, name):
    params = params_of(name, "greedy", ignore_eos=False, stop_token_ids=(1, 2, 3), max_new_tokens=30)
    for prompt in prompts[:2]:
        want = by_hand(logits, prompt, params, {1, 2, 3, *engine.config.eos_token_ids})
        for mode in MODES:
            assert engine.generate(prompt, params, mode=mode).token_ids == want, mode


def test_sampled_is_the_definition(engine, prompts):
    """The choice under coupled noise: the id with the largest sum of edited, scaled logit and Gumbel noise."""
    params = params_of("all", "sampled", top_p=1.0)
    tokens = engine.generate(prompts[0], params, mode="two_pass").token_ids
    for i, token in enumerate(tokens):
        row = edited(engine.next_logits(prompts[0] + tokens[:i]), prompts[0], tokens[:i], params, ())
        noise = reference.exponential(params.seed, len(prompts[0]) + i, 0, torch.arange(VOCAB)).double().log()
        assert int((torch.tensor(row, dtype=torch.float64) / params.temperature - noise).argmax()) == token


@pytest.mark.parametrize("kind", ("greedy", "sampled"))
@pytest.mark.parametrize("name", EDITS)
def test_every_mode_gives_the_ar_tokens(engine, prompts, name, kind):
    params = params_of(name, kind)
    want = [engine.generate(prompt, params, mode="ar").token_ids for prompt in prompts]
    pinned, tolerance = of_this_isa(PINNED, 0.01, 0.4)
    for mode in ("two_pass", "one_pass"):
        for draft_len in (1, 3, 7):
            how = dict(draft_len=draft_len, fan_out=min(6, 3 * draft_len + 1) if mode == "one_pass" else None)
            outs = [engine.generate(prompt, params, mode=mode, **how) for prompt in prompts]
            assert [out.token_ids for out in outs] == want, (mode, draft_len)
        rate = sum(len(out.token_ids) - 1 for out in outs) / sum(out.stats.cycles for out in outs)
        assert rate == pytest.approx(pinned[name, mode][kind == "sampled"], abs=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_batched_with_others_and_preempted(engine, prompts, mode):
    """Edited requests among plain ones, greedy and sampled: each gets the same tokens as alone, whatever else runs."""
    each = [params_of(name, kind, max_new_tokens=60) for name in EDITS for kind in ("greedy", "sampled")]
    each += [SamplingParams(max_new_tokens=70, ignore_eos=True), SamplingParams(max_new_tokens=70, **SAMPLED)]
    jobs = [(prompts[i % 4], params) for i, params in enumerate(each)][::-1]
    want = [engine.generate(*job, mode="ar").token_ids for job in jobs]
    for free in (None, 9):
        with few_pages(engine, free or engine.kv.num_free_pages):
            outs = engine.generate(*(list(column) for column in zip(*jobs, strict=True)), mode=mode)
        assert [out.token_ids for out in outs] == want, free
        assert (sum(out.stats.preemptions for out in outs) > 0) == (free is not None)


@pytest.mark.parametrize("mode", MODES)
def test_no_stop_id_before_min_tokens(engine, logits, prompts, mode):
    """Also inside a block: in two_pass some of the tokens below, each once a stop id, are accepted drafts."""
    pieces = engine.stream(prompts[0], SamplingParams(max_new_tokens=20, ignore_eos=True), mode=mode)
    cycles = [piece.token_ids for piece in pieces]
    plain = list(itertools.chain(*cycles))
    if mode == "two_pass":
        drafts = set(itertools.chain(*(tokens[:-1] for tokens in cycles)))
        assert drafts - set(itertools.chain(*(tokens[-1:] for tokens in cycles)))
    for stop in sorted(set(plain)):
        first = plain.index(stop)
        for min_tokens in (first, first + 1, first + 9):
            params = SamplingParams(40, stop_token_ids=(stop,), min_tokens=min_tokens, ignore_eos=True)
            out = engine.generate(prompts[0], params, mode=mode)
            assert out.token_ids == by_hand(logits, prompts[0], params, {stop})
            assert (len(out.token_ids) == first + 1) == (min_tokens == first)
            assert stop not in out.token_ids[:min_tokens]


def test_plain_requests_pay_nothing(tmp_path):
    folder = checkpoints.make(tmp_path, "qwen3", dtype=torch.bfloat16)
    engine = engines.make(str(folder), max_seq_len=128, max_batch_size=2)
    plain = SamplingParams(max_new_tokens=8, ignore_eos=True)
    engine.generate([1, 2], plain)
    assert engine.memory_report()["edits"] == 0
    engine.generate([1, 2], SamplingParams(max_new_tokens=8, min_tokens=1))
    assert engine.memory_report()["edits"] == 2 * (VOCAB + 256 * 2 + 3 + 2) * 4
    engine.generate([1, 2], plain)
    edited, greedy = engine.runner._cycles.values()  # in order of last use
    assert greedy.sampling is None and greedy.passes[0].logits is None and edited.sampling.edits is not None


@pytest.mark.parametrize("op", (native.count_tokens, reference.count_tokens), ids=("cpu", "reference"))
def test_count_tokens(op):
    check_count_tokens(op)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(repetition_penalty=0.0), "repetition_penalty must be finite and > 0, got 0.0"),
        (dict(presence_penalty=2.5), r"presence_penalty must be in \[-2, 2\], got 2.5"),
        (dict(frequency_penalty=math.nan), r"frequency_penalty must be in \[-2, 2\], got nan"),
        (dict(logit_bias={i: 1.0 for i in range(257)}), "logit_bias must be of at most 256 ids, once each"),
        (dict(logit_bias=((1, 1.0), (1, 2.0))), "logit_bias must be of at most 256 ids, once each"),
        (dict(logit_bias={3: math.inf}), "logit_bias must be finite values for ids"),
        (dict(logit_bias={-1: 0.5}), "logit_bias must be finite values for ids"),
        (dict(logit_bias={"a": 0.5}), "logit_bias: every token id must be an integer, got 'a'"),
        (dict(min_tokens=9, max_new_tokens=8), r"min_tokens must be in \[0, 8\] \(max_new_tokens\), got 9"),
        (dict(temperature=1.0, acceptance="rejection", min_tokens=1), "acceptance must be 'coupled' with penalties"),
    ],
)
def test_parameters_are_checked(kwargs, message):
    with pytest.raises(ValueError, match="SamplingParams: " + message):
        SamplingParams(**kwargs)


def test_a_bias_beyond_the_vocabulary_is_refused(engine):
    with pytest.raises(ValueError, match=r"logit_bias: ids must be within the vocabulary \[0, 96\), got 96"):
        engine.generate([1], SamplingParams(logit_bias={96: 1.0}))


def test_min_tokens_counts_from_the_prompt_after_a_preemption_too(engine, prompts):
    """It does not start again at the point where the request resumes."""
    sampled = dict(max_new_tokens=100, temperature=1.5, seed=1, ignore_eos=True)
    plain = engine.generate(prompts[0], SamplingParams(**sampled), mode="ar").token_ids
    stop = next(t for t in plain[60:] if t not in plain[:60])
    params = SamplingParams(**sampled, stop_token_ids=(stop,), min_tokens=50)
    want = engine.generate(prompts[0], params, mode="ar").token_ids
    assert want[-1] == stop and 60 < len(want) < 100
    others = [(prompt, SamplingParams(100, ignore_eos=True)) for prompt in prompts[1:4]]
    with few_pages(engine, 7):
        outs = engine.generate(*(list(column) for column in zip(*others, (prompts[0], params), strict=True)), mode="ar")
    assert outs[-1].stats.preemptions and outs[-1].token_ids == want
