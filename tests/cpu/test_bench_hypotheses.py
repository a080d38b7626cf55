"""The replay of one-pass rules: with the engine's own rule, it does what the engine does."""

from dataclasses import replace

import numpy as np
import pytest

from bench.bench_hypotheses import OURS, PAIR, Replay, pick
from bench.draft_tables import Drafts, DraftTable, collect
from orthrus_rt import dispatch, prompts
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams


@pytest.fixture(scope="module")
def collected(wheel):
    """The engine, a prompt, and the drafts that follow each of the first tokens generated for it."""
    if dispatch.extension() is None:
        pytest.skip("the native module is not built")
    engine = Engine.from_pretrained("smollm2-135m", device="cpu", max_seq_len=512, max_batch_size=1, mode="one_pass")
    prompt = prompts.load("code")[0]
    return engine, prompt, collect(engine, prompt, 32, [(8, 1)])


@pytest.mark.parametrize("fan_out", (2, 6))
def test_the_replay_of_our_rule_is_what_the_engine_does(collected, fan_out):
    engine, prompt, table = collected
    params = SamplingParams(max_new_tokens=32)
    out = engine.generate(prompt.encode(engine.tokenizer), params, draft_len=7, fan_out=fan_out)
    assert out.token_ids == table.text.tolist()
    tokens, passes, *_ = Replay(table, OURS, 8, fan_out).run()
    assert (tokens, passes) == (len(out.token_ids) - 1, out.stats.passes)


def perfect_table():
    """A drafter that is always right, with probability 0.9 each time; the runners-up are negative ids."""
    text = np.arange(1, 41)
    at = text[:, None] + np.arange(1, 9)
    ids = np.stack([at, -at, -at - 100], -1)
    drafts = Drafts(*[ids, np.broadcast_to([0.9, 0.05, 0.02], ids.shape).copy()] * 2)
    shapes = [(k, known) for k in (8, 4) for known in (1, 2)]
    return DraftTable("code", text, {s: Drafts(*(x[:, : s[0]] for x in vars(drafts).values())) for s in shapes})


def test_rows_of_shorter_blocks_and_of_drafts_that_stop():
    tokens, passes, _, ar, diffusion = Replay(perfect_table(), OURS, 8, 4).run()
    assert tokens == 39 and diffusion == 8 + 32 * (passes - 1)  # the first pass has one hypothesis
    assert 6 * passes < ar <= 8 * passes
    halves = Replay(perfect_table(), replace(OURS, whole=0.5, shorter=2), 8, 4).run()
    assert halves[4] == 8 + 24 * (halves[1] - 1)
    stopped = Replay(perfect_table(), replace(OURS, stop=0.8), 8, 4).run()
    assert stopped[3] == 1 + 3 * (stopped[1] - 1) and stopped[1] > passes  # two drafts, with products of 0.9 and 0.81


def test_drafts_beside_a_wrong_bonus():
    table = perfect_table()
    table.drafts[8, 1].guess_ids[:, 0, 0] = 0  # row 0 never guesses the bonus
    rows = {n: Replay(table, replace(OURS, beside_wrong=n), 8, 1).run()[3] for n in (0, 1, None)}
    passes = {n: Replay(table, replace(OURS, beside_wrong=n), 8, 1).run()[1] for n in (0, 1, None)}
    assert rows[0] == passes[0] == 39 and passes[0] > passes[1] > passes[None]


def test_a_block_with_two_known_tokens_begins_with_the_old_draft():
    prob = np.array([[0.2, 0.7, 0.05], [0.9, 0.05, 0.01], [0.1, 0.1, 0.1]])
    assert pick(prob, replace(OURS, besides=True), 2, False) == [(0, 1), (0, PAIR)]
    table = perfect_table()
    replay = Replay(table, replace(OURS, second=0.0), 8, 4)
    old = (np.array([[-3, 3, 0], [77, 0, 0]]), np.array([[0.5, 0.4, 0], [0.6, 0, 0]]))
    ids, probs = replay._behind(2, 8, old, 0, True)
    assert ids[:, 0].tolist() == [77, 5, 6, 7, 8, 9, 10] and probs[:2, 0].tolist() == [0.6, 0.9]
