"""Text from tokens as they arrive."""

from __future__ import annotations

import operator
from collections.abc import Sequence

MOST_UNFINISHED = 3  # tokens of a UTF-8 character that lacks its last byte


class TextStream:
    """Turns token ids into text. However the ids are cut into pieces, the joined text is the decoding of them all, by
    default without special tokens, up to the stop string that is complete first. (Where single-byte tokens are not
    valid text, some tokenizers decode a whole run of them as U+FFFD; characters that were already returned stay.)

    A character may span several tokens and a token may end in the middle of one, so an unfinished character is held
    back. So is text that may begin a stop string. Only the tokens since the last two safe points are decoded again.

    Args:
        tokenizer: a transformers tokenizer.
        stop: strings that are not shown, nor anything after the first of them. A special token that is skipped has no
            text; to stop at one, use ``stop_token_ids`` of :class:`SamplingParams`.
        skip_special_tokens: as in ``tokenizer.decode``; False keeps them, for example to find tool calls.

    Attributes:
        stopped: the stop string that was found; None until then. The request continues until its stream is closed.

    >>> import orthrus_rt
    >>> tokenizer = orthrus_rt.Engine.from_pretrained("smollm2-135m", max_seq_len=256).tokenizer
    >>> text = orthrus_rt.TextStream(tokenizer, stop=["END"])
    >>> [text.push(tokenizer(part).input_ids) for part in ("one E", "N two", " EN", "D three")], text.stopped
    (['one ', 'EN two', ' ', ''], 'END')

    Raises:
        ValueError: ``stop`` is a string itself, or has an element that is not a non-empty string.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = (), *, skip_special_tokens: bool = True):
        if not _are_strings(stop):
            raise ValueError(f"stop must be a sequence of strings that are not empty, got {stop!r}")
        self._tokenizer, self._stop, self._skips_special = tokenizer, tuple(stop), skip_special_tokens
        self._skipped = set(tokenizer.all_special_ids) if skip_special_tokens else ()
        self.stopped: str | None = None
        self._ids: list[int] = []
        self._shown_ids = 0  # how many of _ids have been returned as text; they stay as context for the next
        self._held = ""  # decoded, but may be the beginning of a stop string
        self._next_try = 0  # decode again once this many ids lack their text

    def _decode(self, ids) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skips_special, clean_up_tokenization_spaces=False)

    def push(self, token_ids) -> str:
        """Take token ids (ints) and return the text that they complete. In a long run of invalid bytes or of ids
        without text, that may take a few more ids.

        Raises:
            TypeError: an id is not an int.
            ValueError: an id is negative, or 2**32 or more. Nothing has been taken then.
        """
        tokens = [operator.index(token) for token in token_ids]
        if wrong := [token for token in tokens if not 0 <= token < 2**32]:
            raise ValueError(f"a token id must be within [0, 2**32), got {wrong[0]}")
        self._ids.extend(token for token in tokens if token not in self._skipped)  # skipped ones have no text
        return self._until_stop(self._advance(len(tokens)), final=False)

    def end(self) -> str:
        """Return the text held back so far, with unfinished characters as U+FFFD."""
        return self._until_stop(self._advance(0, final=True), final=True)

    def _advance(self, came: int, final: bool = False) -> str:
        """The text that is complete; ``came`` is the number of tokens just pushed."""
        num_new = len(self._ids) - self._shown_ids
        if num_new < self._next_try and not final:
            return ""
        end, text = len(self._ids), self._decode(self._ids)
        if text.endswith("\ufffd") and not final:
            self._next_try = num_new + 1 + text.count("\ufffd") // 8  # a run of invalid bytes may be long
            end, text = self._before_the_last_character() if came > 1 else (self._shown_ids, "")
            if end == self._shown_ids:
                return ""
        new = self._ids[self._shown_ids : end]
        before = self._decode(self._ids[: self._shown_ids])
        text = text[len(before) :] if text.startswith(before) else self._decode(new)
        if text:
            self._ids, self._shown_ids, self._next_try = self._ids[self._shown_ids :], len(new), 0
        elif not final:  # so may a run of ids without text
            self._next_try = num_new + 1 + num_new // 8
        return text

    def _before_the_last_character(self) -> tuple[int, str]:
        """How many ids come before the last few, which are bytes of an unfinished character; and their text."""
        for end in range(len(self._ids) - 1, max(self._shown_ids, len(self._ids) - MOST_UNFINISHED - 1), -1):
            if not (text := self._decode(self._ids[:end])).endswith("\ufffd"):
                return end, text
        return self._shown_ids, ""

    def _until_stop(self, new: str, final: bool) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + new
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            _, end, self.stopped = min(found)
        else:
            end = len(text) - (0 if final else max((_overlap(text, s) for s in self._stop), default=0))
        self._held = "" if found else text[end:]
        return text[:end]


def _are_strings(stop) -> bool:
    return isinstance(stop, Sequence) and not isinstance(stop, str) and all(isinstance(s, str) and s for s in stop)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next(n for n in range(longest, -1, -1) if text.endswith(stop[:n]))
