"""Keeps track of which pages are free and of what some of them still hold."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable

PAGE_SIZE = 64  # tokens


def num_pages(length: int) -> int:
    """Pages that ``length`` positions need."""
    return -(-length // PAGE_SIZE)


def page_names(tokens: list[int], known: list[bytes]) -> list[bytes]:
    """Names of all whole pages of ``tokens``; those of the first pages are ``known``. A name stands for the tokens of
    its page and all tokens before them, barring collisions of SHA-256.
    """
    names, name = list(known), known[-1] if known else b""
    for first in range(len(known) * PAGE_SIZE, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
        name = hashlib.sha256(name + array("i", tokens[first : first + PAGE_SIZE]).tobytes()).digest()
        names.append(name)
    return names


class PagePool:
    """Pages by number, each of which is free or has one or more holders.

    A page may be named after its content. A free page keeps its name and content, so that :meth:`find` can still return
    it, until it is taken for something else. Pages without a name are taken first, then those that have been free
    longest. A doubtful page has no name until it is taken again.
    """

    def __init__(self, pages: range):
        self._blank = list(reversed(pages))  # free, without a name
        self._named: OrderedDict[int, None] = OrderedDict()  # free, with a name, longest free first
        self._holders = dict.fromkeys(pages, 0)
        self._name_of: dict[int, bytes] = {}
        self._beginning: dict[int, bytes] = {}  # of a named page: the name of its sequence's first page
        self._page_of: dict[bytes, int] = {}
        self._doubtful: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._named)

    def take(self, count: int) -> list[int]:
        """Take ``count`` free pages and forget their names. The caller has checked that there are enough."""
        pages = [self._blank.pop() if self._blank else self._named.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
            self._unname(page)
        self._doubtful.difference_update(pages)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Add one hold of each page; free pages stop being free."""
        for page in pages:
            self._holders[page] += 1
            self._named.pop(page, None)

    def give_back(self, pages: list[int]) -> None:
        """Drop one hold of each page; a page without holders is free. Of the named ones, the last is evicted first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._name_of:
                self._named[page] = None
            else:
                self._blank.append(page)

    def name(self, page: int, name: bytes, beginning: bytes) -> None:
        """Name a held page after its content; ``beginning`` names the sequence's first page. If another page has the
        name, that one keeps it.
        """
        if name not in self._page_of:
            self._page_of[name], self._name_of[page], self._beginning[page] = page, name, beginning

    def doubt(self, pages: Iterable[int]) -> None:
        """Hide these held pages from other requests."""
        for page in pages:
            self._unname(page)
            self._doubtful.add(page)

    def forget(self, beginning: bytes) -> None:
        """Hide the free pages of sequences with this first page from other requests, and the first page itself."""
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
        """The page with that name, free or not."""
        return self._page_of.get(name)
