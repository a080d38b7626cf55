"""Text as it is decoded, from tokens as they come."""

from __future__ import annotations

import operator
from collections.abc import Sequence

MOST_UNFINISHED = 3  # tokens of a character of UTF-8 that lacks its last byte


class TextStream:
    """Token ids in, text out, such that the pieces joined are the decoding of the whole, by default without its special
    tokens, or of what comes before the stop string that is complete first, wherever the pieces are cut. (Where tokens
    of single bytes are no valid text, some tokenizers decode all such tokens in a row as U+FFFD: those that were shown
    stay.)

    A character may span several tokens and a token may hold half of one, so an unfinished character is held back, and
    so is what a stop string may begin with. Only the tokens since the last two safe points are decoded again.

    Args:
        tokenizer: a transformers tokenizer.
        stop: strings none of which is to be shown, nor anything after it. A special token that is skipped is no string:
            to stop at one is ``stop_token_ids``' part, of :class:`SamplingParams`.
        skip_special_tokens: as of ``tokenizer.decode``; False for those who look for calls of tools among them.

    Attributes:
        stopped: the stop string that came; None until one does. The request goes on until its stream is closed.

    >>> import orthrus_rt
    >>> tokenizer = orthrus_rt.Engine.from_pretrained("smollm2-135m", max_seq_len=256).tokenizer
    >>> text = orthrus_rt.TextStream(tokenizer, stop=["END"])
    >>> [text.push(tokenizer(part).input_ids) for part in ("one E", "N two", " EN", "D three")], text.stopped
    (['one ', 'EN two', ' ', ''], 'END')

    Raises:
        ValueError: ``stop`` is a string, or holds something else or an empty one.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = (), *, skip_special_tokens: bool = True):
        if not _are_strings(stop):
            raise ValueError(f"stop must be a sequence of strings that are not empty, got {stop!r}")
        self._tokenizer, self._stop, self._skips_special = tokenizer, tuple(stop), skip_special_tokens
        self._skipped = set(tokenizer.all_special_ids) if skip_special_tokens else ()
        self.stopped: str | None = None
        self._ids: list[int] = []
        self._shown_ids = 0  # of _ids, those whose text is out; they stay as context for the next ones
        self._held = ""  # decoded, but a stop string may begin there
        self._next_try = 0  # so many ids without their text are decoded again

    def _decode(self, ids) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skips_special, clean_up_tokenization_spaces=False)

    def push(self, token_ids) -> str:
        """The text that these tokens, ints, complete; in a long run of bytes or ids without text, with a few more.

        Raises:
            TypeError: they are no ints.
        """
        tokens = [operator.index(token) for token in token_ids]  # all of them, before one is taken
        self._ids.extend(token for token in tokens if token not in self._skipped)  # which say nothing
        return self._until_stop(self._advance(len(tokens)), final=False)

    def end(self) -> str:
        """The text held back until now, unfinished characters as U+FFFD."""
        return self._until_stop(self._advance(0, final=True), final=True)

    def _advance(self, came: int, final: bool = False) -> str:
        """The text of what is complete; ``came``: tokens just now."""
        num_new = len(self._ids) - self._shown_ids
        if num_new < self._next_try and not final:
            return ""
        end, text = len(self._ids), self._decode(self._ids)
        if text.endswith("\ufffd") and not final:
            self._next_try = num_new + 1 + text.count("\ufffd") // 8  # bytes that are no text may go on and on
            end, text = self._before_the_last_character() if came > 1 else (self._shown_ids, "")
            if end == self._shown_ids:
                return ""
        new = self._ids[self._shown_ids : end]
        before = self._decode(self._ids[: self._shown_ids])
        text = text[len(before) :] if text.startswith(before) else self._decode(new)
        if text:
            self._ids, self._shown_ids, self._next_try = self._ids[self._shown_ids :], len(new), 0
        elif not final:  # ids without text may go on and on, too
            self._next_try = num_new + 1 + num_new // 8
        return text

    def _before_the_last_character(self) -> tuple[int, str]:
        """How many ids end with a whole character, where the last few, of bytes of another, do not; and their text."""
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
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next(n for n in range(longest, -1, -1) if text.endswith(stop[:n]))
