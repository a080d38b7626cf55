"""Text that streams, the status line and tables."""

import io
import signal
from types import SimpleNamespace

import pytest

from orthrus_rt import terminal
from orthrus_rt.terminal import Screen, table


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


def test_a_process_that_is_ended_or_stopped_gives_the_row_back(streams, monkeypatch):
    """And takes it again when it goes on; the handlers from before come back."""
    sent, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(terminal.os, "kill", lambda _, number: sent.append((number, signal.getsignal(number))))
    with Screen() as screen:
        for number in terminal.LEAVING:
            screen.status("status")
            assert not streams.stderr.getvalue().endswith("\x1b[2K\x1b8")
            signal.raise_signal(number)
            assert streams.stderr.getvalue().endswith("\x1b[r\x1b[10;1H\x1b[2K\x1b8")
    assert sent == [(number, signal.SIG_DFL) for number in terminal.LEAVING]
    assert signal.getsignal(signal.SIGTERM) is before and streams.stderr.getvalue().count("\x1b[1;9r") == 3


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
