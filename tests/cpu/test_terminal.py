"""Text that streams, the status line and tables."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_rt import terminal
from orthrus_rt.terminal import Screen, TextStream, table
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


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def streams(monkeypatch):
    """Replaces stdout and stderr by terminals of 20 columns and 10 rows."""
    for name, value in {"TERM": "xterm", "COLUMNS": "20", "LINES": "10"}.items():
        monkeypatch.setenv(name, value)
    pair = SimpleNamespace(stdout=Terminal(), stderr=Terminal())
    monkeypatch.setattr(terminal, "sys", pair)
    return pair


def test_status_line_gives_its_row_back(streams):
    with pytest.raises(KeyboardInterrupt), Screen() as screen:
        screen.write("text")
        screen.status("x" * 100)
        raise KeyboardInterrupt
    control = streams.stderr.getvalue()
    assert streams.stdout.getvalue() == "text"
    assert "\x1b[1;9r" in control and "x" * 19 in control and "x" * 20 not in control
    assert control.index("\x1b[r") > control.index("x" * 19)


@pytest.mark.parametrize(
    ("text", "shown"), [("a" * 19, True), ("a" * 20, False), ("世" * 10, False), ("a" * 20 + "\n", True)]
)
def test_no_status_while_the_cursor_hangs_behind_a_full_row(streams, text, shown):
    with Screen() as screen:
        screen.write(text)
        screen.status("status")
    assert ("status" in streams.stderr.getvalue()) == shown


@pytest.mark.parametrize("stream", ["stdout", "stderr", "closed stderr", "TERM"])
def test_no_status_line_without_a_capable_terminal(streams, monkeypatch, stream):
    if stream == "TERM":
        monkeypatch.setenv("TERM", "dumb")
    else:
        setattr(streams, stream.split()[-1], None if "closed" in stream else io.StringIO())
    with Screen() as screen:
        screen.write("text")
        screen.status("status")
    assert (streams.stderr is None or streams.stderr.getvalue() == "") and streams.stdout.getvalue() == "text"


def test_table_aligns_its_columns():
    assert table([("mode", "tok/s"), ("two_pass", "9.5")]) == "mode      tok/s\ntwo_pass    9.5"
