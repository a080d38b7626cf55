"""Which blocks a one-pass cycle should draft: every rule replayed over the same recorded drafts of the embedded model.

Rules, each with ``fan_out`` blocks (0: every hypothesis):
- ``unseen only``: no block supposes a bonus token;
- ``prototype``: one runner-up, scores H2 = reach x p2 and H1 = 0.7 x reach x (1 - c - p2), nothing kept on a miss;
- the engine's own rule (csrc/include/orthrus/hypotheses.h), and that rule with one thing changed.

    python -m bench.bench_hypotheses --out DIR
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench import common
from bench.draft_tables import DraftTable, collect
from orthrus_rt import prompts
from orthrus_rt.engine import Engine
from orthrus_rt.reference_consensus import DOUBT, SEEN_GAIN

FAN_OUTS = (1, 2, 4, 6, 8, 12, 0)


@dataclass(frozen=True)
class Rule:
    """``runners_up`` per draft; ``prototype``: its scores; ``exact``: probabilities of the whole softmax.

    ``skip_known``: no block for "none accepted" behind drafts that were made with the known token as their anchor: it
    would repeat them.
    """

    runners_up: int = 2
    seen_gain: float = SEEN_GAIN
    doubt: float = DOUBT
    keep_tail: bool = True
    prototype: bool = False
    exact: bool = False
    skip_known: bool = False


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
            return reach[j] * prob[j, rank] * (rule.seen_gain - 1 if (j, 0) in picked else rule.seen_gain)
        return reach[j] * max(0.0, rest - sum(prob[j, r] for r in (1, 2) if (j, r) in picked))

    possible = [(j, r) for j in range(m + 1) for r in range(1 + rule.runners_up) if j < m or r == 0]
    if rule.skip_known and known_anchor and m:
        possible.remove((0, 0))
    while possible and (not fan_out or len(picked) < fan_out):
        picked.append(max(possible, key=lambda c: gain(*c)))
        possible.remove(picked[-1])
    return picked


def one_pass(table: DraftTable, rule: Rule, block_len: int, fan_out: int) -> np.ndarray:
    """``(tokens, passes, misses)`` of one text."""
    text, end = table.text, len(table.text) - 1
    ids, probs = (table.ids, table.probs) if rule.exact else (table.guess_ids, table.guess)
    none = (np.zeros((0, 3), int), np.zeros((0, 3)))
    at, (draft, prob), known_anchor, passes, misses = 0, none, False, 0, 0
    while at < end:
        suppositions = pick(prob, rule, fan_out, known_anchor)
        accepted = 0
        while accepted < len(draft) and at + accepted < end and draft[accepted, 0] == text[at + accepted + 1]:
            accepted += 1
        bonus = min(at + accepted + 1, end)
        passes += 1
        known_anchor = any(
            j == accepted and rank and draft[j, rank] == text[bonus] for j, rank in suppositions if j < len(draft)
        )
        if known_anchor:
            draft, prob = ids[bonus, : block_len - 1], probs[bonus, : block_len - 1]
        elif (accepted, 0) in suppositions:
            right = ids[at + accepted, 0, 0] == text[bonus]
            draft, prob = ids[at + accepted, 1:block_len], probs[at + accepted, 1:block_len].copy()
            prob[:, 0] *= 1.0 if right else rule.doubt
        else:
            misses += 1
            draft, prob = (draft[accepted + 1 :], prob[accepted + 1 :].copy()) if rule.keep_tail else none
            prob[:, 0] *= rule.doubt
        at = bonus
    return np.array([end, passes, misses])


def two_pass(table: DraftTable, block_len: int) -> np.ndarray:
    text, end = table.text, len(table.text) - 1
    at = cycles = 0
    while at < end:
        accepted, most = 0, min(block_len - 1, end - at)
        while accepted < most and table.ids[at, accepted, 0] == text[at + accepted + 1]:
            accepted += 1
        at, cycles = min(at + accepted + 1, end), cycles + 1
    return np.array([end, 2 * cycles, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", choices=prompts.KINDS, default=["code", "chat", "math", "data", "prose"])
    parser.add_argument("--block-len", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--out", help="folder for the JSON and the table")
    args = parser.parse_args()
    engine = Engine.from_pretrained("smollm2-135m", device="cpu", max_seq_len=2048, max_batch_size=1, mode="two_pass")
    tables = [collect(engine, p, args.tokens) for kind in args.kinds for p in prompts.load(kind)]
    rows = []
    for block_len in args.block_len:
        runs = {"two_pass": lambda t, _, n=block_len: two_pass(t, n)}
        runs |= {name: lambda t, f, r=rule, n=block_len: one_pass(t, r, n, f) for name, rule in RULES.items()}
        for name, run in runs.items():
            for kind in ("code", "all"):
                chosen = [t for t in tables if kind in (t.kind, "all")]
                row = {"block_len": block_len, "prompts": kind, "n": len(chosen), "rule": name}
                for fan_out in FAN_OUTS[:1] if name == "two_pass" else FAN_OUTS:
                    tokens, passes, misses = sum(run(t, fan_out) for t in chosen)
                    missed = "" if name == "two_pass" else f" ({misses / passes:.0%})"
                    row[f"F={fan_out or 'all'}"] = f"{tokens / passes:.3f}{missed}"
                rows.append(row)
    facts = common.header(torch.device("cpu")) | {
        "cells": "tokens per pass, that is per read of the weights (share of passes that no block had foreseen)",
        "tokens": f"at most {args.tokens} per prompt, greedy, bf16",
    }
    common.report("hypotheses", facts, rows, args.out)


if __name__ == "__main__":
    main()
