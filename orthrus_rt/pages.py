"""Which pages are free, and what some of them still hold."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable

PAGE_SIZE = 64  # tokens


def num_pages(length: int) -> int:
    """Pages that ``length`` positions take."""
    return -(-length // PAGE_SIZE)


def page_names(tokens: list[int], known: list[bytes]) -> list[bytes]:
    """Names of all whole pages of ``tokens``, the first of which are ``known``: each stands for its page's tokens and
    all before them, up to collisions of SHA-256.
    """
    names, name = list(known), known[-1] if known else b""
    for first in range(len(known) * PAGE_SIZE, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
        name = hashlib.sha256(name + array("i", tokens[first : first + PAGE_SIZE]).tobytes()).digest()
        names.append(name)
    return names


class PagePool:
    """Pages by number, each held once or more, or free.

    A page may be named after what it holds. It keeps name and content while it is free, so that :meth:`find` brings it
    back, until it is taken for something else: those without a name go first, then those that were free longest. One
    in doubt has no name until it is taken again.
    """

    def __init__(self, pages: range):
        self._blank = list(reversed(pages))  # free, without a name
        self._named: OrderedDict[int, None] = OrderedDict()  # free, with one, the longest first
        self._holders = dict.fromkeys(pages, 0)
        self._name_of: dict[int, bytes] = {}
        self._beginning: dict[int, bytes] = {}  # of a named page: the name of the first page before it, or its own
        self._page_of: dict[bytes, int] = {}
        self._doubtful: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._named)

    def take(self, count: int) -> list[int]:
        """``count`` free pages, whose names are forgotten; the caller has seen that there are so many."""
        pages = [self._blank.pop() if self._blank else self._named.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
            self._unname(page)
        self._doubtful.difference_update(pages)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Add one hold of each; free ones are no longer free."""
        for page in pages:
            self._holders[page] += 1
            self._named.pop(page, None)

    def give_back(self, pages: list[int]) -> None:
        """Drop one hold of each; a page without holders is free. Of the named ones, the last is evicted first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._name_of:
                self._named[page] = None
            else:
                self._blank.append(page)

    def name(self, page: int, name: bytes, beginning: bytes) -> None:
        """Name a held page after what it holds, behind that first page; of equal pages, the first keeps the name."""
        if name not in self._page_of:
            self._page_of[name], self._name_of[page], self._beginning[page] = page, name, beginning

    def doubt(self, pages: Iterable[int]) -> None:
        """Others are not to find these held pages."""
        for page in pages:
            self._unname(page)
            self._doubtful.add(page)

    def forget(self, beginning: bytes) -> None:
        """Others are not to find free pages behind that first one, nor itself."""
        for page in [page for page in self._named if self._beginning[page] == beginning]:
            self._unname(page)
            del self._named[page]
            self._blank.append(page)

    def is_doubtful(self, page: int) -> bool:
        return page in self._doubtful

    def _unname(self, page: int) -> None:
        if page in self._name_of:
            del self._page_of[self._name_of.pop(page)], self._beginning[page]

    def find(self, name: bytes) -> int | None:
        """The page of that name, free or not."""
        return self._page_of.get(name)
