"""The single KV cache: paged, shared by both views, written in place and never copied."""

from __future__ import annotations

import torch

from orthrus_rt import huge_pages, pages
from orthrus_rt.config import ModelConfig
from orthrus_rt.pages import PAGE_SIZE, PagePool
from orthrus_rt.uploads import upload

SINK_PAGE = 0  # never read; implementations whose invalid rows write direct those writes here


class OutOfPages(RuntimeError):
    """No free page is left."""


class PagedKvCache:
    """Pages of 64 positions for every layer, and the table that maps slots to pages.

    Slots whose sequences have the same beginning may share its pages: whole pages of committed positions, which are not
    written again, named by :func:`orthrus_rt.pages.page_names`. Where every op is row-invariant, they hold exactly the
    bits that a slot would have computed by itself.

    Attributes:
        max_seq_len: the most positions of a sequence.
        num_pages: pages that slots may hold. SINK_PAGE, which no slot holds, comes on top.
        k_pages, v_pages: per layer ``[1 + num_pages, num_heads_kv, 64, head_dim]``. Content beyond the positions that a
            slot has committed or is verifying is undefined, and kernels never use it.
        page_table: int32 ``[num_slots, max_pages]``; entry i holds positions ``64*i ... 64*i+63``.
    """

    def __init__(self, config: ModelConfig, *, num_slots: int, max_seq_len: int, num_pages: int, device, dtype):
        self.max_seq_len, self.num_pages = max_seq_len, num_pages
        shape = torch.Size((config.num_layers, 2, 1 + num_pages, config.num_heads_kv, PAGE_SIZE, config.head_dim))
        self.pages = huge_pages.empty(shape, dtype, torch.device(device))
        self.k_pages = [self.pages[i, 0] for i in range(config.num_layers)]
        self.v_pages = [self.pages[i, 1] for i in range(config.num_layers)]
        self.page_table = torch.full(
            (num_slots, pages.num_pages(max_seq_len)), SINK_PAGE, dtype=torch.int32, device=device
        )
        self.reset()

    def reset(self) -> None:
        """Make every page free and empty."""
        self.pool = PagePool(range(SINK_PAGE + 1, SINK_PAGE + 1 + self.num_pages))
        self._held: list[list[int]] = [[] for _ in range(self.page_table.shape[0])]
        self.page_table.fill_(SINK_PAGE)

    @property
    def num_free_pages(self) -> int:
        return self.pool.num_free

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes

    def open(self, slot: int, names: list[bytes], length: int) -> int:
        """Give the empty ``slot`` pages for positions ``0 ... length-1``. The first of them are the pages that the
        cache has under ``names``, up to the first name that it lacks. No page changes hands if this fails.

        Returns:
            The number of positions whose keys and values are already there, a multiple of 64.

        Raises:
            OutOfPages: fewer pages are free than needed.
        """
        found = []
        for name in names:
            if (page := self.pool.find(name)) is None:
                break
            found.append(page)
        self.pool.hold(found)
        try:
            self._hand(slot, found + self._take(slot, length, len(found)))
        except OutOfPages:
            self.pool.give_back(found)
            raise
        return len(found) * PAGE_SIZE

    def reserve(self, slot: int, length: int) -> None:
        """Give ``slot`` pages for positions ``0 ... length-1``; nothing changes if this fails.

        Raises:
            OutOfPages: fewer pages are free than needed.
        """
        there = len(self._held[slot])
        if length > there * PAGE_SIZE:
            self._hand(slot, self._take(slot, length, there))

    def publish(self, slot: int, names: list[bytes]) -> None:
        """Name the slot's first pages. Their contents count as final for everything launched from here on."""
        for page, name in zip(self._held[slot], names, strict=False):
            if self.pool.is_doubtful(page):
                return  # whatever was computed after it is doubtful too
            self.pool.name(page, name, names[0])

    def withdraw(self, slot: int, names: list[bytes]) -> None:
        """Remove pages from the prefix cache: those of the slot, whose names would be these; those of other slots from
        the first page shared with it on (their holders keep them); and free ones of sequences with the same first page.
        """
        doubtful = set(self._held[slot])
        for held in self._held:
            first = next((i for i, page in enumerate(held) if page in doubtful), len(held))
            self.pool.doubt(held[first:])
        if names:
            self.pool.forget(names[0])

    def _take(self, slot: int, length: int, there: int) -> list[int]:
        need = pages.num_pages(length) - there
        if need > self.num_free_pages:
            free = self.num_free_pages
            raise OutOfPages(f"KV cache: slot {slot} needs {need} more pages for {length} tokens, {free} are free")
        return self.pool.take(need)

    def _hand(self, slot: int, taken: list[int]) -> None:
        held = self._held[slot]
        first = len(held)
        held.extend(taken)
        self.page_table[slot, first : len(held)] = upload(taken, torch.int32, self.page_table.device)

    def move(self, source: int, target: int) -> None:
        """Hand every page of ``source`` to the empty slot ``target``; no key or value is copied."""
        if self._held[target]:
            raise ValueError(f"KV cache: slot {target} must be empty to receive slot {source}")
        self._held[target], self._held[source] = self._held[source], []
        self.page_table[target] = self.page_table[source]
        self.page_table[source] = SINK_PAGE

    def release(self, slot: int) -> None:
        """Return every page of ``slot``; published pages may still be found for a while."""
        self.pool.give_back(self._held[slot])
        self._held[slot] = []
        self.page_table[slot] = SINK_PAGE
