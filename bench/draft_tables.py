"""The diffusion view's drafts from every position of a greedy text: all that a one-pass policy can ever see.

A hypothesis block that turns out to be right has a true token as its anchor and true tokens before it, so its choices
depend only on its position, its length and the number of its known tokens. One table can therefore replay any choice of
hypotheses without the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from orthrus_rt import prompts
from orthrus_rt.engine import Engine
from orthrus_rt.model import Activations, Workspace, forward
from orthrus_rt.prefill import prefill_rows
from orthrus_rt.rows import Layout, Rows, empty_rows
from orthrus_rt.runner import PREFILL_CHUNK
from orthrus_rt.sampling import SamplingParams

BLOCKS_PER_PASS = 8
TOP = 3


@dataclass
class Drafts:
    """Drafts of blocks of one shape, ``[tokens, block_len, 3]``; row i of block p predicts ``text[p + i + 1]``.

    Attributes:
        ids: the likeliest tokens of each row. probs: their probabilities.
        guess: as ``probs``, but from the partial maxima alone, which is what consensus sees; ``guess_ids`` likewise.
    """

    ids: np.ndarray
    probs: np.ndarray
    guess_ids: np.ndarray
    guess: np.ndarray


@dataclass
class DraftTable:
    """Drafts from each generated token of one prompt.

    Attributes:
        kind: of the prompt. text: int ``[tokens]``, the greedy continuation.
        drafts: by ``(block_len, known)``: blocks whose first ``known`` rows hold the text and the others masks.
    """

    kind: str
    text: np.ndarray
    drafts: dict[tuple[int, int], Drafts]


def _blocks(engine: Engine, text: list[int], first: int, count: int, length: int, known: int) -> Rows:
    """``count`` blocks of slot 0 that start at ``text[first], text[first + 1], ...``."""
    rows = empty_rows(Layout(0, 0, count, length), "cpu")
    token, position, prefix_len = (x.view(count, length) for x in (rows.token, rows.position, rows.prefix_len))
    token.fill_(engine.config.mask_token_id)
    for i in range(known):
        tokens = torch.tensor(text[first + i : first + i + count])
        token[: len(tokens), i] = tokens
    prefix_len.copy_(torch.arange(first, first + count)[:, None])
    position.copy_(prefix_len + torch.arange(length))
    return rows


def _summary(logits: torch.Tensor, num_tiles: int):
    """Top tokens of each row with their probabilities: exact, and from the maxima of ``num_tiles`` tiles."""
    top = logits.topk(TOP)
    probs = torch.exp(top.values - logits.logsumexp(-1, keepdim=True))
    tiles = logits.view(len(logits), num_tiles, -1).max(-1)
    best = tiles.values.topk(TOP)
    width = logits.shape[1] // num_tiles
    ids = tiles.indices.gather(1, best.indices) + best.indices * width
    guess = torch.exp(best.values - tiles.values.logsumexp(-1, keepdim=True))
    return [t.numpy() for t in (top.indices, probs, ids, guess)]


@torch.inference_mode()
def collect(
    engine: Engine, prompt: prompts.Prompt, tokens: int, shapes: list[tuple[int, int]], exact: bool = True
) -> DraftTable:
    """Decode ``tokens`` greedy tokens and draft from each of them with blocks of every ``(block_len, known)``:
    with ``exact`` as ``one_pass`` does, without it as ``two_pass``.

    The engine must be idle and on the CPU.
    """
    ids = prompt.encode(engine.tokenizer)
    out = engine.generate(ids, SamplingParams(max_new_tokens=tokens))
    text, model, kv = ids + out.token_ids, engine.model, engine.kv
    most = BLOCKS_PER_PASS * engine.config.block_len
    act = Activations(model, max(PREFILL_CHUNK, most), most)
    work = Workspace.allocate(model, max_rows=max(PREFILL_CHUNK, most), max_seq_len=engine.max_seq_len)
    kv.reserve(0, len(text))
    run = lambda rows, picked, out, exact=True: forward(  # noqa: E731
        model, kv, rows, act, work, logit_rows=picked, epilogue="logits", out=out, exact=exact
    )
    for at in range(0, len(text), PREFILL_CHUNK):
        run(prefill_rows([(text[at : at + PREFILL_CHUNK], at, 0)], "cpu"), None, None)
    drafts = {}
    for length, known in shapes:
        parts = []
        for at in range(len(ids), len(text), BLOCKS_PER_PASS):
            rows = _blocks(engine, text, at, min(BLOCKS_PER_PASS, len(text) - at), length, known)
            logits = torch.empty(rows.num_rows, model.config.vocab_size)
            run(rows, torch.arange(rows.num_rows, dtype=torch.int32), logits, exact)
            parts.append(_summary(logits, model.lm_head.num_partials))
        joined = (np.concatenate(x).reshape(len(out.token_ids), length, TOP) for x in zip(*parts, strict=True))
        drafts[length, known] = Drafts(*joined)
    kv.release(0)
    return DraftTable(prompt.kind, np.array(out.token_ids), drafts)
