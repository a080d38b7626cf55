"""A tokenizer with one token per byte, so that a character beyond ASCII spans several, and a tiny model for it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import checkpoints

END = 256  # <|end|>, a special token
MASK = 257  # beyond the tokenizer's ids

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}<assistant>"


def build() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=CHAT_TEMPLATE)


def make_checkpoint(folder: Path) -> Path:
    """A tiny random checkpoint with this tokenizer; about half of its drafts' first tokens are accepted."""
    checkpoints.make(folder, vocab_size=MASK + 1, mask_token_id=MASK, eos_token_id=END, diff_noise=0.02)
    build().save_pretrained(folder)
    return folder
