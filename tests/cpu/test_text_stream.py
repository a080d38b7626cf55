"""Text that streams: whole characters, and nothing of a stop string."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


@given(text=st.text(max_size=40), data=st.data())
def test_pieces_join_to_the_text_wherever_it_is_cut(tokenizer, text, data):
    ids = tokenizer(text).input_ids
    cuts = data.draw(st.lists(st.integers(0, len(ids))))
    assert "".join(streamed(tokenizer, ids, cuts)) == text


@given(ids=st.lists(st.integers(0, byte_tokenizer.END), max_size=60), data=st.data())
def test_pieces_join_to_the_decoding_of_any_bytes(tokenizer, ids, data):
    cuts = data.draw(st.lists(st.integers(0, len(ids))))
    assert "".join(streamed(tokenizer, ids, cuts)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_ids_of_any_kind(tokenizer):
    ids = tokenizer("abc").input_ids
    for kind in (np.array, torch.tensor, tuple):
        stream = TextStream(tokenizer)
        assert stream.push(ids[:1]) + stream.push(kind(ids[1:])) == "abc"


def test_an_unfinished_character_is_held_back(tokenizer):
    euro = tokenizer("€").input_ids
    stream = TextStream(tokenizer)
    assert [stream.push([i]) for i in euro] == ["", "", "€"]
    assert stream.push(euro[:2]) == "" and stream.end() == "\ufffd"


def could_begin(stop: list[str], end: str) -> bool:
    return any(s.startswith(end) and s != end for s in stop)


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
