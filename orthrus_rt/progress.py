"""Progress bars: tqdm's, or nothing at all."""

from __future__ import annotations

import sys


class _NoBar:
    n = 0

    def update(self, n: int = 1) -> None:
        pass

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_) -> None:
        pass


def progress_bar(shown: bool, **options):
    """A tqdm with these options. If it is not shown, or there is no stderr to show it on, nothing stands for it: even a
    disabled one starts a thread and settles the way in which the program's multiprocessing starts processes.
    """
    if not shown or sys.stderr is None or getattr(sys.stderr, "closed", False):
        return _NoBar()
    from tqdm import tqdm

    return tqdm(**options)
