"""consensus, one launch for all slots, compared with the same arithmetic as torch operations (on CUDA also in a graph).

    python -m bench.bench_consensus --out DIR

A call consumes its drafts, so they are restored before each call, and the time of restoring alone is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.common import graphed, header, loop, measure, parser_of, read_bandwidth, report, run_script
from orthrus_rt import dispatch, ops, reference
from orthrus_rt import state as st
from orthrus_rt.rows import Layout, empty_rows

MASK = 99
VOCABULARY = 150000
CALLS = 16  # per timed run


class Case:
    """``slots`` running sequences whose verification accepts half a block on average, from nothing to all of it."""

    def __init__(self, slots: int, block_len: int, num_partials: int, device):
        generator = torch.Generator().manual_seed(0)
        self.state = st.SlotState.allocate(slots, block_len, 4096, 8, device)
        self.state.limit.fill_(1 << 30)
        self.state.finish.fill_(st.RUNNING)
        self.state.stop_ids[:, :2] = torch.tensor([VOCABULARY, VOCABULARY + 1], dtype=torch.int32)
        shape = (slots * block_len, num_partials)
        self.value = torch.randn(shape, generator=generator).to(device)
        width = VOCABULARY // num_partials
        ids = torch.randint(0, width, shape, generator=generator) + torch.arange(num_partials) * width
        self.ids = ids.int().to(device)
        self.accepted = ((torch.arange(slots) + 0.5) * block_len / slots).int().to(device)
        self.drafts = self._choices().view(slots, block_len)[:, : block_len - 1].clone()
        self.drafts[torch.arange(block_len - 1, device=device) == self.accepted[:, None]] = -5
        self.rows = empty_rows(Layout(0, 0, slots, block_len), device)
        self.restore()

    def _choices(self):
        return self.ids.gather(1, self.value.argmax(1, keepdim=True))[:, 0]

    def restore(self):
        self.state.block_tokens[:, 1:] = self.drafts
        self.state.num_drafts.fill_(self.state.max_block_len - 1)

    def call(self):
        partials, block_len = (self.value, self.ids), self.state.max_block_len
        ops.consensus(self.state, partials, st.STEP_VERIFY, st.NEXT_DRAFT, self.rows, MASK, block_len)

    def eager(self):
        """The work of the launch, as torch operations on whole tensors."""
        s, k = self.state, self.state.max_block_len
        choices = self._choices().view(-1, k)
        drafts = s.block_tokens[:, 1:]
        pending = torch.arange(k - 1, device=drafts.device) < s.num_drafts[:, None]
        accepted = ((drafts == choices[:, :-1]) & pending).int().cumprod(1).sum(1)
        emitted = torch.minimum(accepted + 1, s.limit - 1 - s.cache_seqlens)
        column = torch.arange(k, device=drafts.device)
        is_stop = (choices[:, :, None] == s.stop_ids[:, None]).any(-1) & (column < emitted[:, None])
        emitted = torch.minimum(emitted, torch.where(is_stop, column + 1, k).amin(1)).int()
        ring = (s.num_output[:, None] + column) % s.output.shape[1]
        taken = column < emitted[:, None]
        s.output.scatter_(1, ring.long(), torch.where(taken, choices, s.output.gather(1, ring.long())))
        s.num_output += emitted
        s.cache_seqlens += emitted
        s.num_accepted.copy_(torch.minimum(accepted, emitted))
        ended = torch.where(s.cache_seqlens + 1 >= s.limit, st.LENGTH, st.RUNNING)
        s.finish.copy_(torch.where(is_stop.any(1), st.STOP, ended))
        s.block_tokens[:, 0] = choices.gather(1, (emitted.long() - 1)[:, None])[:, 0]
        s.num_drafts.zero_()
        position = s.cache_seqlens[:, None] + column
        valid = (s.finish == st.RUNNING)[:, None] & (position < s.limit[:, None])
        token = torch.where(column == 0, s.block_tokens[:, :1], MASK)
        self.rows.token.copy_(torch.where(valid, token, 0).flatten())
        self.rows.position.copy_(torch.where(valid, position, -1).flatten())
        self.rows.prefix_len.copy_(torch.where(valid, s.cache_seqlens[:, None], 0).flatten())

    def times(self, run: Callable[[], object], repeats: int) -> dict[str, float]:
        """Microseconds of one ``run()`` that finds its drafts pending."""
        device = self.value.device

        def behind_restoring():
            for _ in range(CALLS):
                self.restore()
                run()

        def restoring():
            for _ in range(CALLS):
                self.restore()

        restored = measure(graphed(restoring, device), device, repeats=repeats)["p50"]
        took = measure(graphed(behind_restoring, device), device, repeats=repeats)
        if not torch.equal(self.state.num_accepted, self.accepted):
            raise SystemExit("bench_consensus: the last call accepted something else than it should")
        return {name: (us - restored) / CALLS for name, us in took.items()}

    def nbytes(self, impl: str) -> int:
        """Bytes of partial maxima that a call reads: on a CPU the values of rows up to the first that differs, else
        all.
        """
        rows = int((self.accepted + 1).sum())
        return rows * self.value.shape[1] * 4 if impl == "cpu" else self.value.numel() * 8

    def wrong_values(self) -> int:
        """Values that differ from the oracle's after one call; anything but 0 is a bug."""
        self.restore()
        plain = st.SlotState(**{k: v.cpu().clone() for k, v in vars(self.state).items()})
        rows = empty_rows(Layout(0, 0, plain.num_slots, plain.max_block_len), "cpu")
        self.call()
        partials = (self.value.cpu(), self.ids.cpu())
        reference.consensus(plain, partials, st.STEP_VERIFY, st.NEXT_DRAFT, rows, MASK, plain.max_block_len)
        pairs = [(v, getattr(plain, k)) for k, v in vars(self.state).items()]
        pairs += [(getattr(self.rows, n), getattr(rows, n)) for n in ("token", "position", "seq", "prefix_len")]
        return sum(int((a.cpu() != b).sum()) for a, b in pairs)


def main() -> int:
    parser = parser_of(__doc__, device="auto")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--block-len", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--partials", type=int, default=150)
    parser.add_argument("--loop", type=int, help="run the first shape this often under an NVTX range, for a profiler")
    args = parser.parse_args()
    device = args.device
    shapes = [(slots, block_len) for block_len in args.block_len for slots in args.slots]
    if args.loop:
        case = Case(*shapes[0], args.partials, device)
        loop("consensus", lambda: (case.restore(), case.call()), args.loop)
        return 0
    bandwidth = read_bandwidth(device)
    results = []
    for slots, block_len in shapes:
        case = Case(slots, block_len, args.partials, device)
        wrong = case.wrong_values()
        took, eager = case.times(case.call, 50), case.times(case.eager, 50)["p50"]
        impl = dispatch.select("consensus", device, torch.bfloat16)
        gbs = case.nbytes(impl) * 1e-3 / took["p50"]
        results.append({
            "op": "consensus", "impl": impl, "slots": slots,
            "block_len": block_len, "partials": args.partials, "us p50": took["p50"], "us p20": took["p20"],
            "us p80": took["p80"], "GB/s": gbs, "share": gbs / bandwidth, "baseline": "torch operations",
            "baseline us": eager, "ratio": eager / took["p50"], "wrong values": wrong,
        })  # fmt: skip
        print(*results[-1].values(), flush=True)
    report("consensus", header(device) | {"read bandwidth GB/s": bandwidth}, results, args.out)
    return 0


if __name__ == "__main__":
    run_script(main)
