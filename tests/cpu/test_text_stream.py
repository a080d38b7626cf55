"""Streamed text: whole characters, and no part of a stop string."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from orthrus_rt.text_stream import TextStream
from tests import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer.build()


def streamed(tokenizer, ids, cuts):
    stream, parts, start = TextStream(tokenizer), [], 0
    for cut in [*sorted(cuts), len(ids)]:
        parts.append(stream.push(ids[start:cut]))
        start = max(start, cut)
    return [*parts, stream.end()]


@settings(deadline=None)
@given(text=st.text(max_size=40), data=st.data())
def test_pieces_join_to_the_text_wherever_it_is_cut(tokenizer, text, data):
    ids = tokenizer(text).input_ids
    cuts = data.draw(st.lists(st.integers(0, len(ids))))
    assert "".join(streamed(tokenizer, ids, cuts)) == text


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, byte_tokenizer.END), max_size=60), data=st.data())
def test_pieces_join_to_the_decoding_of_any_bytes(tokenizer, ids, data):
    cuts = data.draw(st.lists(st.integers(0, len(ids))))
    assert "".join(streamed(tokenizer, ids, cuts)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_ids_of_any_kind(tokenizer):
    ids = tokenizer("abc").input_ids
    for kind in (np.array, torch.tensor, tuple):
        stream = TextStream(tokenizer)
        assert stream.push(ids[:1]) + stream.push(kind(ids[1:])) == "abc"
    for what in ("12", [1.5], ids[0]):
        with pytest.raises(TypeError):
            TextStream(tokenizer).push(what)


def test_a_special_token_is_no_text(tokenizer):
    end = tokenizer.all_special_tokens[0]
    stream = TextStream(tokenizer, stop=[end])
    assert stream.push([*tokenizer("ab").input_ids, tokenizer.convert_tokens_to_ids(end)]) + stream.end() == "ab"
    assert stream.stopped is None
    shown = TextStream(tokenizer, skip_special_tokens=False)
    assert shown.push([*tokenizer("ab").input_ids, tokenizer.convert_tokens_to_ids(end)]) == f"ab{end}"
    stops = TextStream(tokenizer, stop=[end], skip_special_tokens=False)
    assert stops.push([*tokenizer("ab").input_ids, tokenizer.convert_tokens_to_ids(end)]) == "ab"
    assert stops.stopped == end


def test_an_unfinished_character_is_held_back(tokenizer):
    euro = tokenizer("€").input_ids
    stream = TextStream(tokenizer)
    assert [stream.push([i]) for i in euro] == ["", "", "€"]
    assert stream.push(euro[:2]) == "" and stream.end() == "\ufffd"


def test_of_a_long_piece_the_last_character_alone_waits_for_its_end(tokenizer):
    """So a stop string that precedes it is found at once."""
    text = "a END" + 29 * "€"
    ids = tokenizer(text).input_ids
    for cut in (len(ids) - 2, len(ids) - 1):
        stream = TextStream(tokenizer)
        assert [stream.push(part) for part in (ids[:cut], ids[cut:])] == [text[:-1], text[-1]]
        stream = TextStream(tokenizer, stop=["END"])
        assert stream.push(ids[:cut]) == "a " and stream.stopped == "END"


def test_what_was_shown_stays_where_bytes_turn_out_to_be_no_text():
    """With a tokenizer that decodes a run of byte tokens as a whole, all to U+FFFD if any part is not valid text."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁a"]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    emoji, a = list("🎉".encode()), 256
    assert tokenizer.decode([a, *emoji, *emoji[:3]]) == " a" + 7 * "\ufffd"
    for cuts in ([1, 2, 3, 4, 5, 6, 7], [5]):
        assert "".join(streamed(tokenizer, [a, *emoji, *emoji[:3]], cuts)) == " a🎉" + 3 * "\ufffd"
    assert "".join(streamed(tokenizer, [*"é".encode(), 0xFF, a], [2])) == "é\ufffd a"
    assert "".join(streamed(tokenizer, [a, *emoji, *emoji, a], range(10))) == " a🎉🎉 a"


def test_the_space_before_a_word_behind_a_piece_without_text():
    """With a tokenizer that decodes the first word without the space before it, as SentencePiece does."""
    backend = Tokenizer(models.BPE(vocab={"▁a": 0, "▁b": 1, "</s>": 2}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert [stream.push(ids) for ids in ([0], [], [1], [2], [0])] == ["a", "", " b", "", " a"]


def test_ids_that_say_nothing_cost_nothing(tokenizer, monkeypatch):
    """Such as ids after an ignored end of text, which must not be decoded again and again."""
    stream, seen = TextStream(tokenizer), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: seen.append(len(ids)) or decode(ids, **how))
    assert stream.push(tokenizer("ab").input_ids) == "ab"
    assert not any(stream.push([byte_tokenizer.END]) for _ in range(100)) and max(seen) == 2
    assert stream.push(tokenizer("c").input_ids) + stream.end() == "c"


def test_bytes_that_are_no_text_cost_little_however_many_they_are(tokenizer, monkeypatch):
    stream, seen, n = TextStream(tokenizer), [], 4000
    (byte,) = set(tokenizer("€").input_ids[:1])
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: seen.append(len(ids)) or decode(ids, **how))
    text = [stream.push([byte]) for _ in range(n)]
    assert sum(seen) < 20 * n
    monkeypatch.undo()
    text += [stream.push(tokenizer("a").input_ids) for _ in range(n)] + [stream.end()]
    assert "".join(text) == n * "\ufffd" + n * "a" and text[n + n // 8 :].count("a") > n * 3 // 4


def test_ids_without_text_cost_little_however_many_they_are(tokenizer, monkeypatch):
    """Such as ids of a padded vocabulary, which the tokenizer does not have."""
    stream, seen, n = TextStream(tokenizer), [], 4000
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: seen.append(len(ids)) or decode(ids, **how))
    assert not any(stream.push([len(tokenizer) + 9]) for _ in range(n))
    assert sum(seen) < 30 * n
    text = "".join(stream.push(tokenizer("a").input_ids) for _ in range(n))
    assert set(text) == {"a"} and n * 3 // 4 < len(text) and text + stream.end() == n * "a"


def test_a_loop_of_tokens_that_end_inside_a_character_costs_little():
    """Some byte-level vocabularies have such tokens: the text never ends with a whole character."""
    tokens = {" \ufffd": 0, "a": 1}

    class Tokenizer:
        all_special_ids, decoded = (), 0

        def decode(self, ids, **how):
            self.decoded += len(ids)
            return "".join(list(tokens)[i] for i in ids)

    tokenizer, n = Tokenizer(), 4000
    stream = TextStream(tokenizer)
    text = [stream.push([0]) for _ in range(n)] + [stream.push([1] * n)]
    assert "".join(text) + stream.end() == " \ufffd" * n + "a" * n
    assert tokenizer.decoded < 20 * n


def could_begin(stop: list[str], end: str) -> bool:
    return any(s.startswith(end) and s != end for s in stop)


@settings(deadline=None)
@given(
    text=st.text("ab€", max_size=30),
    stop=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_nothing_of_a_stop_string_is_shown_and_nothing_else_held_back(tokenizer, text, stop, data):
    ids = tokenizer(text).input_ids
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)))))
    found = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    _, end, want = min(found, default=(0, len(text), None))
    stream, shown, start = TextStream(tokenizer, stop=stop), "", 0
    for cut in [*cuts, len(ids)]:
        shown += stream.push(ids[start:cut])
        start = cut
        seen = tokenizer.decode(ids[:cut])
        if stream.stopped is None and not seen.endswith("\ufffd"):
            assert seen.startswith(shown) and not any(s in seen for s in stop)
            held = seen[len(shown) :]
            assert not held or could_begin(stop, held)
            assert not any(could_begin(stop, shown[-n:] + held) for n in range(1, 1 + min(4, len(shown))))
    shown += stream.end()
    assert (shown, stream.stopped) == (text[:end], want)
    assert stream.push(ids) == "" or want is None


@pytest.mark.parametrize("stop", ("END", [""], ["a", 3], [b"a"]))
def test_what_is_no_stop_string(tokenizer, stop):
    with pytest.raises(ValueError, match="stop must be a sequence of strings that are not empty, got "):
        TextStream(tokenizer, stop=stop)


@pytest.mark.parametrize("last", ("é", "€", "🎉"))
def test_of_any_piece_only_an_unfinished_character_waits(tokenizer, last):
    ids = tokenizer("a" + last).input_ids
    for cut in range(2, len(ids)):
        assert TextStream(tokenizer).push(ids[:cut]) == "a"


def test_of_a_piece_with_something_else_in_it_nothing_is_taken(tokenizer):
    ids, stream = tokenizer("abc").input_ids, TextStream(tokenizer)
    for wrong, error in ((1.5, TypeError), (-1, ValueError), (2**32, ValueError)):
        with pytest.raises(error):
            stream.push([ids[0], wrong])
    assert stream.push(ids) + stream.end() == "abc"


def test_a_long_text_costs_little_however_long_it_is(tokenizer, monkeypatch):
    stream, seen, n = TextStream(tokenizer), [], 2000
    decode, ids = tokenizer.decode, tokenizer("a").input_ids
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: seen.append(len(ids)) or decode(ids, **how))
    assert all(stream.push(ids) == "a" for _ in range(n))
    assert sum(seen) < 10 * n
