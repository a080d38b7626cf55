"""What ``verify --against transformers`` takes for rounding: two tokens whose logits differ by no more than a bound."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from orthrus_rt import prompts, transformers_model, verify
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints


def compare_scripted(engine, monkeypatch, shares):
    """Compare our tokens with an implementation that prefers our second choice at each index in ``shares``. There our
    two logits and its own differ by these shares of the bound. Returns the comparison and the pairs of tokens.
    """
    ids, params = [1, 2, 3], SamplingParams(max_new_tokens=6, ignore_eos=True)
    want = engine.generate(ids, params, mode="ar").token_ids
    honest, gaps, pairs, rows = engine.next_logits_and_hidden, {}, {}, torch.zeros(len(want), engine.config.vocab_size)
    for index, token in enumerate(want):
        logits, hidden = honest(ids + want[:index])
        first, second = logits.topk(2).indices.tolist()
        assert first == token
        rows[index, first] = 1
        if index in shares:
            bound = verify.near_tie_bound(engine, hidden, first, second)
            pairs[index], gaps[len(ids) + index] = (first, second), shares[index][0] * bound
            rows[index, second] = 1 + shares[index][1] * bound

    def close(ids):
        logits, hidden = honest(ids)
        first, second = logits.topk(2).indices.tolist()
        logits[second] = logits[first] - gaps[len(ids)]
        return logits, hidden

    monkeypatch.setattr(engine, "next_logits_and_hidden", close)
    start = min(shares)
    theirs = [*want[:start], pairs[start][1], *[0] * (len(want) - start - 1)]  # what follows is not compared
    other = verify.Other("other", lambda _: theirs, lambda ids, count: rows[-count:])
    ((_, _, (comparison,)),) = verify.verify(engine, [ids], params, ["ar"], against=other)
    return comparison, pairs


@pytest.mark.parametrize(
    ("ours", "theirs", "near_tie"),
    [
        *[(0.9, 0.05, True), (1.1, 0.05, False), (0, 0.9, True), (0, 1.1, False), (0.5, 0.4, True), (0.5, 0.6, False)],
        *[(-1.1, 0.5, False), (-0.5, 1.1, False)],  # tokens that were not our first choice
    ],
)
@pytest.mark.parametrize("before", [{}, {2: (0.3, 0.3)}], ids=["first", "second"])
def test_near_ties_are_those_within_the_bound(text_folder, monkeypatch, ours, theirs, near_tie, before):
    """At the first difference and at later ones, the bound applies to our gap, to theirs and to their sum."""
    engine = Engine.from_pretrained(text_folder, device="cpu", mode="two_pass", max_seq_len=128, max_batch_size=1)
    comparison, pairs = compare_scripted(engine, monkeypatch, before | {4: (ours, theirs)})
    assert [d.index for d in comparison.near_ties] == [*before, *[4] * near_tie]
    assert all(d.near_tie and d.tokens == pairs[d.index] for d in comparison.near_ties)
    assert comparison.tokens == (6 if near_tie else 4)
    difference = comparison.difference
    assert difference.near_tie == near_tie and difference.tokens == pairs[difference.index]
    assert difference.index == (min([*before, 4]) if near_tie else 4)


@pytest.mark.parametrize("tied", (True, False))
def test_the_bound_is_of_the_rows_that_make_the_logits(tied):
    """It is linear in these rows, and does not depend on any others."""
    config = checkpoints.tiny_config(tie_word_embeddings=tied)
    tensors, hidden = checkpoints.random_tensors(config), torch.linspace(-1, 1, config.hidden_size)

    def bound(tensors):
        of = SimpleNamespace(
            config=config, checkpoint=SimpleNamespace(tensors=tensors), model=SimpleNamespace(dtype=torch.bfloat16)
        )
        return verify.near_tie_bound(of, hidden, 4, 7)

    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
        factor = 2 if tied or name == "lm_head.weight" else 1
        changed = tensors | {name: 2 * tensors[name]}
        assert bound(changed) == pytest.approx(factor * bound(tensors), rel=1e-6)


def test_the_bound_is_three_standard_deviations_and_the_rounding_of_both_logits():
    config = checkpoints.tiny_config(tie_word_embeddings=True)
    head = torch.zeros(config.vocab_size, config.hidden_size)
    head[4, 0], head[7, 1] = 3.0, 4.0
    of = SimpleNamespace(
        config=config,
        checkpoint=SimpleNamespace(tensors={"model.embed_tokens.weight": head}),
        model=SimpleNamespace(dtype=torch.bfloat16),
    )
    hidden, unit, times = torch.ones(config.hidden_size), 2**-8, 2 * config.num_layers + 1
    sigma = 5.0 * unit * (times / 6) ** 0.5 * 2**0.5  # |w_a - w_b| is 5, |hidden| the root of its size
    assert verify.near_tie_bound(of, hidden, 4, 7) == pytest.approx(3 * sigma + 7 * unit, rel=1e-6)


@pytest.mark.full
def test_the_bound_is_what_bf16_does():
    """On the embedded model: the gap of the two likeliest tokens differs between this runtime and transformers by less
    than the bound everywhere, and the bound is not generous: it is less than 15 times the rms difference.
    """
    engine = Engine.from_pretrained("smollm2-135m", device="cpu", mode="two_pass", max_seq_len=512, max_batch_size=1)
    model = transformers_model.build(engine.checkpoint, dtype=torch.bfloat16)
    params, shares = SamplingParams(max_new_tokens=24), []
    for kind in ("chat", "code", "prose"):
        ids = prompts.load(kind)[0].encode(engine.tokenizer)
        tokens = engine.generate(ids, params).token_ids
        with torch.inference_mode():
            theirs = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 :].float()
        for n in range(0, len(tokens), 3):
            ours, hidden = engine.next_logits_and_hidden(ids + tokens[:n])
            a, b = ours.topk(2).indices.tolist()
            bound = verify.near_tie_bound(engine, hidden, a, b)
            shares.append(float((ours[a] - ours[b]) - (theirs[n, a] - theirs[n, b])) / bound)
        greedy, logits = (partial(f, model) for f in (transformers_model.greedy, transformers_model.logits))
        other = verify.Other("transformers", partial(greedy, max_new_tokens=24), logits)
        difference = verify._compare_against(engine, other, ids, tokens).difference
        assert difference is None or difference.near_tie
    assert max(map(abs, shares)) < 1 < 15 * (sum(s * s for s in shares) / len(shares)) ** 0.5
