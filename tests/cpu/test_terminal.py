"""Streamed text, the status line and tables."""

import io
import os
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
    """Replaces stdout and stderr with terminals of 20 columns and 10 rows."""
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


@pytest.fixture
def leaving(streams, monkeypatch):
    """The signals that the process sends to itself, and a pipe as stderr for what bypasses Python's buffers. No signal
    is ignored, as SIGHUP is under nohup.
    """
    sent, (reads, writes) = [], os.pipe()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in terminal.LEAVING}
    monkeypatch.setattr(terminal.os, "kill", lambda _, number: sent.append((number, signal.getsignal(number))))
    streams.stderr.fileno = lambda: writes
    yield SimpleNamespace(sent=sent, reads=reads, writes=writes)
    for number, handler in before.items():
        signal.signal(number, handler)
    os.close(reads)
    os.close(writes)


def test_a_process_that_is_ended_or_stopped_gives_the_row_back(streams, leaving):
    """And takes it again when it continues; the previous handlers are restored."""
    with Screen() as screen:
        for number in terminal.LEAVING:
            screen.status("status")
            signal.raise_signal(number)
            assert os.read(leaving.reads, 99) == b"\x1b7\x1b[r\x1b[10;1H\x1b[2K\x1b8"
    assert leaving.sent == [(number, signal.SIG_DFL) for number in terminal.LEAVING]
    assert streams.stderr.getvalue().count("\x1b[1;9r") == len(terminal.LEAVING)
    assert {signal.getsignal(number) for number in terminal.LEAVING} == {signal.SIG_DFL}


def test_a_signal_behind_the_first_sequence_gives_the_row_back(streams, leaving, monkeypatch):
    real = terminal._control
    with Screen() as screen, monkeypatch.context() as patch:
        patch.setattr(terminal, "_control", lambda sequence: (real(sequence), signal.raise_signal(signal.SIGTERM)))
        screen.status("status")
    assert os.read(leaving.reads, 99).startswith(b"\x1b7\x1b[r")


def test_a_process_that_was_stopped_can_be_stopped_again(streams, leaving):
    with Screen() as screen:
        handler = signal.getsignal(signal.SIGTSTP)
        screen.status("status")
        signal.raise_signal(signal.SIGTSTP)
        assert signal.getsignal(signal.SIGTSTP) == handler != signal.SIG_DFL


@pytest.mark.parametrize("terminal_is", ("gone", "taking nothing"))
def test_it_is_ended_whatever_the_terminal_does(streams, leaving, terminal_is):
    if terminal_is == "gone":
        streams.stderr.fileno = lambda: 10**6
    else:
        os.set_blocking(leaving.writes, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(leaving.writes, bytes(1 << 16))
        os.set_blocking(leaving.writes, True)
    with Screen() as screen:
        screen.status("status")
        signal.raise_signal(signal.SIGTERM)
    assert leaving.sent == [(signal.SIGTERM, signal.SIG_DFL)]


def test_a_signal_that_is_ignored_stays_so(streams, leaving):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Screen() as screen:
            screen.status("status")
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a" * 19, True),
        ("a" * 20, False),
        ("世" * 10, False),
        ("a" * 20 + "\n", True),
        ("a\t\taaaa", False),
        ("\t" * 9 + "a", False),
    ],
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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a" * 20, False),
        ("นี" * 19, True),
        ("ที่" * 20, False),
        ("a\u200b\ufeff" * 20, False),
        ("a" * 19 + "日", True),
        ("a" * 19 + "日" + "b" * 18, False),  # as the last column of the first row stays blank
        ("a" * 18 + "日", False),
        ("a" * 20 + "\rb", True),
        ("👩\u200d🚀 a", False),  # how wide such a sequence is depends on the terminal
        ("👍🏽 a", False),
        ("❤\ufe0f\tb\na", True),
    ],
)
def test_a_status_only_where_it_is_known_that_no_row_is_full(streams, text, shown):
    with Screen() as screen:
        for char in text:
            screen.write(char)
        screen.status("status")
        assert ("status" in streams.stderr.getvalue()) == shown


@pytest.mark.parametrize(("rows", "shown"), [(1, False), (2, False), (3, True)])
def test_a_terminal_too_low_for_a_status(streams, monkeypatch, rows, shown):
    monkeypatch.setenv("LINES", str(rows))
    with Screen() as screen:
        screen.status("status")
        assert ("status" in streams.stderr.getvalue()) == shown
