"""Which blocks a one-pass cycle should draft: rules replayed over the same recorded drafts of the embedded model.

Rules, each with ``fan_out`` blocks (0: every hypothesis):
- ``unseen only``: no block supposes a particular bonus token;
- ``prototype``: one runner-up, scores H2 = reach x p2 and H1 = 0.7 x reach x (1 - c - p2), no drafts kept on a miss;
- the engine's own rule (csrc/include/orthrus/hypotheses.h), and that rule with one thing changed:
- ``two known tokens``: a guessed bonus token is followed, as another known token, by the draft for the next position if
  its probability is at least as stated; ``besides``: in an additional block, for the likeliest runner-up. The drafts
  after a wrong second token are replaced by those after the true one. They are never accepted at once, but a miss may
  keep them, so these results are (close) upper bounds;
- ``a half of the blocks K/2``, ``all blocks but one K/2`` ...: shorter blocks, those picked last;
- ``drafts stop below``: no drafts once the product of the drafter's probabilities is less than this;
- ``beside a wrong bonus``: how many drafts are kept of a block whose row 0 missed the bonus token.

    python -m bench.bench_hypotheses --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from bench import common
from bench.draft_tables import Drafts, DraftTable, collect
from orthrus_rt import prompts
from orthrus_rt.reference_consensus import DOUBT, SEEN_GAIN

FAN_OUTS = (1, 2, 4, 6, 8, 12, 0)
PAIR = 3  # the rank of a block that knows the likeliest runner-up and the draft after it


@dataclass(frozen=True)
class Rule:
    """``runners_up`` per draft; ``prototype``: use its scores; ``exact``: use probabilities of the whole softmax.

    ``skip_known``: no block for "none accepted" if the drafts were made with the known token as their anchor, as it
    would repeat them. ``second``: least probability of a second known token; ``besides``: in a block of its own.
    ``whole``: share of the blocks, at least one, that are whole; the others have 1/``shorter`` of the rows. ``stop``:
    least product of probabilities of a draft. ``beside_wrong``: most drafts kept of a block with a wrong bonus token.
    """

    runners_up: int = 2
    seen_gain: float = SEEN_GAIN
    doubt: float = DOUBT
    keep_tail: bool = True
    prototype: bool = False
    exact: bool = False
    skip_known: bool = False
    second: float = np.inf
    besides: bool = False
    whole: float = 1.0
    shorter: int = 1
    stop: float = 0.0
    beside_wrong: int | None = None


OURS = Rule()
RULES = {
    "unseen only": replace(OURS, runners_up=0, keep_tail=False, doubt=1.0),
    "prototype": Rule(runners_up=1, doubt=1.0, keep_tail=False, prototype=True),
    "ours": OURS,
    "one runner-up": replace(OURS, runners_up=1),
    "nothing kept on a miss": replace(OURS, keep_tail=False),
    "no doubt": replace(OURS, doubt=1.0),
    "seen gain 1.3": replace(OURS, seen_gain=1.3),
    "seen gain 2.2": replace(OURS, seen_gain=2.2),
    "no block twice": replace(OURS, skip_known=True),
    "exact probabilities": replace(OURS, exact=True),
    "two known tokens": replace(OURS, second=0.0),
    "two known tokens, from 0.5": replace(OURS, second=0.5),
    "two known tokens, besides": replace(OURS, second=0.0, besides=True),
    "a half of the blocks K/2": replace(OURS, whole=0.5, shorter=2),
    "a half of the blocks K/4": replace(OURS, whole=0.5, shorter=4),
    "all blocks but one K/2": replace(OURS, whole=0.0, shorter=2),
    "all blocks but one K/4": replace(OURS, whole=0.0, shorter=4),
    "drafts stop below 0.02": replace(OURS, stop=0.02),
    "drafts stop below 0.05": replace(OURS, stop=0.05),
    "drafts stop below 0.15": replace(OURS, stop=0.15),
    "beside a wrong bonus 0": replace(OURS, beside_wrong=0),
    "beside a wrong bonus 1": replace(OURS, beside_wrong=1),
    "beside a wrong bonus 3": replace(OURS, beside_wrong=3),
}


def pick(prob: np.ndarray, rule: Rule, fan_out: int, known_anchor: bool) -> list[tuple[int, int]]:
    """``(accepted, rank)`` by gain; ``prob`` ``[drafts, 3]``."""
    m = len(prob)
    reach = np.concatenate([[1.0], prob[:, 0].cumprod()])
    picked: list[tuple[int, int]] = []

    def gain(j, rank):
        rest = 1.0 if j == m else max(0.0, 1 - prob[j, 0])
        if rule.prototype:
            return reach[j] * (prob[j, rank] if rank else 0.7 * max(0.0, rest - (prob[j, 1] if j < m else 0)))
        if rank:
            worth = rule.seen_gain - 1 if (j, 0) in picked else rule.seen_gain
            if rank == PAIR:
                worth *= prob[j + 1, 0] * (rule.seen_gain - 1 if (j, 1) in picked else 1.0)
            return reach[j] * prob[j, 1 if rank == PAIR else rank] * worth
        return reach[j] * max(0.0, rest - sum(prob[j, r] for r in (1, 2) if (j, r) in picked))

    possible = [(j, r) for j in range(m + 1) for r in range(1 + rule.runners_up) if j < m or r == 0]
    if rule.besides:
        possible += [(j, PAIR) for j in range(m - 1)]
    if rule.skip_known and known_anchor and m:
        possible.remove((0, 0))
    gains = {c: gain(*c) for c in possible}
    while gains and (not fan_out or len(picked) < fan_out):
        picked.append(max(gains, key=gains.get))
        del gains[picked[-1]]
        gains |= {c: gain(*c) for c in gains if c[0] == picked[-1][0]}  # the others for the same position lose value
    return picked


class Replay:
    """One text under one rule; totals are tokens, passes, misses, AR rows and diffusion rows."""

    def __init__(self, table: DraftTable, rule: Rule, block_len: int, fan_out: int):
        self.table, self.rule, self.block_len, self.fan_out = table, rule, block_len, fan_out
        self.none = (np.zeros((0, 3), int), np.zeros((0, 3)))

    def _rows(self, length: int, known: int, at: int, first: int, count: int):
        """``(ids, probs)`` of rows of the block at ``text[at]``."""
        drafts: Drafts = self.table.drafts[length, known]
        ids, probs = (drafts.ids, drafts.probs) if self.rule.exact else (drafts.guess_ids, drafts.guess)
        return ids[at, first : first + count], probs[at, first : first + count].copy()

    def _behind(self, bonus: int, length: int, old, rejected: int, pair: bool):
        """Drafts of a block that knows the bonus token and, if ``pair``, the old draft after it."""
        if not pair:
            return self._rows(length, 1, bonus, 0, length - 1)
        ids, probs = self._rows(length, 2, bonus, 1, length - 2)
        behind = slice(rejected + 1, rejected + 2)
        return np.concatenate([old[0][behind], ids]), np.concatenate([old[1][behind], probs])

    def _unseen(self, at: int, bonus: int, length: int):
        """Drafts of a block that starts at the last accepted token and does not know the bonus token after it."""
        guess, _ = self._rows(length, 1, at, 0, 1)
        draft, prob = self._rows(length, 1, at, 1, length - 1)
        if guess[0, 0] != self.table.text[bonus]:
            draft, prob = draft[: self.rule.beside_wrong], prob[: self.rule.beside_wrong]
            prob[:, 0] *= self.rule.doubt
        return draft, prob

    def run(self) -> np.ndarray:
        rule, text, end = self.rule, self.table.text, len(self.table.text) - 1
        at, (draft, prob), known_anchor, totals = 0, self.none, False, np.zeros(5)
        totals[0] = end
        while at < end:
            kept = int((prob[:, 0].cumprod() >= rule.stop).sum())
            draft, prob = draft[:kept], prob[:kept]
            picked = pick(prob, rule, self.fan_out, known_anchor)
            whole = max(1, int(len(picked) * rule.whole))
            length = {c: self.block_len // (1 if i < whole else rule.shorter) for i, c in enumerate(picked)}
            accepted, m = 0, len(draft)
            while accepted < m and at + accepted < end and draft[accepted, 0] == text[at + accepted + 1]:
                accepted += 1
            bonus = min(at + accepted + 1, end)
            pairs = accepted + 1 < m and prob[accepted + 1, 0] >= rule.second
            hits = [
                (j, r) for j, r in picked
                if j == accepted < m and r and draft[j, 1 if r == PAIR else r] == text[bonus]
            ]  # fmt: skip
            old, known_anchor = (draft, prob), bool(hits)
            if hits:
                # If a guess has a block with and one without the draft after it, take the one that this draft's
                # probability favours.
                hit = max(hits, key=lambda c: (c[1] == PAIR) == (pairs and prob[accepted + 1, 0] >= 0.5))
                pair = hit[1] == PAIR or (pairs and not rule.besides)
                draft, prob = self._behind(bonus, length[hit], old, accepted, pair)
            elif (accepted, 0) in length:
                draft, prob = self._unseen(at + accepted, bonus, length[accepted, 0])
            else:
                totals[2] += 1
                draft, prob = (draft[accepted + 1 :], prob[accepted + 1 :].copy()) if rule.keep_tail else self.none
                prob[:, 0] *= rule.doubt
            totals += [0, 1, 0, 1 + m, sum(length.values())]
            at = bonus
        return totals


def two_pass(table: DraftTable, block_len: int) -> np.ndarray:
    text, end, ids = table.text, len(table.text) - 1, table.drafts[block_len, 1].ids
    at = cycles = 0
    while at < end:
        accepted, most = 0, min(block_len - 1, end - at)
        while accepted < most and ids[at, accepted, 0] == text[at + accepted + 1]:
            accepted += 1
        at, cycles = min(at + accepted + 1, end), cycles + 1
    return np.array([end, 2 * cycles, 0, block_len * cycles, block_len * cycles])


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--tokens", type=int, least=2, most=common.MOST_TOKENS, default=64)
    parser.add_argument("--kinds", nargs="+", choices=prompts.KINDS, default=["code", "chat", "math", "data", "prose"])
    parser.add_argument("--block-len", type=int, nargs="+", default=[8, 16], choices=range(8, 17), metavar="K")
    args = parser.parse_args()
    engine = common.embedded_engine(mode="two_pass")
    alone = [(k, 1) for k in args.block_len]
    lengths = {k // rule.shorter for k in args.block_len for rule in RULES.values()}
    shapes = [(k, 1) for k in lengths] + [(k, 2) for k in args.block_len]
    asked = [p for kind in args.kinds for p in prompts.load(kind)]
    tables = [collect(engine, p, args.tokens, shapes) for p in asked]
    of_two_pass = [collect(engine, p, args.tokens, alone, exact=False) for p in asked]
    rows = []
    for block_len in args.block_len:
        runs = {"two_pass": lambda t, _, n=block_len: two_pass(t, n)}
        runs |= {name: lambda t, f, r=rule, n=block_len: Replay(t, r, n, f).run() for name, rule in RULES.items()}
        for name, run in runs.items():
            fan_outs = FAN_OUTS[:1] if name == "two_pass" else FAN_OUTS
            drafts = of_two_pass if name == "two_pass" else tables
            totals = {f: [run(table, f) for table in drafts] for f in fan_outs}
            for kind in ["code"] * ("code" in args.kinds) + ["all"]:
                chosen = [i for i, t in enumerate(tables) if kind in (t.kind, "all")]
                row = {"block_len": block_len, "prompts": kind, "n": len(chosen), "rule": name}
                for fan_out, each in totals.items():
                    tokens, passes, misses, ar, diffusion = sum(each[i] for i in chosen)
                    rows_each = f"{ar / passes:.1f} + {diffusion / passes:.0f}"
                    row[f"F={fan_out or 'all'}"] = f"{tokens / passes:.3f} ({misses / passes:.0%}; {rows_each})"
                rows.append(row)
    facts = common.header(torch.device("cpu")) | {
        "cells": "tokens per pass, that is per read of the weights (share of passes that no block had foreseen; AR rows"
        " + diffusion rows of a pass)",
        "tokens": f"at most {args.tokens} per prompt, greedy, bf16",
    }
    common.report("hypotheses", facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
