"""The blocks that the store knows by key: one row each, in columns.

Owns the life of a row: it lasts while the block has a place, in memory or in a lower tier, or a
child that has one. Owns the order of use, which all tiers share, and what the store says of where a
block is. Never decides that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from services.kvstore.block import BlockState, CopyState, Place
from services.kvstore.journal import NUM_CHANGES, Journal
from services.kvstore.rows import NOBODY, Column, RowArray, Rows


class Blocks(Rows):
    """Rows by key, and a block's values."""

    def __init__(self, num_changes: int = NUM_CHANGES) -> None:
        super().__init__()
        self.journal = Journal(num_changes)
        self.on_gone: Callable[[int], None] | None = None  # a pinned row has no place any more
        self.place = self.column(np.uint8)  # Place, as told in the journal
        self.num_pins = self.column(np.int32)
        self.tenant = self.column(np.int64)  # on whose behalf it was reserved
        self.state = self.column(np.uint8)  # BlockState
        self.is_private = self.column(np.bool_)
        self.num_holds = self.column(np.int32)  # leases and moves that need the slot's bytes
        self.parent = self.column(np.int32)  # row of the block before it in its chain, or NOBODY
        self.owner = self.column(np.int32)  # number of the incarnation that sealed it
        self.offset = self.column(np.int64)  # of the slot; -1 while there is none
        self.num_bytes = self.column(np.int64)
        self.digest = self.column(np.uint64)
        self.reservation_id = self.column(np.int64)
        self.last_used = self.column(np.int64)
        self._children: list[Column] = []  # of each tier
        self.lower: list[tuple[Place, Column]] = []  # CopyState in each lower tier, fastest first
        self._num_uses = 0

    def children(self) -> Column:
        """A column for the numbers of children in one more tier."""
        column = self.column(np.int32)
        self._children.append(column)
        return column

    def copies(self, place: Place) -> Column:
        """A column for the CopyState in one more tier, slower than all so far."""
        column = self.column(np.uint8)
        self.lower.append((place, column))
        return column

    def num_copies(self, row: int) -> int:
        """In how many lower tiers a block has a whole copy."""
        return sum(column.at[row] == CopyState.PRESENT for _, column in self.lower)

    def nums_copies(self, rows: RowArray) -> NDArray[np.int64]:
        """The same for many. [num_rows]"""
        nums = np.zeros(len(rows), dtype=np.int64)
        for _, column in self.lower:
            nums += column.values.take(rows) == CopyState.PRESENT
        return nums

    def open(self, key: bytes, parent: int) -> int:
        """The row for a block that has no place in memory; `parent` is remembered once, if at all.

        Only a new row without children gets a parent, so edges never form a cycle.
        """
        row = self.row_of(key)
        if row == NOBODY:
            is_parent_known = parent != NOBODY and self.has_place(parent)
            row = self.add(key)
            self.parent.at[row] = parent if is_parent_known else NOBODY
        return row

    def report(self, row: int) -> None:
        """Tells where a block is; whoever changes that says so before the row is let go."""
        before, place = self.place.at[row], self._place_of(row)
        if place == before:
            return
        self.place.at[row] = place
        self.journal.record(self.words_of(row), before, place)
        if place == Place.NONE and self.num_pins.at[row] and self.on_gone is not None:
            self.on_gone(row)

    def has_place(self, row: int) -> bool:
        """Whether a block is in memory or in a lower tier, or on its way there."""
        if self.state.at[row] != BlockState.ABSENT:
            return True
        for _, column in self.lower:  # noqa: SIM110 - a generator is what eviction would wait for
            if column.at[row] != CopyState.ABSENT:
                return True
        return False

    def _place_of(self, row: int) -> Place:
        if self.state.at[row] == BlockState.SEALED and not self.is_private.at[row]:
            return Place.MEMORY
        for place, column in self.lower:
            if column.at[row] == CopyState.PRESENT:
                return place
        return Place.NONE

    def is_parent(self, row: int) -> bool:
        """Whether a block with a place names it as its parent."""
        return any(column.at[row] for column in self._children)

    def let_go(self, row: int) -> None:
        """Forgets a row without a place, now or when its last child goes."""
        if row == NOBODY or self.has_place(row):
            return
        self.parent.at[row] = NOBODY
        if not self.is_parent(row):
            self.unname(row)
            self.free(row)

    def free(self, row: int) -> None:
        """Gives a nameless row to the next name, without what would be true of no other block."""
        self.state.at[row] = BlockState.ABSENT
        self.reservation_id.at[row] = 0
        self.tenant.at[row] = 0
        super().free(row)

    def lose_name(self, row: int) -> None:
        """Makes a row nameless although it stays; its children go with the name to a new row."""
        key = self.name_of(row)
        self.unname(row)
        self.parent.at[row] = NOBODY
        if self.is_parent(row):
            heir = self.add(key)
            self.parent.values[self.parent.values == row] = heir
            for column in self._children:
                column.at[heir], column.at[row] = column.at[row], 0

    def touch(self, row: int) -> None:
        """Marks a block as the most recently used."""
        self._num_uses += 1
        self.last_used.at[row] = self._num_uses

    def touch_chain(self, rows: RowArray) -> None:
        """Marks a chain as used now; a parent is more recent than its children."""
        first = self._num_uses + 1
        self._num_uses += len(rows)
        self.last_used.values[rows[::-1]] = np.arange(first, first + len(rows))


class Names:
    """Small numbers for strings such as incarnations. A name is never forgotten."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._fresh = itertools.count(1)

    def number(self, name: str) -> int:
        """The name's number, the same every time."""
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = next(self._fresh)
        return number
