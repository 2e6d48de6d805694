"""Which block of a tier goes next: least recently used, nobody's parent there, free to go.

Owns the tier's numbers of children and its order of use; whoever owns the tier drops the blocks.
"""

from __future__ import annotations

import heapq
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.kvstore.blocks import Blocks
from services.kvstore.rows import NOBODY, RowArray

_ROW_BITS = 32
_ROW_MASK = 2**_ROW_BITS - 1
_PATIENCE = 1024  # stale entries that `peek` mends one by one before it sorts them all anew


class Tier(Protocol):
    """What eviction must know of a tier."""

    def is_free(self, row: int) -> bool:
        """Whether only its children may keep a block here."""
        ...

    def are_free(self, rows: RowArray) -> NDArray[np.bool_]:
        """The same for many."""
        ...


class LruLeaves:
    """Eviction order over the blocks of one tier.

    Each candidate has one entry in a heap: when it was last used, as far as the heap knows. An
    entry is mended when it comes up, so that using a block costs nothing here.
    """

    def __init__(self, blocks: Blocks, tier: Tier) -> None:
        self._blocks = blocks
        self._tier = tier
        self._num_children = blocks.children()
        self._is_listed = blocks.column(np.bool_)
        self._heap: list[int] = []  # last_used << _ROW_BITS | row

    def enter(self, row: int) -> None:
        """Takes a block into the tier."""
        parent = self._blocks.parent.at[row]
        if parent != NOBODY:
            self._num_children.at[parent] += 1
        self.offer(row)

    def leave(self, row: int) -> None:
        """Forgets a block that leaves the tier; its parent may become a leaf."""
        parent = self._blocks.parent.at[row]
        if parent == NOBODY:
            return
        self._num_children.at[parent] -= 1
        if not self._num_children.at[parent]:
            self.offer(parent)
            self._blocks.let_go(parent)

    def offer(self, row: int) -> None:
        """Lists a block if it is a candidate."""
        if not self._is_listed.at[row] and self.is_candidate(row):
            self._is_listed.at[row] = True
            heapq.heappush(self._heap, self._blocks.last_used.at[row] << _ROW_BITS | row)

    def offer_all(self, rows: RowArray) -> None:
        """Lists those that are candidates."""
        for row in rows[self._are_candidates(rows) & ~self._is_listed.values.take(rows)].tolist():
            self.offer(row)

    def peek(self) -> int:
        """The next victim; NOBODY when nothing may go."""
        heap, last_used = self._heap, self._blocks.last_used.at
        num_stale = 0
        while heap:
            row = heap[0] & _ROW_MASK
            if not self.is_candidate(row):
                heapq.heappop(heap)
                self._is_listed.at[row] = False
            elif last_used[row] == heap[0] >> _ROW_BITS:
                return row
            elif num_stale < _PATIENCE:
                heapq.heapreplace(heap, last_used[row] << _ROW_BITS | row)
            else:
                self._sort()
            num_stale += 1
        return NOBODY

    def is_candidate(self, row: int) -> bool:
        """Whether a block may go now."""
        return not self._num_children.at[row] and self._tier.is_free(row)

    def check(self, members: RowArray) -> None:
        """Asserts that child counts are right and that every candidate is listed, once."""
        num_children = np.bincount(
            self._blocks.parent.values[members], minlength=len(self._num_children.values)
        )
        num_children[NOBODY] = 0
        assert (num_children == self._num_children.values).all(), "child counts are wrong"
        listed = [entry & _ROW_MASK for entry in self._heap]
        assert sorted(listed) == np.flatnonzero(self._is_listed.values).tolist()
        candidates = members[self._are_candidates(members)]
        assert candidates.tolist() == [r for r in members.tolist() if self.is_candidate(r)]
        assert set(candidates.tolist()) <= set(listed), "an evictable block is not listed"
        for entry in self._heap:
            assert entry >> _ROW_BITS <= self._blocks.last_used.at[entry & _ROW_MASK]

    def _are_candidates(self, rows: RowArray) -> NDArray[np.bool_]:
        return (self._num_children.values.take(rows) == 0) & self._tier.are_free(rows)

    def _sort(self) -> None:
        """Brings all entries up to date; a sorted list is a heap."""
        rows = np.array([entry & _ROW_MASK for entry in self._heap])
        order = np.argsort(self._blocks.last_used.values[rows])
        uses = self._blocks.last_used.values[rows[order]].tolist()
        pairs = zip(uses, rows[order].tolist(), strict=True)
        self._heap[:] = [used << _ROW_BITS | row for used, row in pairs]
