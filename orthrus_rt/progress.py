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
    """A tqdm bar with these options; a stub if it is not to be shown or there is no stderr. (Even a disabled tqdm bar
    starts a thread and fixes the start method of the program's multiprocessing.)
    """
    if not shown or sys.stderr is None or getattr(sys.stderr, "closed", False):
        return _NoBar()
    from tqdm import tqdm

    return tqdm(**options)
