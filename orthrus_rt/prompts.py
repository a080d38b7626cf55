"""The prompts that ``verify``, tests and benchmarks decode: questions, sums, code, other text to continue."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

KINDS = ("chat", "code", "long", "math", "data", "prose")
CHAT_KINDS = ("chat", "math")


@dataclass(frozen=True)
class Prompt:
    """``chat`` and ``math`` prompts need the chat template; the others are raw text to continue."""

    name: str
    kind: str
    text: str

    def encode(self, tokenizer) -> list[int]:
        """Token ids, with the chat template if the kind needs it and the tokenizer has one."""
        return encode(tokenizer, self.text, chat=self.kind in CHAT_KINDS and bool(tokenizer.chat_template))


def load(kind: str | None = None) -> list[Prompt]:
    """All prompts in a fixed order, or those of one kind."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"prompts: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    text = resources.files("orthrus_rt.data").joinpath("prompts.json").read_text(encoding="utf-8")
    prompts = [Prompt(**entry) for entry in json.loads(text)]
    return [p for p in prompts if kind in (None, p.kind)]


def encode(tokenizer, text: str, *, chat: bool) -> list[int]:
    """Token ids of ``text``: as one user turn of the chat template, or raw."""
    if not chat:
        return tokenizer(text, verbose=False).input_ids  # a prompt that is too long is refused elsewhere
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use raw text (--raw)")
    turns = [{"role": "user", "content": text}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program
        raise ValueError(
            f"the tokenizer's chat template fails ({type(error).__name__}: {error}); use raw text (--raw)"
        ) from error
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
