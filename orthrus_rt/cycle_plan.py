"""What a decode cycle consists of: the modes and their options. Cheap to import, as the command line reads it."""

from __future__ import annotations

from typing import NamedTuple

from orthrus_rt.integers import integer

MODES = ("ar", "two_pass", "one_pass")
DEFAULT_FAN_OUT = 6
# On a CPU, where rows cost arithmetic. For one sequence, two_pass with 3 drafts beats AR on every processor measured,
# except on chat with AVX2, where they are level (bench/results).
CPU_DRAFTS, CPU_FAN_OUT = 3, 2
DEFAULT_ROWS = 160  # more drafts thus mean fewer blocks: up to here Hopper's SMs read each weight once in row_linear
MAX_BLOCK_LEN = 256  # rows of a block that consensus takes: csrc/include/orthrus/params.h


class CyclePlan(NamedTuple):
    """Which rows a decode cycle has, per slot.

    ``ar``: 1 AR row. ``two_pass``: ``draft_rows`` diffusion rows, then ``block_len`` AR rows. ``one_pass``:
    ``block_len`` AR rows and ``fan_out`` blocks of ``block_len`` diffusion rows, in one pass. ``auto`` stands for any
    of these with at most this ``block_len``, chosen anew for every cycle.
    """

    mode: str
    block_len: int = 1
    fan_out: int = 0

    @property
    def label(self) -> str:
        """``ar``, ``two_pass/7`` (drafts), ``one_pass/15x4`` (drafts, fan_out)."""
        if self.block_len == 1:
            return self.mode
        return f"{self.mode}/{self.block_len - 1}" + (f"x{self.fan_out}" if self.fan_out else "")

    @property
    def num_passes(self) -> int:
        return 2 if self.mode == "two_pass" else 1

    def draft_rows(self, checkpoint_block_len: int) -> int:
        """Diffusion rows of the draft pass of ``two_pass``, where the checkpoint's blocks have
        ``checkpoint_block_len``.

        The last row of a block predicts beyond it. A whole block includes it, as published. A shorter block omits it,
        which saves a row, and the embedded model's drafts are as good (within about 1% of the tokens per cycle).
        """
        return self.block_len - (self.block_len < checkpoint_block_len)

    @property
    def max_rows(self) -> int:
        """Rows per slot in its largest pass."""
        return self.block_len * (1 + self.fan_out)

    @property
    def max_rows_diff(self) -> int:
        """Diffusion rows per slot in its largest pass."""
        return {"ar": 0, "two_pass": self.block_len, "one_pass": self.block_len * self.fan_out}[self.mode]


AR = CyclePlan("ar")


def batch_bucket(size: int, most: int) -> int:
    """Slots of the cycles that ``size`` sequences run in: the next power of two, but at most all ``most`` slots."""
    return min(1 << (size - 1).bit_length(), most)


def batch_buckets(most: int) -> list[int]:
    """The buckets for 1 to ``most`` sequences."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]


def most_hypotheses(draft_len: int) -> int:
    """How many outcomes of verifying ``draft_len`` drafts a one-pass cycle can draft for (see hypotheses.h)."""
    return 3 * draft_len + 1


def default_draft_len(mode: str, most: int, on_cpu: bool, fan_out: int = 0) -> int:
    """Drafts per cycle if the checkpoint allows ``most``: all of them, as published. On a CPU few, or in one_pass as
    many as the requested ``fan_out`` needs. ``auto`` tries several.
    """
    if mode == "auto" or not on_cpu:
        return most
    return min(most, max(CPU_DRAFTS, -(-(fan_out - 1) // 3) if mode == "one_pass" else 0))


def cycle_plan(mode: str, draft_len: int | None, fan_out: int | None, config, *, on_cpu: bool = False) -> CyclePlan:
    """The plan for these options and a checkpoint's ``config``; None stands for the default.

    Raises:
        ValueError: no such mode, or a value is out of its range for this checkpoint.
    """
    if mode not in (*MODES, "auto"):
        raise ValueError(f"mode must be one of auto, {', '.join(MODES)}, got {mode!r}")
    most = config.block_len - 1
    fan_out = None if fan_out is None else integer("fan_out", fan_out)
    asked = draft_len is not None
    draft_len = integer("draft_len", draft_len) if asked else default_draft_len(mode, most, on_cpu, fan_out or 0)
    if not 1 <= draft_len <= most:
        why = f"the checkpoint's block_size - 1, at most {MAX_BLOCK_LEN - 1}"
        raise ValueError(f"draft_len must be within [1, {most}] ({why}), got {draft_len}")
    bounding = draft_len if asked else most
    hypotheses = most_hypotheses(bounding)
    if fan_out is not None and not 1 <= fan_out <= hypotheses:
        bound = f"draft_len {bounding}" if asked else f"at most {bounding} drafts per cycle"
        raise ValueError(f"fan_out must be within [1, {hypotheses}] for {bound}, got {fan_out}")
    if mode == "ar":
        return AR
    if mode == "two_pass":
        return CyclePlan("two_pass", draft_len + 1)
    if mode == "auto":
        return CyclePlan("auto", draft_len + 1, fan_out or 0)
    if fan_out is None:
        default = CPU_FAN_OUT if on_cpu else DEFAULT_FAN_OUT
        fan_out = min(default, hypotheses, max(1, DEFAULT_ROWS // (draft_len + 1) - 1))
    return CyclePlan("one_pass", draft_len + 1, fan_out)
