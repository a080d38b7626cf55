"""Text that streams, the status line and tables."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthrus_rt.terminal import StatusLine, TextStream, table
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


def test_an_unfinished_character_is_held_back(tokenizer):
    euro = tokenizer("€").input_ids
    stream = TextStream(tokenizer)
    assert [stream.push([i]) for i in euro] == ["", "", "€"]
    assert stream.push(euro[:2]) == "" and stream.end() == "\ufffd"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_status_line_gives_its_row_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "10")
    terminal = Terminal()
    with pytest.raises(KeyboardInterrupt), StatusLine(terminal) as status:
        status.show("x" * 100)
        raise KeyboardInterrupt
    written = terminal.getvalue()
    assert "\x1b[1;9r" in written and "x" * 19 in written and "x" * 20 not in written
    assert written.index("\x1b[r") > written.index("x" * 19)


@pytest.mark.parametrize(("file", "term"), [(io.StringIO, "xterm"), (Terminal, "dumb")])
def test_no_status_line_without_a_capable_terminal(monkeypatch, file, term):
    monkeypatch.setenv("TERM", term)
    out = file()
    with StatusLine(out) as status:
        status.show("text")
    assert out.getvalue() == ""


def test_table_aligns_its_columns():
    assert table([("mode", "tok/s"), ("two_pass", "9.5")]) == "mode      tok/s\ntwo_pass    9.5"
