"""process_logits compared with the same filters and draw as eager torch operations (sort, cumsum, multinomial).

    python -m bench.bench_process_logits --out DIR
    OMP_NUM_THREADS=1 python -m bench.bench_process_logits --device cpu --rows 1 16 --vocab 49152 --out DIR

Bytes are one read of the logits, the least that any choice costs.
"""

from __future__ import annotations

import torch

from bench.common import graphed, header, loop, measure, parser_of, read_bandwidth, report, run_script
from orthrus_rt import dispatch, ops, reference
from orthrus_rt.prefill import prefill_rows
from orthrus_rt.state import SlotEdits, SlotSampling, empty_partials, num_score_tiles

# name: temperature, top_k, top_p, min_p
FILTERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.7, 0, 1.0, 0.0),
    "top-k 20, top-p 0.8": (0.7, 20, 0.8, 0.0),
    "top-p 0.95": (0.7, 0, 0.95, 0.0),
    "top-p 0.95 at T 2": (2.0, 0, 0.95, 0.0),
    "min-p 0.05": (1.0, 0, 1.0, 0.05),
}
EDITED = "top-p 0.95, penalties, 32 biases"  # of FILTERS["top-p 0.95"]


class Case:
    """``rows`` rows of logits like those of language models: few tokens far above many others."""

    def __init__(self, rows: int, vocab: int, filters, device, edited: bool = False):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(rows, vocab, generator=generator) * 1.5
        crowd = noise - 8 + 14 * torch.rand(rows, vocab, generator=generator) ** 12
        # The op scales its logits in place. They are scaled beforehand and it runs at temperature 1, so every call sees
        # the same.
        self.source = (crowd / (filters[0] or 1)).to(device)
        self.logits = self.source.clone()
        self.filters = (float(filters[0] > 0), *filters[1:])
        self.rows = prefill_rows([([0] * rows, 100, 0)], device)
        self.logit_rows = torch.arange(rows, dtype=torch.int32, device=device)
        self.sampling = SlotSampling.allocate(1, device)
        for tensor, value in zip(self.sampling.filters(), self.filters, strict=True):
            tensor.fill_(value)
        if edited:
            stop_ids = torch.full((1, 8), 2, dtype=torch.int32, device=device)
            edits = self.sampling.edits = SlotEdits.allocate(1, vocab, 32, stop_ids)
            # All of the work with hardly any effect, as the logits are edited in place again in every call.
            edits.penalties.copy_(torch.tensor([[1.0, 0.0, 1e-30]]))
            edits.token_counts[0, ::50] = 1
            edits.bias_ids.copy_(torch.arange(32))
            edits.min_position.fill_(1000)
        self.cache_seqlens = torch.full((1,), 100, dtype=torch.int32, device=device)
        self.partials = empty_partials(rows, num_score_tiles(vocab), device)
        self.impl = dispatch.select("process_logits", device, torch.float32)

    def call(self):
        self._run(ops.process_logits, self.logits, self.partials)

    def _run(self, op, logits, partials):
        op(logits, self.rows, self.logit_rows, self.sampling, self.cache_seqlens, 0, partials)

    def eager(self):
        """The same filters and one draw, without edits."""
        temperature, top_k, top_p, min_p = self.filters
        if temperature == 0:
            return self.source.argmax(-1)
        y = self.source / temperature  # dividing by 1, but the division has to be timed
        if top_k:
            y = y.masked_fill(y < y.topk(top_k).values[:, -1:], -torch.inf)
        if top_p < 1:
            ordered, index = y.sort(-1, descending=True)
            probs = ordered.softmax(-1)
            drop = probs.cumsum(-1) - probs >= top_p
            y = torch.empty_like(y).scatter_(1, index, ordered.masked_fill(drop, -torch.inf))
        probs = y.softmax(-1)
        if min_p:
            probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
        return torch.multinomial(probs, 1)

    def rows_unlike_the_oracle(self) -> int:
        """Rows whose choice differs; at most one near-tie in many rows, as exp and log differ in the last bits."""
        self.call()
        want = empty_partials(*self.partials[0].shape, self.source.device)
        self._run(reference.process_logits, self.source.clone(), want)
        got, want = (index.gather(1, reference.first_argmax(value)[:, None]) for value, index in (self.partials, want))
        return int((got != want).sum())


def main() -> int:
    parser = parser_of(__doc__, device="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 32, 128])
    parser.add_argument("--vocab", type=int, nargs="+", default=[151936, 49152])
    parser.add_argument("--loop", type=int, help="run the first shape this often under an NVTX range, for a profiler")
    args = parser.parse_args()
    device = args.device
    shapes = [(rows, vocab) for vocab in args.vocab for rows in args.rows]
    if args.loop:
        case = Case(*shapes[0], FILTERS["top-p 0.95"], device)
        loop("process_logits", case.call, args.loop)
        return 0
    bandwidth = read_bandwidth(device)
    repeats = 50
    facts = header(device) | {"read bandwidth GB/s": bandwidth}
    results = []
    for rows, vocab in shapes:
        for name in (*FILTERS, EDITED):
            case = Case(rows, vocab, FILTERS.get(name, FILTERS["top-p 0.95"]), device, edited=name == EDITED)
            unlike = case.rows_unlike_the_oracle()
            took = measure(graphed(case.call, device), device, repeats=repeats)
            eager = measure(case.eager, device, repeats=repeats if device.type == "cuda" else 3)["p50"]
            gbs = case.source.numel() * 4e-3 / took["p50"]
            results.append({
                "op": "process_logits", "impl": case.impl, "filters": name, "rows": rows, "vocab": vocab,
                "dtype": "fp32", "us p50": took["p50"], "us p20": took["p20"], "us p80": took["p80"], "GB/s": gbs,
                "share": gbs / bandwidth, "baseline": "eager torch", "baseline us": eager,
                "ratio": eager / took["p50"], "rows unlike the oracle": unlike,
            })  # fmt: skip
            print(*results[-1].values(), flush=True)
    report("process_logits", facts, results, args.out)
    return 0


if __name__ == "__main__":
    run_script(main)
