"""What the command line shows: text as it is decoded, a status line below it, tables."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
import unicodedata

LEAVING = (signal.SIGTERM, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP)


class Screen:
    """A context manager that writes text to stdout and a status line at the bottom of the terminal.

    The status line appears only if stdout and stderr are terminals. It takes the last row out of the scrolling region,
    so the text above it wraps and scrolls as usual.
    """

    def __init__(self):
        capable = os.environ.get("TERM", "dumb") != "dumb"
        self._has_status = capable and all(s is not None and s.isatty() for s in (sys.stdout, sys.stderr))
        self._rows = 0
        self._column: int | None = 0  # of a row without end; None: unknown, until the next line
        self._handled: list[int] = []

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        columns = shutil.get_terminal_size().columns
        for char in text:
            if char in "\n\r":
                self._column = 0
            elif self._column is None or joins(char):
                self._column = None
            elif char == "\t":  # no further than the last column
                self._column += min(8 - self._column % columns % 8, columns - 1 - self._column % columns)
            else:
                width = char_width(char)
                if width > columns - self._column % columns:
                    self._column += 1  # the last column stays blank
                self._column += width

    def status(self, text: str) -> None:
        columns, rows = shutil.get_terminal_size()
        if not self._has_status or rows < 3:  # two rows are the least that scroll
            return
        # After a full row the cursor is between two rows, a state that is lost by saving and restoring it.
        if self._column is None or (self._column and self._column % columns == 0):
            return
        if rows != self._rows:
            self._rows = rows  # before and after: a signal may arrive in between
            # IND scrolls by one if the cursor is on the last row, and keeps its column; then the cursor goes back up.
            _control(f"\x1bD\x1b7\x1b[1;{rows - 1}r\x1b8\x1b[1A")
            self._rows = rows
        _control(f"\x1b7\x1b[{rows};1H\x1b[2K\x1b[2m{text[: columns - 1]}\x1b[0m\x1b8")

    def __enter__(self):
        # A signal that ends or stops the process would leave the terminal as it is. Signals that the program handles or
        # ignores do not end it.
        if self._has_status and threading.current_thread() is threading.main_thread():
            self._handled = [number for number in LEAVING if signal.getsignal(number) is signal.SIG_DFL]
            for number in self._handled:
                signal.signal(number, self._leave)
        return self

    def __exit__(self, *_):
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)
        if self._rows:
            _control(self._giving_back())
            self._rows = 0

    def _giving_back(self) -> str:
        """The sequence that gives the last row back, until the next status."""
        return f"\x1b7\x1b[r\x1b[{self._rows};1H\x1b[2K\x1b8"

    def _leave(self, number: int, _frame) -> None:
        """Give the row back, but never wait for a terminal that is gone or accepts nothing; then raise the signal."""
        signal.signal(number, signal.SIG_DFL)
        if self._rows:
            with contextlib.suppress(OSError, ValueError):
                terminal = sys.stderr.fileno()
                if select.select([], [terminal], [], 0)[1]:
                    os.write(terminal, self._giving_back().encode())
            self._rows = 0
        os.kill(os.getpid(), number)
        signal.signal(number, self._leave)  # the process was stopped and has been continued


def _control(sequence: str) -> None:
    sys.stderr.write(sequence)
    sys.stderr.flush()


def char_width(char: str) -> int:
    """Columns that a printed character takes: 0, 1 or 2."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def joins(char: str) -> bool:
    """Whether terminals differ in what it and the character before it take together: joiners and modifiers of emoji."""
    return char in "\u200d\ufe0f" or "\U0001f3fb" <= char <= "\U0001f3ff"


def figures(value) -> str:
    """A float with four digits, or as many as it has before the point; None is empty."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:.0f}"


def table(rows: list[tuple]) -> str:
    """Rows of strings as aligned columns: the first column left, the others right; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()

    return "\n".join(map(line, rows))
