"""The published rejection rule, and cycles in which some requests choose by it, on the host.

By default acceptance is *coupled*: at every position both views choose under the same Gumbel noise, keyed by seed,
position and token id, so decoding at temperature > 0 is as lossless as greedy decoding (``process_logits`` does that;
it needs nothing from here). It is the drafter-invariant scheme of Daliri, Musco and Suresh (arXiv 2408.07978).

The *rejection* rule is lossless in distribution: accept a draft with probability min(1, p/q), else sample from the
positive part of p - q, where p and q are the AR and diffusion distributions after temperature, top-k, top-p and min-p.
(Speculative sampling: Leviathan et al. 2023, Chen et al. 2023; arXiv 2605.12825 for this use.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from orthrus_rt import nvtx
from orthrus_rt import state as st
from orthrus_rt.filters import filtered_probabilities
from orthrus_rt.out_of_memory import naming_the_knobs
from orthrus_rt.reference_consensus import first_argmax
from orthrus_rt.sampling import SamplingParams

if TYPE_CHECKING:
    from orthrus_rt.cycle import Cycle, Pass
    from orthrus_rt.request import Request

# Every random number is keyed by (seed, position, purpose), never by call order.
DRAFT, ACCEPT, RECOVER = 0, 1, 2


def uniform(seed: int, position: int, purpose: int) -> float:
    """One fp64 uniform in [0, 1) from the counter-based Philox generator, keyed by its arguments."""
    bits = np.random.Philox(key=[seed, purpose], counter=[position, 0, 0, 0])
    return np.random.Generator(bits).random()


def pick(weights: torch.Tensor, u: float) -> int:
    """Inverse-CDF draw from non-negative fp64 ``weights`` ``[vocab_size]`` (any positive sum)."""
    cdf = weights.cumsum(0)
    index = int(torch.searchsorted(cdf, u * float(cdf[-1]), right=True))
    return min(index, int(weights.nonzero()[-1]))


class RejectionSampler:
    """One request's sampler. The recovery token of a rejected draft never equals the draft (whose residual is 0), so
    consensus, which compares ids, accepts exactly what the rule accepted.
    """

    def __init__(self, params: SamplingParams, seed: int):
        self.params, self.seed = params, seed
        self._draft_probs: torch.Tensor | None = None

    def _probs(self, logits: torch.Tensor) -> torch.Tensor:
        """fp64 ``[rows, vocab_size]``, computed in fp32."""
        p = self.params
        probs = filtered_probabilities(logits, p.temperature, p.top_k, p.top_p, p.min_p).double()
        return probs / probs.sum(-1, keepdim=True)

    def draft(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        """Draft tokens int32 ``[rows]`` for ``position, position + 1, ...`` from fp32 logits ``[rows, vocab_size]``.

        NaN counts as -inf, and a row of nothing but these drafts id 0: a broken drafter is merely slow.
        """
        self._draft_probs = self._probs(logits)
        ids = [pick(q, uniform(self.seed, position + i, DRAFT)) for i, q in enumerate(self._draft_probs)]
        return torch.tensor(ids, dtype=torch.int32, device="cpu")

    def forget_drafts(self) -> None:
        """Free what :meth:`draft` keeps for :meth:`verify`: fp64 ``[drafts, vocab_size]``."""
        self._draft_probs = None

    def verify(self, logits: torch.Tensor, drafts: list[int], position: int) -> torch.Tensor:
        """Choices int32 ``[len(drafts) + 1]`` for positions ``position, ...``: the drafts up to the first rejected one,
        the recovery token in its place, or the bonus token after all drafts. NaN counts as -inf. The choice of a row of
        nothing but these is meaningless; consensus is told that the row has none and does not take it.
        """
        probs = self._probs(logits[: len(drafts) + 1])
        choices = list(drafts)
        for i, token in enumerate(drafts):
            p, q = probs[i], self._draft_probs[i]
            # u < p/q without the division; u = 0 must not accept what p forbids.
            u = uniform(self.seed, position + i, ACCEPT)
            if p[token] > 0 and u * q[token] < p[token]:
                continue
            residual = (p - q).clamp(min=0)
            if not residual.any():
                continue  # p and q are equal to the last bit: to reject would be a rounding error
            choices[i] = pick(residual, uniform(self.seed, position + i, RECOVER))
            break
        else:
            choices.append(pick(probs[len(drafts)], uniform(self.seed, position + len(drafts), RECOVER)))
        padded = choices + [0] * (len(drafts) + 1 - len(choices))
        return torch.tensor(padded, dtype=torch.int32, device="cpu")


@nvtx.ranged("rejection cycle")
def run_by_rejection(cycle: Cycle, requests: list[Request]) -> None:
    """Run one cycle, pass by pass. Those of ``requests`` that sample by rejection choose here, the others as usual."""
    cycle.replay_forwards()
    cycle.stage_first()
    for p in cycle.passes:
        cycle.forward(p)
        by_slot = p.logits.view(cycle.state.num_slots, p.per_slot, -1)
        kept = {r: by_slot[r.slot].clone() for r in requests if r.rejection}
        cycle.sample(p)
        value, index = p.partials
        # Whether a row has a choice at all does not depend on the rule, so the best score shows it for both.
        best, ids = value.amax(1, keepdim=True), index.gather(1, first_argmax(value)[:, None])
        for request, mine in kept.items():
            choices = _choices(cycle.state, p, request, mine)
            first = request.slot * p.per_slot
            ids[first : first + len(choices), 0] = choices.to(ids.device)
        cycle.take(p, (best, ids))


def _choices(state: st.SlotState, p: Pass, request: Request, logits: torch.Tensor) -> torch.Tensor:
    slot = request.slot
    position = int(state.cache_seqlens[slot]) + 1
    if p.step == st.STEP_DRAFT:
        with _failures_of(request):
            return request.rejection.draft(logits, position)
    drafts = state.block_tokens[slot, 1 : 1 + int(state.num_drafts[slot])].tolist()
    return verify(request, logits, drafts, position)


def verify(request: Request, logits: torch.Tensor, drafts: list[int], position: int) -> torch.Tensor:
    """The request's choices by rejection: see :meth:`RejectionSampler.verify`."""
    with _failures_of(request):
        choices = request.rejection.verify(logits, drafts, position)
        request.rejection.forget_drafts()
        return choices


@contextlib.contextmanager
def _failures_of(request: Request) -> Iterator[None]:
    """An error inside carries the request as ``error.request``."""
    try:
        with naming_the_knobs("sampling by rejection"):
            yield
    except torch.OutOfMemoryError as error:
        error.request = request
        raise
